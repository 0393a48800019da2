"""MSDNet: densely connected layers at several scales, with exits on the coarsest."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfs_jax.layers import ConvNorm, stem_pool
from dfs_jax.models.contract import ConvolutionalModel
from dfs_jax.models.heads import PooledLinearHead
from dfs_jax.models.msdnet_plan import (
    Block,
    Bottleneck,
    Layer,
    Transition,
    check_fraction,
    check_name,
    plan_blocks,
)
from dfs_jax.types import HeadOutput, UserError, check_whole

# How often a stem halves the image.
STEM_HALVINGS = {"cifar": 0, "imagenet": 2}

Scales = tuple[jax.Array, ...]


class BottleneckConv(nn.Module):
    """A 1x1 `ConvNorm` that narrows, then a strided 3x3 `ConvNorm`.

    Attributes:
      plan: number of channels of both convolutions.
      stride: stride of the 3x3 convolution.
      dtype: type of the convolutions; None for that of their parameters.
      norm_groups: see `BatchNorm.groups`.
    """

    plan: Bottleneck
    stride: int = 1
    dtype: str | None = None
    norm_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height', width', features]`."""
        conv = functools.partial(ConvNorm, dtype=self.dtype, norm_groups=self.norm_groups)
        x = conv(self.plan.hidden, kernel=1, name="narrow")(x, train=train)
        return conv(self.plan.features, stride=self.stride, name="wide")(x, train=train)


class FirstLayer(nn.Module):
    """Creates the scales: each coarser one is a 3x3/2 convolution of the one before.

    Attributes:
      channels: number of channels of each scale, finest first.
      stem: layers of the finest scale: "cifar", a 3x3 convolution, or "imagenet", a 7x7/2
        convolution with a bias and a max-pool/2.
      dtype: type of the convolutions; None for that of their parameters.
      norm_groups: see `BatchNorm.groups`.
    """

    channels: tuple[int, ...]
    stem: str
    dtype: str | None = None
    norm_groups: int = 1

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Scales:
        """Maps images `[batch, height, width, 3]` to scales, each `[batch, h, w, channels]`."""
        finest, *coarser = self.channels
        conv = functools.partial(ConvNorm, dtype=self.dtype, norm_groups=self.norm_groups)
        if self.stem == "cifar":
            x = conv(finest, name="scale1")(images, train=train)
        else:
            stem = conv(finest, kernel=7, stride=2, use_bias=True, name="scale1")
            x = stem(images, train=train)
            x = stem_pool(x)
        scales = [x]
        for s, channels in enumerate(coarser, start=2):
            scales.append(conv(channels, stride=2, name=f"scale{s}")(scales[-1], train=train))
        return tuple(scales)


class GrowingScale(nn.Module):
    """One scale of a layer: [x, 3x3/2 of the finer scale, 3x3 of x], old channels first.

    Attributes:
      down: channels of the convolutions that read the finer scale; None if no finer scale is read.
      same: channels of the convolutions that read this scale.
      dtype: type of the convolutions; None for that of their parameters.
      norm_groups: see `BatchNorm.groups`.
    """

    down: Bottleneck | None
    same: Bottleneck
    dtype: str | None = None
    norm_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, finer: jax.Array | None, *, train: bool) -> jax.Array:
        """Appends channels to `x`."""
        parts, how = [x], (self.dtype, self.norm_groups)
        if self.down is not None and finer is not None:
            parts.append(BottleneckConv(self.down, 2, *how, name="down")(finer, train=train))
        parts.append(BottleneckConv(self.same, 1, *how, name="same")(x, train=train))
        return jnp.concatenate(parts, axis=-1)


class MSDNetLayer(nn.Module):
    """Grows every kept scale; a scale that is dropped here is still read.

    Attributes:
      plan: growth of each kept scale.
      dtype: type of the convolutions; None for that of their parameters.
      norm_groups: see `BatchNorm.groups`.
    """

    plan: Layer
    dtype: str | None = None
    norm_groups: int = 1

    @nn.compact
    def __call__(self, scales: Scales, *, train: bool) -> Scales:
        """Maps scales to the kept ones."""
        dropped, grown = len(scales) - len(self.plan.scales), []
        for j, growth in enumerate(self.plan.scales, start=dropped):
            how = self.dtype, self.norm_groups
            scale = GrowingScale(growth.down, growth.same, *how, name=f"scale{growth.scale}")
            finer = scales[j - 1] if growth.down is not None else None
            grown.append(scale(scales[j], finer, train=train))
        return tuple(grown)


