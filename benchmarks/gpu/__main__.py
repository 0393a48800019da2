"""Measures and trains on one GPU, in stages with time limits: see docs/gpu.md.

    python -m benchmarks.gpu --stage=check --minutes=3 --output=DIR
    python -m benchmarks.gpu --stage=step --minutes=8 --output=DIR
    python -m benchmarks.gpu --stage=train --minutes=9 --output=DIR --data=packed
    python -m benchmarks.gpu --stage=infer --minutes=3 --output=DIR --data=packed

Each stage writes results at once, ends before its time limit, and continues where an earlier
session ended. `--rehearse` runs the same code with tiny sizes, also on a CPU.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from absl import flags

from benchmarks.gpu.clock import Clock, ends_in_time
from dfs_jax import program
from dfs_jax.paths import local_path, output_directory
from dfs_jax.types import UserError

STAGES = ("check", "step", "infer", "train")


def main() -> None:
    """Runs the program."""
    stage = flags.DEFINE_enum("stage", None, STAGES, "Stage to run.", required=True)
    minutes = flags.DEFINE_float("minutes", None, "Time limit of the stage.", required=True)
    output = flags.DEFINE_string("output", None, "Directory of the results.", required=True)
    work = flags.DEFINE_string("work", None, "Directory of caches and runs; default: OUTPUT/work.")
    data = flags.DEFINE_string("data", "packed", "Directory of the packed set.")
    carried = flags.DEFINE_string("carried", None, "Directory of an earlier session's results.")
    again = flags.DEFINE_bool("again", False, "Repeat measurements that were merged earlier.")
    rehearse = flags.DEFINE_bool("rehearse", False, "Use tiny sizes, on any device.")
    flags.DEFINE_list("golden", [], "check: golden files or directories, besides the tests'.")
    flags.DEFINE_string("cells", "*", "train: pattern of cells' names.")
    flags.DEFINE_float(
        "epochs", 1.0, "train: fraction of the published epochs, part of the cells' names."
    )
    flags.DEFINE_float("piece_mib", 15.0, "train: largest size of each piece of an unfinished run.")
    flags.DEFINE_float("pieces_mib", 56.0, "train: largest size of all pieces together.")

    def run() -> int | None:
        clock = Clock(minutes.value)
        kept = output_directory(output.value, "--output")
        own = kept / "work" if work.value is None else work.value
        own = output_directory(own, "--work")
        _prepare_jax(stage.value, own)
        from benchmarks.gpu.session import Session

        session = Session(
            stage.value,
            kept,
            own,
            local_path(data.value, "--data"),
            None if carried.value is None else local_path(carried.value, "--carried"),
            clock,
            rehearse.value,
            again.value,
        )
        _check_device(session.rehearses)
        module = importlib.import_module(f"benchmarks.gpu.{stage.value}")
        with ends_in_time(clock):
            return module.run(session)

    program.run(run)


def _prepare_jax(stage: str, work: Path) -> None:
    """Keeps compiled programs in `work`, and leaves part of the card's memory to PyTorch."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(work / "compiled"))
    if stage == "step":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    program.use_compilation_cache()


def _check_device(rehearses: bool) -> None:
    import jax

    platform = jax.default_backend()
    if platform == "cpu" and not rehearses:
        raise UserError("JAX finds no accelerator here: on a CPU there is only --rehearse")


if __name__ == "__main__":
    main()
