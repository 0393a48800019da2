"""What a mesh should make of a step, and that compiled modules for 1, 8 and 64 devices agree."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dfs_jax.costs.compiled import Collective
from dfs_jax.reports.mesh_costs import exchanged_bytes
from tests.support.scaling_cases import CASES

QUICK = ("small_vgg", "small_vgg-fsdp")
SLOW = [name for name in CASES if name not in QUICK]


def run_on(devices, names, root):
    """Devices are forced when jax starts, so that each number of them takes a process."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(root / ".cache" / "tests"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.scaling_cases", str(devices), *names],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert result.stdout.split("\n")[:-1] == [f"ok {name}" for name in names]


@pytest.mark.slow
def test_eight_devices_do_and_exchange_what_the_mesh_predicts(request):
    run_on(8, QUICK, request.config.rootpath)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_eight_devices_do_so_for_every_model(request, name):
    run_on(8, [name], request.config.rootpath)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_sixty_four_devices_do_and_exchange_what_the_mesh_predicts(request, name):
    run_on(64, [name], request.config.rootpath)


def test_exchanged_bytes_by_kind():
    rows = [
        Collective("all-gather", 4, 2, 100),
        Collective("all-reduce", 8, 3, 10),
        Collective("reduce-scatter", 4, 1, 7),
    ]
    assert exchanged_bytes(rows) == (17, 100)
    assert exchanged_bytes([]) == (0, 0)
    with pytest.raises(ValueError, match="no use for all-to-all"):
        exchanged_bytes([*rows, Collective("all-to-all", 8, 1, 5)])
