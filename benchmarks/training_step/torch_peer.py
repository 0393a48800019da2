"""`--peer=torch` of `benchmarks.training_step.training_cost`: the same training step in PyTorch.

Needs requirements-benchmarks.txt; torch is imported when the peer is created.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks.training_step.step_timing import StepPrograms, available_cores
from dfs_jax.program import say
from dfs_jax.training.experiment import Experiment
from dfs_jax.types import UserError

# Modes of `torch.compile`: CUDA graphs, without and with a search for the fastest kernels.
COMPILE_MODES = ("reduce-overhead", "max-autotune")
EAGER = ("channels_first", "channels_last")
COMPILED = tuple(f"channels_last {mode}" for mode in COMPILE_MODES)
_WARM_UP_STEPS = 3  # CUDA graphs are recorded after the first
_MIB = 2**20


class TorchPeer:
    """PyTorch on the device that JAX runs on.

    On a CPU it runs eagerly, on as many threads as JAX uses; on a GPU through `torch.compile`,
    channels last, with TensorFloat-32 for float32 as in JAX and cuDNN's search for algorithms.
    SGD is PyTorch's fused one everywhere.

    Args:
      compiles: whether steps are compiled; None for only on a GPU.

    Attributes:
      name: name of the framework.
      layouts: memory layouts of images and features, with the mode of `torch.compile`.

    Raises:
      UserError: PyTorch is not installed, or lacks the device that JAX runs on.
    """

    name = "torch"
    layouts: Sequence[str]

    def __init__(self, compiles: bool | None = None):
        try:
            import torch
        except ImportError as error:
            raise UserError(
                "the torch peer needs PyTorch: pip install -r requirements-benchmarks.txt"
            ) from error
        self._device = _device_of(torch, jax.default_backend())
        on_gpu = self._device == "cuda"
        self.layouts = COMPILED if (on_gpu if compiles is None else compiles) else EAGER
        torch.set_num_threads(available_cores())
        if on_gpu:
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")

    def compile_step(self, experiment: Experiment, layout: str) -> StepPrograms:
        """Returns the parts of the experiment's step; its network starts from our weights.

        Raises:
          UserError: a part of the experiment has no counterpart here in PyTorch.
        """
        from benchmarks.training_step.torch_step import TorchStep

        layout, _, mode = layout.partition(" ")
        step = TorchStep(experiment, layout, device=self._device, compile_mode=mode or None)
        run = _Runner(self._device)
        if not mode:
            return StepPrograms(
                run.once(step.forward),
                run.once(step.forward_backward),
                run.times(step.step),
                run.once(step.make_batch),
            )
        seconds, peak = run.warm_up(step.step)
        skipped = torch_counter("cudagraph_skips")
        if skipped:
            say(f"PyTorch has left out {skipped} CUDA graphs so far")
        return StepPrograms(
            run.once(step.forward),
            run.once(step.forward_backward),
            run.times(step.step),
            run.once(step.make_batch),
            compile_s=seconds,
            peak_mib=peak,
        )


def release() -> None:
    """Frees GPU memory of compiled steps that are no longer referenced."""
    import gc

    import torch

    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def torch_counter(name: str) -> int:
    """Returns a counter of PyTorch's compiler in this process."""
    from torch._dynamo.utils import counters  # private, and the only source

    return counters["inductor"][name]


class _Runner:
    """Runs functions that return before a GPU has finished, and waits for it."""

    def __init__(self, device: str):
        import torch

        self._cuda = torch.cuda if device == "cuda" else None

    def once(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Returns the function, which then waits."""

        def run() -> Any:
            found = function()
            self._wait()
            return found

        return run

    def times(self, function: Callable[[], Any]) -> Callable[..., None]:
        """Returns a function that calls this one a number of times and waits for the last call."""

        def run(steps: int = 1) -> None:
            for _ in range(steps):
                function()
            self._wait()

        return run

    def warm_up(self, function: Callable[[], Any]) -> tuple[float, float | None]:
        """Returns the seconds of the first calls, and the peak of GPU memory in MiB."""
        if self._cuda is not None:
            self._cuda.synchronize()
            self._cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        self.times(function)(_WARM_UP_STEPS)
        seconds = time.perf_counter() - begin
        peak = None if self._cuda is None else self._cuda.max_memory_allocated() / _MIB
        return seconds, peak

    def _wait(self) -> None:
        if self._cuda is not None:
            self._cuda.synchronize()


def _device_of(torch: Any, backend: str) -> str:
    if backend == "cpu":
        return "cpu"
    if backend == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise UserError(
        f"the torch peer has no {backend} here, on which JAX runs: set JAX_PLATFORMS=cpu"
    )
