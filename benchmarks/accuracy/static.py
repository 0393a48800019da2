"""Static networks: backbones with only their last exit, the alternative to multi-exit networks."""

from __future__ import annotations

import functools

import jax
from flax import linen as nn

from dfs_jax.models.contract import ConvolutionalModel
from dfs_jax.models.heads import PooledLinearHead
from dfs_jax.models.resnet import Stage
from dfs_jax.types import HeadOutput


class Stages(nn.Module):
    """The stem and all stages of a ResNet, one after another."""

    width: int
    stem: str
    stage_sizes: tuple[int, ...]
    dtype: str | None = None
    norm_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for i, size in enumerate(self.stage_sizes):
            stage = Stage(
                features=self.width * 2**i,
                num_blocks=size,
                stride=2 if i else 1,
                bottleneck=False,
                stem=None if i else self.stem,
                dtype=self.dtype,
                norm_groups=self.norm_groups,
                name=f"stage{i + 1}",
            )
            x = stage(x, train=train)
        return x


class StaticResNet(ConvolutionalModel):
    """A ResNet of basic blocks with one exit: the trunk of `dfs_jax.models.resnet.ResNet`.

    Attributes:
      width, stem, stage_sizes: see there.

    Example:
      >>> StaticResNet18(num_classes=100).num_exits
      1
    """

    width: int = 64
    stem: str = "cifar"
    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)

    @property
    def num_exits(self) -> int:
        return 1

    def setup(self):
        how = self.dtype, self.batch_norm_groups
        self.block1 = Stages(self.width, self.stem, self.stage_sizes, *how)
        self.head1 = PooledLinearHead(self.num_classes)

    def block(self, i: int, carry: jax.Array, *, train: bool) -> jax.Array:
        del i
        return self.block1(carry, train=train)

    def head(self, i: int, x: jax.Array, *, train: bool) -> HeadOutput:
        del i, train
        return self.head1(x)


StaticResNet18 = functools.partial(StaticResNet, stage_sizes=(2, 2, 2, 2))
