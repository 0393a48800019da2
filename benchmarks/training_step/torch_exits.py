"""Common parts of the PyTorch networks: the loop over exits, forks by `torch.cat` and `detach`.

Tensors have the published names, so that `dfs_jax.interop` translates a network's state_dict.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfs_jax.forks import Fork
from dfs_jax.forks.plain import PlainFork
from dfs_jax.models.contract import MultiExitModel
from dfs_jax.surgery import FeatureSurgery, partition_channels
from dfs_jax.types import UserError

Conv3x3 = functools.partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
Conv1x1 = functools.partial(nn.Conv2d, kernel_size=1, bias=False)


class TorchOutputs(NamedTuple):
    """Outputs of a network, shallow exit first.

    Attributes:
      logits: logits of each exit, `[batch, classes]`.
      features: feature of each exit, `[batch, width]`: adapted if it has such a layer, else pooled.
    """

    logits: list[Tensor]
    features: list[Tensor]


class Surgery:
    """Splits a feature between its exit and the next block, by `cat` and `detach`."""

    def __init__(self, fork: Fork, num_exits: int):
        if not isinstance(fork, PlainFork | FeatureSurgery):
            raise UserError(f"the torch peer has no fork like {fork}: it takes plain and dfs")
        self._fork = fork
        self._num_exits = num_exits

    def __call__(self, x: Tensor, exit_index: int) -> tuple[Tensor, Tensor]:
        """Returns the exit's and the next block's view of `x` `[batch, channels, ...]`."""
        if isinstance(self._fork, PlainFork) or exit_index == self._num_exits - 1:
            return x, x
        k = partition_channels(x.shape[1], self._fork.ratio_at(exit_index, self._num_exits))
        shared, specific = x[:, :k], x[:, k:]
        foreign = torch.zeros_like if self._fork.referencing == "none" else torch.detach
        to_trunk = torch.cat([shared, foreign(specific)], dim=1)
        if self._fork.referencing == "trunk_only":
            return x, to_trunk
        return torch.cat([foreign(shared), specific], dim=1), to_trunk


class TorchNetwork(nn.Module):
    """Base class of the networks, which runs the exits in order; subclasses define the parts."""

    def __init__(self, model: MultiExitModel, fork: Fork):
        super().__init__()
        self.num_exits = model.num_exits
        self.surgery = Surgery(fork, model.num_exits)
        self.adapts = model.adapt_features

    def block(self, i: int, carry: Any) -> Any:
        """Runs block i on the carry of the block before; block 0 on images."""
        raise NotImplementedError

    def head(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns exit i's logits and pooled feature."""
        raise NotImplementedError

    def feature(self, carry: Any) -> Tensor:
        """Returns the part of a block's output that is forked."""
        return carry

    def with_feature(self, carry: Any, x: Tensor) -> Any:
        """Returns a block's output with that part replaced."""
        del carry
        return x

    def add_adaptation_layers(self, widths: list[int]) -> None:
        """Adds to early exits a linear layer to the last one's width, if the loss needs it."""
        if self.adapts:
            for i, width in enumerate(widths[:-1], start=1):
                setattr(self, f"adaptation_layer{i}", nn.Linear(width, widths[-1]))

    def forward(self, images: Tensor) -> TorchOutputs:
        carry, outputs = images, TorchOutputs([], [])
        for i in range(self.num_exits):
            carry = self.block(i, carry)
            to_head, to_trunk = self.surgery(self.feature(carry), i)
            logits, pooled = self.head(i, to_head)
            if self.adapts and i < self.num_exits - 1:
                pooled = getattr(self, f"adaptation_layer{i + 1}")(pooled)
            outputs.logits.append(logits)
            outputs.features.append(pooled)
            carry = self.with_feature(carry, to_trunk)
        return outputs