class MSDNetTransition(nn.Module):
    """A 1x1 convolution, BatchNorm and ReLU at every scale.

    Attributes:
      plan: number of channels at each scale.
      dtype: type of the convolutions; None for that of their parameters.
      norm_groups: see `BatchNorm.groups`.
    """

    plan: Transition
    dtype: str | None = None
    norm_groups: int = 1

    @nn.compact
    def __call__(self, scales: Scales, *, train: bool) -> Scales:
        """Maps scales to narrower ones."""
        conv = functools.partial(ConvNorm, kernel=1, dtype=self.dtype, norm_groups=self.norm_groups)
        return tuple(
            conv(mix.features, name=f"scale{mix.scale}")(x, train=train)
            for mix, x in zip(self.plan.scales, scales, strict=True)
        )


class MSDNetBlock(nn.Module):
    """The layers and transitions between two exits; block 1 begins with the first layer.

    Attributes:
      plan: layout of the block.
      stem: layers of the finest scale, see `FirstLayer`.
      dtype: type of the convolutions; None for that of their parameters.
      norm_groups: see `BatchNorm.groups`.
    """

    plan: Block
    stem: str
    dtype: str | None = None
    norm_groups: int = 1

    @nn.compact
    def __call__(self, carry: jax.Array | Scales, *, train: bool) -> Scales:
        """Maps images (block 1) or scales to scales."""
        how = self.dtype, self.norm_groups
        if isinstance(carry, tuple):
            scales = carry
        else:
            scales = FirstLayer(self.plan.first, self.stem, *how, name="first")(carry, train=train)
        for step in self.plan.steps:
            kind: Any = MSDNetLayer if isinstance(step, Layer) else MSDNetTransition
            scales = kind(step, *how, name=step.name)(scales, train=train)
        return scales


class MSDNetHead(nn.Module):
    """Two 3x3/2 `ConvNorm`, average pool, dropout, linear with bias.

    The pool covers all positions, which equals the published 2x2 pool at the published image sizes.

    Attributes:
      num_classes: number of classes, the width of the logits.
      width: number of channels of the convolutions.
      dropout: dropout rate before the linear layer.
      adapted_width: width of the adapted feature; None for no adaptation layer.
      dtype: type of the convolutions; None for that of their parameters.
      norm_groups: see `BatchNorm.groups`.
    """

    num_classes: int
    width: int
    dropout: float
    adapted_width: int | None = None
    dtype: str | None = None
    norm_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> HeadOutput:
        """Classifies `x` `[batch, height, width, channels]`."""
        how = {"dtype": self.dtype, "norm_groups": self.norm_groups}
        for j in (1, 2):
            x = ConvNorm(self.width, stride=2, **how, name=f"conv{j}")(x, train=train)
        pooled = PooledLinearHead(
            self.num_classes,
            adapted_width=self.adapted_width,
            dropout=self.dropout,
            name="pooled",
        )
        return pooled(x, train=train)


