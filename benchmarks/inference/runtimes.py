"""A run's network in the runtimes that are compared."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from dfs_jax.inference import onnx_models, quantize
from dfs_jax.inference.trained import StagedRun
from dfs_jax.types import UserError

JAX, ONNX, INT8, TORCH = "jax", "onnx", "onnx_int8", "torch"
RUNTIMES = (JAX, ONNX, INT8, TORCH)
_CALIBRATION = 256  # images


def check_runtimes(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of runtimes, each once.

    Raises:
      UserError: none, an unknown one, or PyTorch, which is not installed.
    """
    unknown = [name for name in names if name not in RUNTIMES]
    if unknown or not names:
        raise UserError(f"--runtimes must be some of {', '.join(RUNTIMES)}, got {list(names)}")
    if TORCH in names and not _has_torch():
        raise UserError(
            "the runtime torch needs PyTorch: pip install -r requirements-benchmarks.txt"
        )
    return tuple(dict.fromkeys(names))


def in_runtimes(staged: StagedRun, names: Sequence[str]) -> dict[str, StagedRun]:
    """Returns a checkpoint of a run with its stages in each runtime, by name; PyTorch has none.

    All sessions of ONNX Runtime share one pool of threads, which is made last: calibration has
    sessions of its own. Ranges of int8 are found on the split that policies are fitted on.
    """
    files = {}
    if {ONNX, INT8} & {*names}:
        files[ONNX] = onnx_models.written(staged.stages, staged.example)
    if INT8 in names:
        images = staged.images(staged.experiment.score_split, _CALIBRATION)
        files[INT8] = quantize.quantized(*files[ONNX], images)
    return {
        name: staged
        if name in (JAX, TORCH)
        else staged._replace(stages=quantize.opened(*files[name], share_threads=True))
        for name in names
    }


def part_of(staged: StagedRun, in_runtime: StagedRun, name: str, k: int) -> Sequence[Any]:
    """Returns the stages of a run's network up to exit k, 0-based, in a runtime.

    Args:
      staged: checkpoint of the run.
      in_runtime: the same checkpoint in the runtime.
      name: name of the runtime.
      k: exit.
    """
    if k == len(staged.stages) - 1:
        return in_runtime.stages
    part = staged.stages[: k + 1]
    if name == ONNX:
        return quantize.opened(*onnx_models.written(part, staged.example), share_threads=True)
    return part


def _has_torch() -> bool:
    try:
        return importlib.util.find_spec("torch") is not None
    except ValueError:  # sys.modules has None for it
        return False
