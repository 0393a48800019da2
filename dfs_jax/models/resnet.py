"""ResNet with an exit after every stage; early exits have an attention gate."""

from __future__ import annotations

import functools

import jax
from flax import linen as nn

from dfs_jax.layers import (
    Conv1x1,
    Conv3x3,
    conv_init,
    stem_pool,
    upsample_bilinear,
)
from dfs_jax.models.contract import ConvolutionalModel
from dfs_jax.models.heads import PooledLinearHead
from dfs_jax.partitioned import Execution
from dfs_jax.surgery import LiveChannels
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
      execution: how the layers run.
    """

    features: int
    kind: str
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images `[batch, height, width, 3]` to `[batch, height', width', features]`."""
        if self.kind == "cifar":
            conv = Conv3x3(
                self.features,
                use_bias=False,
                dtype=self.execution.dtype,
                conv_general_dilated=self.execution.conv(),
                name="conv",
            )
            return nn.relu(self.execution.batch_norm("norm")(conv(x), train=train))
        conv = nn.Conv(
            self.features,
            (7, 7),
            2,
            padding=3,
            use_bias=False,
            dtype=self.execution.dtype,
            kernel_init=conv_init,
            name="conv",
        )
        x = nn.relu(self.execution.batch_norm("norm")(conv(x), train=train))
        return stem_pool(x)


class ResidualBlock(nn.Module):
    """Residual block: relu(residual(x) + shortcut(x)); both read the same, possibly forked, x.

        basic       3x3/stride, 3x3
        bottleneck  1x1, 3x3/stride, 1x1 to `EXPANSION` times the channels

    BatchNorm follows every convolution, and ReLU stands between them. The shortcut is a 1x1/stride
    convolution and BatchNorm where the shape changes, and the identity elsewhere.

    Attributes:
      features: number of channels of the 3x3 convolutions.
      stride: stride of the block.
      bottleneck: whether the block is a bottleneck block rather than a basic one.
      execution: how the layers run.
    """

    features: int
    stride: int = 1
    bottleneck: bool = False
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array, live: LiveChannels = None, *, train: bool) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height', width', channels']`."""
        residual, convs = x, self._convolutions()
        for j, conv in enumerate(convs, start=1):
            convolve = self.execution.conv(None if j > 1 else live)
            conv = conv(use_bias=False, conv_general_dilated=convolve, name=f"conv{j}")
            residual = self.execution.batch_norm(f"norm{j}")(conv(residual), train=train)
            residual = nn.relu(residual) if j < len(convs) else residual
        return nn.relu(residual + self._shortcut(x, live, residual.shape[-1], train=train))

    def _convolutions(self) -> list[functools.partial[nn.Conv]]:
        conv1x1, conv3x3 = (
            functools.partial(conv, dtype=self.execution.dtype) for conv in (Conv1x1, Conv3x3)
        )
        strided = functools.partial(conv3x3, self.features, strides=self.stride)
        if not self.bottleneck:
            return [strided, functools.partial(conv3x3, self.features)]
        narrow = functools.partial(conv1x1, self.features)
        return [narrow, strided, functools.partial(conv1x1, EXPANSION * self.features)]

    def _shortcut(
        self, x: jax.Array, live: LiveChannels, channels: int, *, train: bool
    ) -> jax.Array:
        if self.stride == 1 and x.shape[-1] == channels:
            return x
        conv = Conv1x1(
            channels,
            strides=self.stride,
            use_bias=False,
            dtype=self.execution.dtype,
            conv_general_dilated=self.execution.conv(live),
            name="shortcut_conv",
        )
        return self.execution.batch_norm("shortcut_norm")(conv(x), train=train)


class Stage(nn.Module):
    """Residual blocks, of which the first is strided, after the stem in the first stage.

    Attributes:
      features: number of channels of the blocks' 3x3 convolutions.
      num_blocks: number of blocks.
      stride: stride of the first block.
      bottleneck: whether the blocks are bottleneck blocks.
      stem: kind of the stem in the first stage, "cifar" or "imagenet"; None in later stages.
      execution: how the layers run.
    """

    features: int
    num_blocks: int
    stride: int
    bottleneck: bool
    stem: str | None = None
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array, live: LiveChannels = None, *, train: bool) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height', width', channels']`."""
        if self.stem is not None:
            x = Stem(self.features, self.stem, self.execution, name="stem")(x, train=train)
        for j in range(self.num_blocks):
            block = ResidualBlock(
                self.features,
                1 if j else self.stride,
                self.bottleneck,
                self.execution,
                name=f"residual{j + 1}",
            )
            x = block(x, None if j else live, train=train)
        return x