class MSDNet(ConvolutionalModel):
    """Multi-scale dense network: exits read the coarsest of several densely connected scales.

    The carry is the tuple of kept scales, finest first. The feature is the coarsest scale, and only
    it is forked. The defaults are the CIFAR-100 network of Deep Feature Surgery.

    Attributes:
      num_exits: number of exits.
      base: number of layers in block 1, besides the first layer that creates the scales.
      step: number of layers in every later block, or its increase from block to block.
      step_mode: "even" for `step` layers in every later block; "lin_grow" for
        `step * (k - 1) + 1` layers in block k.
      initial_channels: width after the first layer; a scale has its factor times the width.
      growth: width that a layer adds.
      scale_factors: width of each scale in multiples of the network's, finest first.
      bottleneck_factors: width after the 1x1 convolution that reads a scale, in multiples of the
        3x3 convolution's after it, for each scale.
      prune: rule by which fine scales end: "max" drops the finest scale at equal distances, with a
        transition after each drop; "min" drops the scales that the last exit does not depend on,
        with transitions after each third of the layers.
      reduction: fraction of the width that a transition keeps; 0 for no transitions.
      stem: layers of the finest scale: "cifar" (3x3) or "imagenet" (7x7/2, max-pool/2).
      head_channels: width of the heads' convolutions; None for that of their input, as published
        for ImageNet.
      head_dropout: dropout rate before the linear classifiers: 0.5 in the published code of Deep
        Feature Surgery, 0 in MSDNet's own. It needs a "dropout" key in training.

    Raises:
      UserError: an argument out of range, arguments that do not fit together, or (when called)
        images too small for the number of scales.

    Reference: Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image
    Classification", ICLR 2018; forks as in Gong et al., ECCV 2024.

    Example: the widths at the exits.
      >>> [block.features for block in MSDNet(num_classes=100).plan]
      [320, 448, 320, 448, 576, 384, 512]
    """

    num_exits: int = 7
    base: int = 4
    step: int = 2
    step_mode: str = "even"
    initial_channels: int = 16
    growth: int = 16
    scale_factors: tuple[float, ...] = (1, 2, 4)
    bottleneck_factors: tuple[int, ...] = (1, 2, 4)
    prune: str = "max"
    reduction: float = 0.5
    stem: str = "cifar"
    head_channels: int | None = 128
    head_dropout: float = 0.5

    def __post_init__(self):
        self.scale_factors = tuple(self.scale_factors)
        self.bottleneck_factors = tuple(self.bottleneck_factors)
        check_name("stem", self.stem, tuple(STEM_HALVINGS))
        check_fraction("head_dropout", self.head_dropout, below_one=True)
        if self.head_channels is not None:
            check_whole("head_channels", self.head_channels)
        _ = self.plan  # raises for arguments that do not fit together
        super().__post_init__()

    @property
    def plan(self) -> tuple[Block, ...]:
        """Layout of every block."""
        return plan_blocks(
            num_exits=self.num_exits,
            base=self.base,
            step=self.step,
            step_mode=self.step_mode,
            initial_channels=self.initial_channels,
            growth=self.growth,
            scale_factors=self.scale_factors,
            bottleneck_factors=self.bottleneck_factors,
            prune=self.prune,
            reduction=self.reduction,
        )

    def setup(self):
        widths = [self.head_channels or block.features for block in self.plan]
        how = self.dtype, self.batch_norm_groups
        for i, (block, width) in enumerate(zip(self.plan, widths, strict=True)):
            adapted = widths[-1] if self.adapt_features and i < len(widths) - 1 else None
            head = MSDNetHead(self.num_classes, width, self.head_dropout, adapted, *how)
            setattr(self, f"block{i + 1}", MSDNetBlock(block, self.stem, *how))
            setattr(self, f"head{i + 1}", head)

    def block(self, i: int, carry: jax.Array | Scales, *, train: bool) -> Scales:
        if not isinstance(carry, tuple):
            self._check_size(carry.shape)
        return getattr(self, f"block{i + 1}")(carry, train=train)

    def head(self, i: int, x: jax.Array, *, train: bool) -> HeadOutput:
        return getattr(self, f"head{i + 1}")(x, train=train)

    def feature(self, carry: Scales) -> jax.Array:
        return carry[-1]

    def with_feature(self, carry: Scales, x: jax.Array) -> Scales:
        return (*carry[:-1], x)

    def _check_size(self, shape: tuple[int, ...]) -> None:
        # The coarsest map must have 2x2 positions, or its 3x3 convolutions read padding alone.
        smallest = 2 ** (STEM_HALVINGS[self.stem] + len(self.scale_factors))
        if min(shape[1:3]) < smallest:
            raise UserError(
                f"images of {shape[1]}x{shape[2]} are too small for {len(self.scale_factors)} "
                f"scales after the {self.stem} stem: each side needs at least {smallest} pixels"
            )


# Deep Feature Surgery's network for ImageNet.
ImageNetMSDNet = functools.partial(
    MSDNet,
    num_exits=5,
    base=4,
    step=4,
    initial_channels=32,
    scale_factors=(1, 2, 4, 4),
    bottleneck_factors=(1, 2, 4, 4),
    stem="imagenet",
    head_channels=None,
)
# MSDNet's own narrow networks for CIFAR, without dropout: for anytime prediction and for budgeted
# batch classification.
AnytimeMSDNet = functools.partial(MSDNet, growth=6, head_dropout=0.0)
BudgetedMSDNet = functools.partial(
    MSDNet, num_exits=5, base=1, step=1, step_mode="lin_grow", growth=6, head_dropout=0.0
)
