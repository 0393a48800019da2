"""Number and index of this run's processes, from flags, Slurm or a Cloud TPU pod."""

from __future__ import annotations

import importlib.util
import os
import re
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from absl import flags

from dfs_jax.types import UserError

_SLURM_TASKS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
# Variables that JAX reads in a task of `srun`.
_SLURM_TASK = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
_TPU_DEVICES = ("accel[0-9]*", "vfio/[0-9]*")
_TPU_ENDPOINTS = "computeMetadata/v1/instance/attributes/worker-network-endpoints"
_METADATA_SECONDS = 5.0
_LAST_PORT = 65535
_ERRORS_ONLY = ("TF_CPP_MIN_LOG_LEVEL", "2")


class Launch(NamedTuple):
    """How this process finds the others; JAX asks the cluster for fields that are None.

    Attributes:
      coordinator: `HOST:PORT` of process 0.
      num_processes: number of processes.
      process_id: index of this process, from 0.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def define_flags() -> Callable[[], Launch | None]:
    """Defines the flags of a program that may run as several processes.

    Returns:
      Function that reads the parsed flags, see `choose_launch`; to be called before jax is
      imported, whose runtime would warn of every signal.
    """
    coordinator = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
    count = flags.DEFINE_integer(
        "num_processes", None, "Number of processes; default: from Slurm or the Cloud TPU pod."
    )
    index = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")

    def read() -> Launch | None:
        launch = choose_launch(coordinator.value, count.value, index.value, os.environ)
        if launch is not None:
            os.environ.setdefault(*_ERRORS_ONLY)
        return launch

    return read


def choose_launch(
    coordinator: str | None, count: int | None, index: int | None, environment: Mapping[str, str]
) -> Launch | None:
    """Returns how this process joins others; None if it is the only one.

    Flags take precedence. Without them, a task of `srun` with more than one task, or a host of a
    Cloud TPU pod with more than one host, joins the others; `--num_processes=1` prevents this.

    Args:
      coordinator: value of `--coordinator`, or None.
      count: value of `--num_processes`, or None.
      index: value of `--process_id`, or None.
      environment: environment variables by name.

    Raises:
      UserError: some flags without the others, or invalid values.

    Example:
      >>> choose_launch("node0:1234", 2, 1, {})
      Launch(coordinator='node0:1234', num_processes=2, process_id=1)
    """
    given = {"--coordinator": coordinator, "--num_processes": count, "--process_id": index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return Launch() if _is_slurm_task(environment) or _is_tpu_pod(environment) else None
    if count is not None and count < 1:
        raise UserError(f"--num_processes must be at least 1, got {count}")
    if count == 1 and index in (None, 0):
        return None
    if missing:
        raise UserError(
            f"{', '.join(given)} belong together: {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing"
        )
    if index is not None and count is not None and not 0 <= index < count:
        raise UserError(
            f"--process_id must lie between 0 and {count - 1}, for --num_processes={count}, "
            f"got {index}"
        )
    address = re.fullmatch(r"(?:[^:\s]+|\[[^\]\s]+\]):(\d+)", coordinator or "")
    if address is None or not 0 < int(address[1]) <= _LAST_PORT:
        raise UserError(
            f"--coordinator must be HOST:PORT with a port from 1 to {_LAST_PORT}, the same for all "
            f"processes, got {coordinator!r}"
        )
    return Launch(coordinator, count, index)


def _is_slurm_task(environment: Mapping[str, str]) -> bool:
    counts = [int(environment[name]) for name in _SLURM_TASKS if name in environment]
    return all(name in environment for name in _SLURM_TASK) and counts[:1] > [1]


def _is_tpu_pod(environment: Mapping[str, str]) -> bool:
    if "tpu" not in environment.get("JAX_PLATFORMS", "tpu"):
        return False
    if int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1:
        return True
    for name in _TPU_HOSTS:
        if name in environment:
            return "," in environment[name]
    if "TPU_SKIP_MDS_QUERY" in environment or not _is_tpu_machine():
        return False
    return "," in read_metadata(environment.get("GCE_METADATA_IP", "metadata.google.internal"))


def _is_tpu_machine() -> bool:
    devices = [path for pattern in _TPU_DEVICES for path in Path("/dev").glob(pattern)]
    return bool(devices) and importlib.util.find_spec("libtpu") is not None


def read_metadata(server: str) -> str:
    """Returns the hosts of a TPU slice, separated by commas; "" if the server does not answer."""
    request = urllib.request.Request(
        f"http://{server}/{_TPU_ENDPOINTS}", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as answer:
            return answer.read().decode()
    except OSError:
        return ""
