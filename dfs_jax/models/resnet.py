"""ResNet with an exit after every stage; early exits have an attention gate."""

from __future__ import annotations

import functools

import jax
from flax import linen as nn

from dfs_jax.layers import (
    BatchNorm,
    Conv1x1,
    Conv3x3,
    conv_init,
    stem_pool,
    upsample_bilinear,
)
from dfs_jax.models.contract import ConvolutionalModel
from dfs_jax.models.heads import PooledLinearHead
from dfs_jax.types import HeadOutput, UserError, check_whole

# Number of times that a stem halves the image.
STEM_HALVINGS = {"cifar": 0, "imagenet": 2}
# Output channels of a bottleneck block, in multiples of its inner ones.
EXPANSION = 4


class Stem(nn.Module):
    """First layers: a 3x3 convolution ("cifar"), or a 7x7/2 one and a 3x3/2 max-pool ("imagenet").

    Attributes:
      features: number of output channels.
      kind: kind of the stem, "cifar" or "imagenet".
      dtype: type of the convolutions; None for that of their parameters.
      norm_groups: see `BatchNorm.groups`.
    """

    features: int
    kind: str
    dtype: str | None = None
    norm_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images `[batch, height, width, 3]` to `[batch, height', width', features]`."""
        if self.kind == "cifar":
            conv = Conv3x3
        else:
            conv = functools.partial(
                nn.Conv, kernel_size=(7, 7), strides=2, padding=3, kernel_init=conv_init
            )
        x = conv(self.features, use_bias=False, dtype=self.dtype, name="conv")(x)
        x = nn.relu(BatchNorm(groups=self.norm_groups, name="norm")(x, train=train))
        return x if self.kind == "cifar" else stem_pool(x)


class ResidualBlock(nn.Module):
    """Residual block: relu(residual(x) + shortcut(x)); both read the same, possibly forked, x.

        basic       3x3/stride, 3x3
        bottleneck  1x1, 3x3/stride, 1x1 to `EXPANSION` times the channels

    BatchNorm follows every convolution, with ReLU between them. The shortcut is a 1x1/stride
    convolution and BatchNorm where the shape changes, and the identity elsewhere.

    Attributes:
      features: number of channels of the 3x3 convolutions.
      stride: stride of the block.
      bottleneck: whether the block is a bottleneck block rather than a basic one.
      dtype: type of the convolutions; None for that of their parameters.
      norm_groups: see `BatchNorm.groups`.
    """

    features: int
    stride: int = 1
    bottleneck: bool = False
    dtype: str | None = None
    norm_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height', width', channels']`."""
        norm = functools.partial(BatchNorm, groups=self.norm_groups)
        residual, convs = x, self._convolutions()
        for j, conv in enumerate(convs, start=1):
            residual = conv(use_bias=False, dtype=self.dtype, name=f"conv{j}")(residual)
            residual = norm(name=f"norm{j}")(residual, train=train)
            residual = nn.relu(residual) if j < len(convs) else residual
        shortcut, channels = x, residual.shape[-1]
        if self.stride > 1 or x.shape[-1] != channels:
            conv = functools.partial(Conv1x1, channels, strides=self.stride, dtype=self.dtype)
            shortcut = conv(use_bias=False, name="shortcut_conv")(x)
            shortcut = norm(name="shortcut_norm")(shortcut, train=train)
        return nn.relu(residual + shortcut)

    def _convolutions(self) -> list[functools.partial[nn.Conv]]:
        strided = functools.partial(Conv3x3, self.features, strides=self.stride)
        if not self.bottleneck:
            return [strided, functools.partial(Conv3x3, self.features)]
        narrow = functools.partial(Conv1x1, self.features)
        return [narrow, strided, functools.partial(Conv1x1, EXPANSION * self.features)]


class Stage(nn.Module):
    """Residual blocks, of which the first is strided, after the stem in the first stage.

    Attributes:
      features: number of channels of the blocks' 3x3 convolutions.
      num_blocks: number of blocks.
      stride: stride of the first block.
      bottleneck: whether the blocks are bottleneck blocks.
      stem: kind of the stem in the first stage, "cifar" or "imagenet"; None in later stages.
      dtype: type of the convolutions; None for that of their parameters.
      norm_groups: see `BatchNorm.groups`.
    """

    features: int
    num_blocks: int
    stride: int
    bottleneck: bool
    stem: str | None = None
    dtype: str | None = None
    norm_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height', width', channels']`."""
        how = self.dtype, self.norm_groups
        if self.stem is not None:
            x = Stem(self.features, self.stem, *how, name="stem")(x, train=train)
        for j in range(self.num_blocks):
            stride = 1 if j else self.stride
            block = ResidualBlock(
                self.features, stride, self.bottleneck, *how, name=f"residual{j + 1}"
            )
            x = block(x, train=train)
        return x