class SeparableConv(nn.Module):
    """Two depthwise-pointwise pairs: the first is strided, the second changes the channels.

        3x3 depthwise/stride, 1x1, BatchNorm, ReLU, 3x3 depthwise, 1x1, BatchNorm, ReLU

    Attributes:
      features: number of output channels.
      stride: stride of the first depthwise convolution.
      execution: how the layers run.
    """

    features: int
    stride: int = 2
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height', width', features]`."""
        channels = x.shape[-1]
        execution = self.execution
        options = {
            "use_bias": False,
            "dtype": execution.dtype,
            "conv_general_dilated": execution.conv(),
        }
        depthwise = functools.partial(Conv3x3, channels, feature_group_count=channels, **options)
        for j, (features, stride) in enumerate([(channels, self.stride), (self.features, 1)], 1):
            x = depthwise(strides=stride, name=f"depthwise{j}")(x)
            x = Conv1x1(features, name=f"pointwise{j}", **options)(x)
            x = nn.relu(execution.batch_norm(f"norm{j}")(x, train=train))
        return x


class AttentionGate(nn.Module):
    """Multiplies a feature by a mask computed from it at half the resolution.

        x * sigmoid(upsample(relu(norm(separable(x)))))

    The mask is resized bilinearly with half-pixel centres to the feature's size, which is twice the
    mask's if the feature's sides are even.

    Attributes:
      execution: how the layers run.
    """

    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Gates `x` `[batch, height, width, channels]`."""
        separable = SeparableConv(x.shape[-1], execution=self.execution, name="separable")
        mask = separable(x, train=train)
        mask = nn.relu(self.execution.batch_norm("norm")(mask, train=train))
        return x * nn.sigmoid(upsample_bilinear(mask, *x.shape[1:3]))


class AttentionHead(nn.Module):
    """Early classifier: attention gate, separable convolutions, pooled linear classifier.

    Each separable convolution halves the sides and doubles the channels, as a stage does.

    Attributes:
      num_classes: number of classes, the width of the logits.
      num_reductions: number of separable convolutions, one for each stage after the exit.
      adapt: whether the head has an adaptation layer.
      execution: how the layers run.
    """

    num_classes: int
    num_reductions: int
    adapt: bool = False
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array, live: LiveChannels = None, *, train: bool) -> HeadOutput:
        """Classifies `x` `[batch, height, width, channels]`."""
        del live  # the first convolution is depthwise, which has nothing to skip
        execution = self.execution
        x = AttentionGate(execution, name="gate")(x, train=train)
        for j in range(1, self.num_reductions + 1):
            reduction = SeparableConv(2 * x.shape[-1], execution=execution, name=f"reduction{j}")
            x = reduction(x, train=train)
        width = x.shape[-1] if self.adapt else None
        pooled = PooledLinearHead(
            self.num_classes, adapted_width=width, execution=execution, name="pooled"
        )
        return pooled(x)


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
        for i, size in enumerate(self.stage_sizes):
            stage = Stage(
                features=self.width * 2**i,
                num_blocks=size,
                stride=2 if i else 1,
                bottleneck=self.bottleneck,
                stem=None if i else self.stem,
                execution=self.execution,
            )
            head = (
                AttentionHead(self.num_classes, last - i, self.adapt_features, self.execution)
                if i < last
                else PooledLinearHead(self.num_classes, execution=self.execution)
            )
            setattr(self, f"block{i + 1}", stage)
            setattr(self, f"head{i + 1}", head)

    def block(
        self, i: int, carry: jax.Array, live: LiveChannels = None, *, train: bool
    ) -> jax.Array:
        if i == 0:
            self._check_size(carry.shape)
        return getattr(self, f"block{i + 1}")(carry, live, train=train)

    def head(self, i: int, x: jax.Array, live: LiveChannels = None, *, train: bool) -> HeadOutput:
        head = getattr(self, f"head{i + 1}")
        return head(x, live, train=train) if i < self.num_exits - 1 else head(x, live)

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
