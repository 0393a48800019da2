"""`--peer=torch` of `dfs_jax.analysis.training_cost`: the same training step in PyTorch.

Needs requirements-benchmarks.txt; torch is imported when the peer is made, not with this module.
"""

from __future__ import annotations

import jax

from dfs_jax.analysis.step_timing import StepPrograms, available_cores
from dfs_jax.training.experiment import Experiment
from dfs_jax.types import UserError


class TorchPeer:
    """PyTorch on the CPU, eagerly, as it comes, on as many threads as JAX uses.

    Attributes:
      name: of the framework.
      layouts: how images and features may lie in memory.

    Raises:
      UserError: PyTorch is not installed, or JAX does not run on the CPU.
    """

    name = "torch"
    layouts = ("channels_first", "channels_last")

    def __init__(self):
        try:
            import torch
        except ImportError as error:
            raise UserError(
                "the torch peer needs PyTorch: pip install -r requirements-benchmarks.txt"
            ) from error
        if jax.default_backend() != "cpu":
            raise UserError(
                f"the torch peer runs on the CPU, JAX on the {jax.default_backend()}: "
                f"set JAX_PLATFORMS=cpu"
            )
        torch.set_num_threads(available_cores())

    def compile_step(self, experiment: Experiment, layout: str) -> StepPrograms:
        """Returns the parts of the experiment's step; its network starts from our weights.

        Raises:
          UserError: the experiment has a part that is not written in PyTorch here.
        """
        from benchmarks.torch_step import TorchStep

        step = TorchStep(experiment, layout)
        return StepPrograms(step.forward, step.forward_backward, step.step, step.make_batch)
