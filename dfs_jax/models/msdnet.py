"""MSDNet: densely connected layers at several scales, with exits on the coarsest."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfs_jax.layers import conv_init, stem_pool
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
from dfs_jax.partitioned import Execution
from dfs_jax.surgery import LiveChannels
from dfs_jax.types import HeadOutput, UserError, check_whole

# How often a stem halves the image.
STEM_HALVINGS = {"cifar": 0, "imagenet": 2}

Scales = tuple[jax.Array, ...]


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, ReLU.

    Attributes:
      features: number of output channels.
      kernel: side of the kernel, an odd number; each side is padded with half of it.
      stride: stride of the convolution.
      use_bias: whether the convolution has a bias.
      execution: how the layers run.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    use_bias: bool = False
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array, live: LiveChannels = None, *, train: bool) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height', width', features]`."""
        conv = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            self.stride,
            padding=self.kernel // 2,
            use_bias=self.use_bias,
            dtype=self.execution.dtype,
            kernel_init=conv_init,
            conv_general_dilated=self.execution.conv(live),
            name="conv",
        )
        return nn.relu(self.execution.batch_norm("norm")(conv(x), train=train))


class BottleneckConv(nn.Module):
    """A 1x1 `ConvNorm` that narrows, then a strided 3x3 `ConvNorm`.

    Attributes:
      plan: number of channels of both convolutions.
      stride: stride of the 3x3 convolution.
      execution: how the layers run.
    """

    plan: Bottleneck
    stride: int = 1
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array, live: LiveChannels = None, *, train: bool) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height', width', features]`."""
        conv = functools.partial(ConvNorm, execution=self.execution)
        x = conv(self.plan.hidden, kernel=1, name="narrow")(x, live, train=train)
        return conv(self.plan.features, stride=self.stride, name="wide")(x, train=train)


class FirstLayer(nn.Module):
    """Creates the scales: each coarser one is a 3x3/2 convolution of the one before.

    Attributes:
      channels: number of channels of each scale, finest first.
      stem: layers of the finest scale: "cifar", a 3x3 convolution, or "imagenet", a 7x7/2
        convolution with a bias and a max-pool/2.
      execution: how the layers run.
    """

    channels: tuple[int, ...]
    stem: str
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> Scales:
        """Maps images `[batch, height, width, 3]` to scales, each `[batch, h, w, channels]`."""
        finest, *coarser = self.channels
        conv = functools.partial(ConvNorm, execution=self.execution)
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
      execution: how the layers run.
    """

    down: Bottleneck | None
    same: Bottleneck
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, x: jax.Array, finer: jax.Array | None, live: LiveChannels = None, *, train: bool
    ) -> jax.Array:
        """Appends channels to `x`, whose channels `live` can carry gradient."""
        parts = [x]
        if self.down is not None and finer is not None:
            down = BottleneckConv(self.down, 2, self.execution, name="down")
            parts.append(down(finer, train=train))
        same = BottleneckConv(self.same, 1, self.execution, name="same")
        parts.append(same(x, live, train=train))
        return jnp.concatenate(parts, axis=-1)


class MSDNetLayer(nn.Module):
    """Grows every kept scale; a scale that is dropped here is still read.

    Attributes:
      plan: growth of each kept scale.
      execution: how the layers run.
    """

    plan: Layer
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, scales: Scales, live: LiveChannels = None, *, train: bool) -> Scales:
        """Maps scales to the kept ones; `live` is of the coarsest, finer scales are all live."""
        dropped, grown = len(scales) - len(self.plan.scales), []
        for j, growth in enumerate(self.plan.scales, start=dropped):
            scale = GrowingScale(
                growth.down, growth.same, self.execution, name=f"scale{growth.scale}"
            )
            finer = scales[j - 1] if growth.down is not None else None
            grown.append(scale(scales[j], finer, _at_scale(j, scales, live), train=train))
        return tuple(grown)


class MSDNetTransition(nn.Module):
    """A 1x1 convolution, BatchNorm and ReLU at every scale.

    Attributes:
      plan: number of channels at each scale.
      execution: how the layers run.
    """

    plan: Transition
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, scales: Scales, live: LiveChannels = None, *, train: bool) -> Scales:
        """Maps scales to narrower ones; `live` is of the coarsest, finer scales are all live."""
        return tuple(
            ConvNorm(mix.features, 1, execution=self.execution, name=f"scale{mix.scale}")(
                x, _at_scale(j, scales, live), train=train
            )
            for j, (mix, x) in enumerate(zip(self.plan.scales, scales, strict=True))
        )


class MSDNetBlock(nn.Module):
    """The layers and transitions between two exits; block 1 begins with the first layer.

    Attributes:
      plan: layout of the block.
      stem: layers of the finest scale, see `FirstLayer`.
      execution: how the layers run.
    """

    plan: Block
    stem: str
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, carry: jax.Array | Scales, live: LiveChannels = None, *, train: bool
    ) -> Scales:
        """Maps images (block 1) or scales to scales; `live` is of the coarsest scale."""
        if isinstance(carry, tuple):
            scales = carry
        else:
            first = FirstLayer(self.plan.first, self.stem, self.execution, name="first")
            scales = first(carry, train=train)
        for step, step_live in zip(self.plan.steps, self.plan.live(live)[:-1], strict=True):
            if isinstance(step, Layer):
                module = MSDNetLayer(step, self.execution, name=step.name)
            else:
                module = MSDNetTransition(step, self.execution, name=step.name)
            scales = module(scales, step_live, train=train)
        return scales


class MSDNetHead(nn.Module):
    """Two 3x3/2 `ConvNorm`, average pool, dropout, linear with bias.

    The pool covers all positions, which equals the published 2x2 pool at the published image sizes.

    Attributes:
      num_classes: number of classes, the width of the logits.
      width: number of channels of the convolutions.
      dropout: dropout rate before the linear layer.
      adapted_width: width of the adapted feature; None for no adaptation layer.
      execution: how the layers run.
    """

    num_classes: int
    width: int
    dropout: float
    adapted_width: int | None = None
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array, live: LiveChannels = None, *, train: bool) -> HeadOutput:
        """Classifies `x` `[batch, height, width, channels]`."""
        conv = functools.partial(ConvNorm, self.width, stride=2, execution=self.execution)
        x = conv(name="conv1")(x, live, train=train)
        x = conv(name="conv2")(x, train=train)
        pooled = PooledLinearHead(
            self.num_classes,
            adapted_width=self.adapted_width,
            dropout=self.dropout,
            execution=self.execution,
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
        for i, (block, width) in enumerate(zip(self.plan, widths, strict=True)):
            adapted = widths[-1] if self.adapt_features and i < len(widths) - 1 else None
            head = MSDNetHead(self.num_classes, width, self.head_dropout, adapted, self.execution)
            setattr(self, f"block{i + 1}", MSDNetBlock(block, self.stem, self.execution))
            setattr(self, f"head{i + 1}", head)

    def block(
        self, i: int, carry: jax.Array | Scales, live: LiveChannels = None, *, train: bool
    ) -> Scales:
        if not isinstance(carry, tuple):
            self._check_size(carry.shape)
        return getattr(self, f"block{i + 1}")(carry, live, train=train)

    def head(self, i: int, x: jax.Array, live: LiveChannels = None, *, train: bool) -> HeadOutput:
        return getattr(self, f"head{i + 1}")(x, live, train=train)

    def feature(self, carry: Scales) -> jax.Array:
        return carry[-1]

    def with_feature(self, carry: Scales, x: jax.Array) -> Scales:
        return (*carry[:-1], x)

    def live_after(self, i: int, live: LiveChannels) -> LiveChannels:
        return self.plan[i].live(live)[-1]

    def _check_size(self, shape: tuple[int, ...]) -> None:
        # The coarsest map must have 2x2 positions, or its 3x3 convolutions read padding alone.
        smallest = 2 ** (STEM_HALVINGS[self.stem] + len(self.scale_factors))
        if min(shape[1:3]) < smallest:
            raise UserError(
                f"images of {shape[1]}x{shape[2]} are too small for {len(self.scale_factors)} "
                f"scales after the {self.stem} stem: each side needs at least {smallest} pixels"
            )


def _at_scale(j: int, scales: Scales, live: LiveChannels) -> LiveChannels:
    """Returns the live channels of scale j: `live` for the coarsest, all for finer ones."""
    return live if j == len(scales) - 1 else None


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
