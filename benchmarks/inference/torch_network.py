"""A whole network in PyTorch, channels last, as a user of PyTorch would run it on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.training_step.torch_step import build_network
from dfs_jax.forks import Fork
from dfs_jax.inference.timing import StageTimes, noise_like
from dfs_jax.inference.trained import StagedRun
from dfs_jax.interop import to_torch_state_dict
from dfs_jax.models.contract import MultiExitModel
from dfs_jax.stopwatch import median_seconds, seconds_of
from dfs_jax.types import ArrayShape


def whole_network(model: MultiExitModel, fork: Fork, variables: dict[str, Any]) -> Any:
    """Returns a `torch.nn.Module` from images, channels first, to the last exit's logits.

    Raises:
      UserError: a model or fork that has no counterpart in PyTorch.
    """
    import torch

    network = build_network(model, fork)
    state = to_torch_state_dict(model, variables)
    network.load_state_dict({name: torch.as_tensor(np.array(x)) for name, x in state.items()})
    network._state_dict_hooks.clear()  # an exporter reads the weights as they are

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, images: Any) -> Any:
            carry, last = images, network.num_exits - 1
            for i in range(network.num_exits):
                carry = network.block(i, carry)
            return network.head(last, network.feature(carry))[0]

    return Whole().eval()


class TorchNetwork:
    """The whole network of a run, a contender of `benchmarks.inference.speed.race`.

    It takes uint8 images, normalises them and returns what other runtimes do: probabilities.

    Args:
      staged: checkpoint of the run.
    """

    def __init__(self, staged: StagedRun):
        import torch

        experiment = staged.experiment
        whole = whole_network(experiment.model, experiment.fork, staged.variables)
        dataset = experiment.dataset
        mean, std = (
            255 * torch.tensor(np.asarray(x, np.float32)) for x in (dataset.mean, dataset.std)
        )
        last = whole.to(memory_format=torch.channels_last)

        def run(images: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                # Channels are last already, so that the transposed array has that memory format.
                x = ((torch.from_numpy(images) - mean) / std).permute(0, 3, 1, 2)
                return torch.softmax(last(x), -1).numpy()

        self.run, self._example = run, ArrayShape(dataset.image_shape, np.dtype(np.uint8))

    def go_through(self, images: np.ndarray, batch: int) -> None:
        for start in range(0, len(images), batch):
            self.run(images[start : start + batch])

    def answer(self, images: np.ndarray) -> np.ndarray:
        return np.full(len(images), seconds_of(lambda: self.run(images)))

    def times(self, batch: int, *, rounds: int) -> StageTimes:
        """Returns the time of the whole network; there are no stages."""
        images = noise_like(self._example, batch)
        (seconds,) = median_seconds([lambda: self.run(images)], rounds)
        return StageTimes(batch, (), seconds / batch)