class SeparableConv(nn.Module):
    """Two depthwise-pointwise pairs: the first is strided, the second changes the channels.

        3x3 depthwise/stride, 1x1, BatchNorm, ReLU, 3x3 depthwise, 1x1, BatchNorm, ReLU

    Attributes:
      features: number of output channels.
      stride: stride of the first depthwise convolution.
      dtype: type of the convolutions; None for that of their parameters.
      norm_groups: see `BatchNorm.groups`.
    """

    features: int
    stride: int = 2
    dtype: str | None = None
    norm_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height', width', features]`."""
        channels = x.shape[-1]
        depthwise, pointwise = (
            functools.partial(conv, use_bias=False, dtype=self.dtype) for conv in (Conv3x3, Conv1x1)
        )
        depthwise = functools.partial(depthwise, channels, feature_group_count=channels)
        norm = functools.partial(BatchNorm, groups=self.norm_groups)
        for j, (features, stride) in enumerate([(channels, self.stride), (self.features, 1)], 1):
            x = depthwise(strides=stride, name=f"depthwise{j}")(x)
            x = pointwise(features, name=f"pointwise{j}")(x)
            x = nn.relu(norm(name=f"norm{j}")(x, train=train))
        return x


class AttentionGate(nn.Module):
    """Multiplies a feature by a mask computed from it at half the resolution.

        x * sigmoid(upsample(relu(norm(separable(x)))))

    The mask is resized bilinearly with half-pixel centres to the feature's size, which is twice the
    mask's if the feature's sides are even.

    Attributes:
      dtype: type of the convolutions; None for that of their parameters.
      norm_groups: see `BatchNorm.groups`.
    """

    dtype: str | None = None
    norm_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Gates `x` `[batch, height, width, channels]`."""
        how = {"dtype": self.dtype, "norm_groups": self.norm_groups}
        mask = SeparableConv(x.shape[-1], **how, name="separable")(x, train=train)
        mask = nn.relu(BatchNorm(groups=self.norm_groups, name="norm")(mask, train=train))
        return x * nn.sigmoid(upsample_bilinear(mask, *x.shape[1:3]))


class AttentionHead(nn.Module):
    """Early classifier: attention gate, separable convolutions, pooled linear classifier.

    Each separable convolution halves the sides and doubles the channels, as a stage does.

    Attributes:
      num_classes: number of classes, the width of the logits.
      num_reductions: number of separable convolutions, one for each stage after the exit.
      adapt: whether the head has an adaptation layer.
      dtype: type of the convolutions; None for that of their parameters.
      norm_groups: see `BatchNorm.groups`.
    """

    num_classes: int
    num_reductions: int
    adapt: bool = False
    dtype: str | None = None
    norm_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> HeadOutput:
        """Classifies `x` `[batch, height, width, channels]`."""
        how = {"dtype": self.dtype, "norm_groups": self.norm_groups}
        x = AttentionGate(**how, name="gate")(x, train=train)
        for j in range(1, self.num_reductions + 1):
            x = SeparableConv(2 * x.shape[-1], **how, name=f"reduction{j}")(x, train=train)
        width = x.shape[-1] if self.adapt else None
        return PooledLinearHead(self.num_classes, adapted_width=width, name="pooled")(x)


class ResNet(ConvolutionalModel):
    """ResNet: a stem and stages of residual blocks, with an exit after each stage.

    Stage s, from 0, has 2^s times `width` channels (times `EXPANSION` at the ends of bottleneck
    blocks); every stage but the first halves the map. The forked feature is the output of a stage's
    last ReLU.

    Attributes:
      width: number of channels of the first stage's 3x3 convolutions.
      stem: kind of the stem: "cifar" (3x3, keeps the size) or "imagenet" (7x7/2, max-pool/2).
      stage_sizes: number of residual blocks in each stage.
      bottleneck: whether the blocks are bottleneck blocks.

    Raises:
      UserError: a width that is not a positive whole number, an unknown stem, or (when called)
        images too small for the number of stages.

    Reference: He et al., CVPR 2016, with the stride of a bottleneck block on its 3x3; heads as in
    Zhang et al., "SCAN", NeurIPS 2019, and Gong et al., ECCV 2024.

    Example:
      >>> ResNet18(num_classes=100).num_exits
      4
    """

    width: int = 64
    stem: str = "cifar"
    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False

    def __post_init__(self):
        check_whole("width", self.width)
        if self.stem not in STEM_HALVINGS:
            known = ", ".join(STEM_HALVINGS)
            raise UserError(f"stem must be one of {known}, got {self.stem!r}")
        super().__post_init__()

    @property
    def num_exits(self) -> int:
        return len(self.stage_sizes)

    def setup(self):
        last = self.num_exits - 1
        how = {"dtype": self.dtype, "norm_groups": self.batch_norm_groups}
        for i, size in enumerate(self.stage_sizes):
            stage = Stage(
                features=self.width * 2**i,
                num_blocks=size,
                stride=2 if i else 1,
                bottleneck=self.bottleneck,
                stem=None if i else self.stem,
                **how,
            )
            head = (
                AttentionHead(self.num_classes, last - i, self.adapt_features, **how)
                if i < last
                else PooledLinearHead(self.num_classes)
            )
            setattr(self, f"block{i + 1}", stage)
            setattr(self, f"head{i + 1}", head)

    def block(self, i: int, carry: jax.Array, *, train: bool) -> jax.Array:
        if i == 0:
            self._check_size(carry.shape)
        return getattr(self, f"block{i + 1}")(carry, train=train)

    def head(self, i: int, x: jax.Array, *, train: bool) -> HeadOutput:
        return getattr(self, f"head{i + 1}")(x, train=train)

    def _check_size(self, shape: tuple[int, ...]) -> None:
        halvings = STEM_HALVINGS[self.stem] + self.num_exits - 1
        if min(shape[1:3]) < 2**halvings:
            raise UserError(
                f"images of {shape[1]}x{shape[2]} are too small for a ResNet with the "
                f"{self.stem} stem, which halves them {halvings} times: each side needs at least "
                f"{2**halvings} pixels"
            )


ResNet18 = functools.partial(ResNet, stage_sizes=(2, 2, 2, 2))
ResNet34 = functools.partial(ResNet, stage_sizes=(3, 4, 6, 3))
ResNet50 = functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), bottleneck=True)
ResNet101 = functools.partial(ResNet, stage_sizes=(3, 4, 23, 3), bottleneck=True)
ResNet152 = functools.partial(ResNet, stage_sizes=(3, 8, 36, 3), bottleneck=True)
