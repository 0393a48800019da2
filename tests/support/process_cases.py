"""Cases for two processes: `python -m tests.support.process_cases CASE PORT ID`."""

from __future__ import annotations

import json
import sys
import tempfile
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dfs_jax.interop import save_weights
from dfs_jax.launch import Launch
from dfs_jax.training import processes, state_sharding
from dfs_jax.training.checkpoint import leaf_checksums
from dfs_jax.training.experiment import build_experiment, initial_state
from dfs_jax.training.processes import by_writer, is_writer, joined
from dfs_jax.training.sharding import (
    create_mesh,
    gathered,
    put_batch,
    put_replicated,
    rows_here,
)
from dfs_jax.types import UserError
from tests.support.helpers import tiny_config

BATCH = np.arange(8 * 3).reshape(8, 3)
DEVICES = 2  # of each process


class Refused(Exception):
    """What only the writer can find out."""


def agree() -> dict[str, object]:
    """Answers, arrays and errors are the same in both processes; each has its own rows."""
    found: dict[str, object] = {
        "answer": by_writer(lambda name: f"{name} of {jax.process_index()}", "answer"),
        "errors": [_message(Refused), _message(UserError)],
        "devices": len(jax.devices()),
    }
    for name in ("data", "fsdp", "tensor"):
        mesh = create_mesh({"data": 1, name: 2 * DEVICES})
        rows = rows_here(len(BATCH), mesh)
        on_devices = put_batch({"x": BATCH[rows]}, mesh)["x"]
        np.testing.assert_array_equal(gathered(on_devices), BATCH)
        found[name] = rows.tolist()
    mesh = create_mesh({"data": 1, "fsdp": 4})
    split = jax.jit(lambda x: x + 1, out_shardings=NamedSharding(mesh, PartitionSpec("fsdp")))
    here, there = gathered((split(put_replicated(BATCH, mesh)), BATCH))
    np.testing.assert_array_equal(here, there + 1)
    return found


def _message(kind: type[Exception]) -> str:
    def refuse():
        raise kind(f"refused by {jax.process_index()}")

    try:
        by_writer(refuse, errors=(UserError, Refused))
    except kind as error:
        return str(error)
    return "not raised"


def trunk() -> dict[str, object]:
    """What a file holds lies on the devices of both processes, whole or split over them."""
    state_sharding.LEAST_SPLIT = 64  # of a narrow network too something is split
    config = tiny_config(batch_size=4 * DEVICES)
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, fsdp in (("made", 1), ("whole", 1), ("split", 2 * DEVICES)):
            config.update({"mesh": {"fsdp": fsdp}})
            state = initial_state(build_experiment(config))
            variables = gathered(state.eval_variables)
            # Each process reads a file of its own.
            save_weights(f"{directory}/weights.npz", variables)
            config.init_from = f"{directory}/weights.npz"
            blocks = {k: v for k, v in state.params.items() if k.startswith("block")}
            found[name] = leaf_checksums(blocks)
    return found


def alone() -> None:
    """The other process never comes."""


def fail() -> None:
    """One process makes a mistake while the other waits for it."""
    if not is_writer():
        raise UserError("a mistake of process 1")
    time.sleep(60)


def crash() -> None:
    """The writer crashes while the other waits for it."""
    if is_writer():
        raise RuntimeError("a crash of process 0")
    time.sleep(60)


def silent() -> None:
    """The other's heart stops, but its connections stay."""
    processes.POLL, processes.SILENT_POLLS = 1, 3
    if not is_writer():
        processes._Watch._beat = lambda self: None
    time.sleep(60)


CASES = {case.__name__: case for case in (agree, trunk, alone, fail, crash, silent)}


def main(case: str, port: str, index: str) -> None:
    if case == "alone":
        processes.JOIN = 1
    with joined(Launch(f"localhost:{port}", 2, int(index))):
        print(is_writer(), flush=True)
        found = CASES[case]()
        sys.stderr.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
