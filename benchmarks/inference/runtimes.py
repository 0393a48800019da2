"""A run's network in the runtimes that are compared."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from dfs_jax.inference import onnx_models, quantize
from dfs_jax.inference.trained import StagedRun
from dfs_jax.types import UserError

JAX, ONNX, INT8, TORCH = "jax", "onnx", "onnx_int8", "torch"
RUNTIMES = (JAX, ONNX, INT8, TORCH)
_CALIBRATION = 256  # images

Files = Mapping[str, tuple[dict[str, bytes], dict[str, Any]]]


def check_runtimes(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of runtimes, each once.

    Raises:
      UserError: none, an unknown one, or PyTorch, which is not installed.
    """
    unknown = [name for name in names if name not in RUNTIMES]
    if unknown or not names:
        raise UserError(f"--runtimes must be some of {', '.join(RUNTIMES)}, got {list(names)}")
    if TORCH in names:
        try:
            importlib.import_module("torch")
        except ImportError as error:
            raise UserError(
                "the runtime torch needs PyTorch: pip install -r requirements-benchmarks.txt"
            ) from error
    return tuple(dict.fromkeys(names))


def files_of(staged: StagedRun, names: Sequence[str], weight_bits: int = 7) -> Files:
    """Returns the ONNX files of a checkpoint of a run, and their description, by runtime.

    Ranges of int8 are found on the split that policies are fitted on. Calibration has sessions of
    its own: files of all networks are made before the first is opened, by `in_runtime`.

    Args:
      staged: checkpoint of the run.
      names: runtimes.
      weight_bits: bits of a weight in int8.
    """
    files = {}
    if {ONNX, INT8} & {*names}:
        files[ONNX] = onnx_models.written(staged.stages, staged.example)
    if INT8 in names:
        images = staged.images(staged.experiment.score_split, _CALIBRATION)
        files[INT8] = quantize.quantized(*files[ONNX], images, weight_bits=weight_bits)
    return files


def in_runtime(staged: StagedRun, name: str, files: Files) -> StagedRun:
    """Returns a checkpoint of a run with its stages in a runtime; for PyTorch, it is unchanged.

    All sessions of ONNX Runtime share one pool of threads.
    """
    if name in (JAX, TORCH):
        return staged
    return staged._replace(stages=quantize.opened(*files[name], share_threads=True))


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
