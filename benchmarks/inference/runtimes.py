"""A run's network in the runtimes that are compared."""

from __future__ import annotations

from collections.abc import Sequence

from dfs_jax.inference import onnx_models, quantize
from dfs_jax.inference.trained import StagedRun
from dfs_jax.types import UserError

JAX, ONNX, INT8 = "jax", "onnx", "onnx_int8"
RUNTIMES = (JAX, ONNX, INT8)
_CALIBRATION = 256  # images


def check_runtimes(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of runtimes, each once.

    Raises:
      UserError: none, or an unknown one.
    """
    unknown = [name for name in names if name not in RUNTIMES]
    if unknown or not names:
        raise UserError(f"--runtimes must be some of {', '.join(RUNTIMES)}, got {list(names)}")
    return tuple(dict.fromkeys(names))


def in_runtimes(staged: StagedRun, names: Sequence[str]) -> dict[str, StagedRun]:
    """Returns a checkpoint of a run with its stages in each runtime, by name.

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
        if name == JAX
        else staged._replace(stages=quantize.opened(*files[name], share_threads=True))
        for name in names
    }
