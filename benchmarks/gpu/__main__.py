"""Measures and trains on one GPU, stage by stage, within a given time: see docs/gpu.md.

    python -m benchmarks.gpu --stage=check --minutes=3 --output=DIR
    python -m benchmarks.gpu --stage=step --minutes=8 --output=DIR
    python -m benchmarks.gpu --stage=train --minutes=9 --output=DIR --data=packed
    python -m benchmarks.gpu --stage=infer --minutes=3 --output=DIR --data=packed

Each stage writes what it has at once, ends by itself before its minutes are over, and goes on where
an earlier session ended. `--rehearse` runs the same code with tiny sizes, on a CPU too.
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
    stage = flags.DEFINE_enum("stage", None, STAGES, "What to do.", required=True)
    minutes = flags.DEFINE_float("minutes", None, "Time of the whole stage.", required=True)
    output = flags.DEFINE_string("output", None, "Directory of what is kept.", required=True)
    work = flags.DEFINE_string("work", None, "Directory of what stays here; OUTPUT/work if unset.")
    data = flags.DEFINE_string("data", "packed", "Directory of the packed set.")
    carried = flags.DEFINE_string("carried", None, "Directory of what an earlier session kept.")
    again = flags.DEFINE_bool("again", False, "Measure what was merged earlier again.")
    rehearse = flags.DEFINE_bool("rehearse", False, "Tiny sizes, on whatever device there is.")
    flags.DEFINE_list("golden", [], "check: golden files or their directories, besides the tests'.")
    flags.DEFINE_string("cells", "*", "train: only cells whose name fits.")
    flags.DEFINE_float(
        "epochs", 1.0, "train: fraction of the published epochs; others are named so."
    )
    flags.DEFINE_float(
        "piece_mib", 15.0, "train: size of each piece of an unfinished run, at most."
    )
    flags.DEFINE_float("pieces_mib", 56.0, "train: size of all of them, at most.")

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
    """Keeps compiled programs in `work`, and leaves memory of the card to PyTorch beside us."""
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
