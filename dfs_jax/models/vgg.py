"""VGG with exits after all or some of its convolutions."""

from __future__ import annotations

import functools
import itertools

import jax
from flax import linen as nn

from dfs_jax.layers import BatchNorm, Conv3x3
from dfs_jax.models.contract import ConvolutionalModel
from dfs_jax.models.heads import PooledLinearHead
from dfs_jax.types import HeadOutput, UserError, check_whole


class ConvBlock(nn.Module):
    """Convolution, ReLU, BatchNorm, and a 2x2 max-pool at the end of a stage.

    Attributes:
      features: number of output channels.
      use_bias: whether the convolution has a bias.
      pool: whether a max-pool halves the map at the end.
      dtype: type of the convolution; None for that of its parameters.
      norm_groups: see `BatchNorm.groups`.
    """

    features: int
    use_bias: bool = False
    pool: bool = False
    dtype: str | None = None
    norm_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height', width', features]`."""
        x = Conv3x3(self.features, use_bias=self.use_bias, dtype=self.dtype, name="conv")(x)
        x = BatchNorm(groups=self.norm_groups, name="norm")(nn.relu(x), train=train)
        return nn.max_pool(x, (2, 2), (2, 2)) if self.pool else x


class ConvBlocks(nn.Module):
    """Several `ConvBlock`s between two exits.

    Attributes:
      features: number of output channels of each convolution.
      use_bias: whether the first convolution has a bias.
      pools: whether a max-pool follows, for each convolution.
      dtype: see `ConvBlock`.
      norm_groups: see `ConvBlock`.
    """

    features: tuple[int, ...]
    use_bias: bool
    pools: tuple[bool, ...]
    dtype: str | None = None
    norm_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height', width', features[-1]]`."""
        for k, (features, pool) in enumerate(zip(self.features, self.pools, strict=True)):
            use_bias = self.use_bias and k == 0
            block = ConvBlock(
                features, use_bias, pool, self.dtype, self.norm_groups, name=f"layer{k + 1}"
            )
            x = block(x, train=train)
        return x


class VGG(ConvolutionalModel):
    """VGG: stages of 3x3 convolutions, all or some with an exit; a stage ends in a max-pool.

    Only the first convolution has a bias. Classifiers follow a global pool and have none.

    Attributes:
      width: number of channels in the first stage.
      stage_sizes: number of convolutions in each stage.
      stage_multipliers: number of channels in each stage, in multiples of `width`.
      exits: convolutions that have an exit, counted from 1 and including the last; None for all.
        The convolutions between two exits form one block.

    Example:
      >>> VGG(num_classes=10, exits=(1, 6)).num_exits
      2

    Reference: Simonyan and Zisserman, ICLR 2015; exits as in Gong et al., ECCV 2024.
    """

    width: int = 64
    stage_sizes: tuple[int, ...] = (2, 2, 2)
    stage_multipliers: tuple[int, ...] = (1, 2, 4)
    exits: tuple[int, ...] | None = None

    def __post_init__(self):
        check_whole("width", self.width)
        if self.exits is not None:
            _check_exits(self.exits, sum(self.stage_sizes))
        super().__post_init__()

    @property
    def num_exits(self) -> int:
        return len(self._ends_of_blocks())

    def setup(self):
        widths = self._conv_widths()
        pools = [k in itertools.accumulate(self.stage_sizes) for k in range(1, len(widths) + 1)]
        start = 0
        for i, end in enumerate(self._ends_of_blocks()):
            block: nn.Module
            how = self.dtype, self.batch_norm_groups
            if end == start + 1:
                block = ConvBlock(widths[start], i == 0, pools[start], *how)
            else:
                features, halved = tuple(widths[start:end]), tuple(pools[start:end])
                block = ConvBlocks(features, i == 0, halved, *how)
            adapted = widths[-1] if self.adapt_features and end < len(widths) else None
            head = PooledLinearHead(self.num_classes, use_bias=False, adapted_width=adapted)
            setattr(self, f"block{i + 1}", block)
            setattr(self, f"head{i + 1}", head)
            start = end

    def block(self, i: int, carry: jax.Array, *, train: bool) -> jax.Array:
        if i == 0:
            self._check_size(carry.shape)
        return getattr(self, f"block{i + 1}")(carry, train=train)

    def head(self, i: int, x: jax.Array, *, train: bool) -> HeadOutput:
        del train  # neither statistics nor dropout here
        return getattr(self, f"head{i + 1}")(x)

    def _ends_of_blocks(self) -> tuple[int, ...]:
        return self.exits or tuple(range(1, sum(self.stage_sizes) + 1))

    def _conv_widths(self) -> list[int]:
        stages = zip(self.stage_sizes, self.stage_multipliers, strict=True)
        return [multiplier * self.width for size, multiplier in stages for _ in range(size)]

    def _check_size(self, shape: tuple[int, ...]) -> None:
        smallest = 2 ** len(self.stage_sizes)
        if min(shape[1:3]) < smallest:
            raise UserError(
                f"images of {shape[1]}x{shape[2]} are too small for {len(self.stage_sizes)} "
                f"max-pools: each side needs at least {smallest} pixels"
            )


def _check_exits(exits: tuple[int, ...], convolutions: int) -> None:
    known = range(1, convolutions + 1)
    chosen = isinstance(exits, tuple) and tuple(k for k in known if k in exits)
    if not chosen or chosen != exits or chosen[-1] != convolutions:
        raise UserError(
            f"exits must be a tuple of convolutions in rising order, the last one, {convolutions}, "
            f"among them, such as (1, {convolutions}); got {exits!r}"
        )


# CIFAR: six convolutions and exits of 1, 1, 2, 2, 4, 4 times `width` channels.
VGG7 = functools.partial(VGG, stage_sizes=(2, 2, 2), stage_multipliers=(1, 2, 4))
# ImageNet: thirteen of 1, 1, 2, 2, 4, 4, 4 and then 8 times `width` channels.
VGG16 = functools.partial(VGG, stage_sizes=(2, 2, 3, 3, 3), stage_multipliers=(1, 2, 4, 8, 8))
