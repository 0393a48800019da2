"""EfficientNet-Lite0 with exits after some of its blocks."""

from __future__ import annotations

import functools

import jax
from flax import linen as nn

from dfs_jax.layers import ConvNorm
from dfs_jax.models.contract import ConvolutionalModel
from dfs_jax.models.heads import PooledLinearHead
from dfs_jax.types import HeadOutput, UserError, check_whole

# Output channels at width 32, stride, side of the depthwise kernel and expansion of each block.
BLOCKS = (
    (16, 1, 3, 1),
    *((24, stride, 3, 6) for stride in (2, 1)),
    *((40, stride, 5, 6) for stride in (2, 1)),
    *((80, stride, 3, 6) for stride in (2, 1, 1)),
    *((112, 1, 5, 6) for _ in range(3)),
    *((192, stride, 5, 6) for stride in (2, 1, 1, 1)),
    (320, 1, 3, 6),
)
STEM, TOP = 32, 1280  # channels of the first and of the last convolution
# As in TensorFlow, where the weights come from.
Conv = functools.partial(
    ConvNorm, kernel=1, padding="SAME", activation=nn.relu6, momentum=0.99, epsilon=1e-3
)


class InvertedBlock(nn.Module):
    """Inverted bottleneck: 1x1 that widens, depthwise/stride, 1x1 that narrows; a residual sum.

    The sum is there if the block keeps the shape; the first convolution, if it widens.

    Attributes:
      features: number of output channels.
      stride: stride of the depthwise convolution.
      kernel: side of its kernel.
      expansion: channels of the depthwise convolution, in multiples of the input's.
      dtype: type of the convolutions; None for that of their parameters.
      norm_groups: see `BatchNorm.groups`.
    """

    features: int
    stride: int
    kernel: int
    expansion: int
    dtype: str | None = None
    norm_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height', width', features]`."""
        conv = functools.partial(Conv, dtype=self.dtype, norm_groups=self.norm_groups)
        y, wide = x, self.expansion * x.shape[-1]
        if self.expansion > 1:
            y = conv(wide, name="expand")(y, train=train)
        depthwise = conv(
            wide, kernel=self.kernel, stride=self.stride, depthwise=True, name="depthwise"
        )
        y = depthwise(y, train=train)
        y = conv(self.features, activation=None, name="project")(y, train=train)
        return x + y if y.shape == x.shape else y


class Segment(nn.Module):
    """The blocks between two exits; the first segment begins with the stem.

    Attributes:
      blocks: number, channels, stride, kernel and expansion of each block.
      stem: number of channels of the stem, a 3x3/2 convolution; None in later segments.
      top: number of channels of the last 1x1 convolution; None in earlier segments.
      dtype: type of the convolutions; None for that of their parameters.
      norm_groups: see `BatchNorm.groups`.
    """

    blocks: tuple[tuple[int, ...], ...]
    stem: int | None = None
    top: int | None = None
    dtype: str | None = None
    norm_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height', width', features]`."""
        how = {"dtype": self.dtype, "norm_groups": self.norm_groups}
        if self.stem is not None:
            x = Conv(self.stem, kernel=3, stride=2, **how, name="stem")(x, train=train)
        for number, features, stride, kernel, expansion in self.blocks:
            block = InvertedBlock(features, stride, kernel, expansion, **how, name=f"layer{number}")
            x = block(x, train=train)
        if self.top is not None:
            x = Conv(self.top, **how, name="top")(x, train=train)
        return x


class WideHead(nn.Module):
    """Early classifier: a 1x1 convolution that widens, as before the last exit, and a linear one.

    Attributes:
      num_classes: number of classes, the width of the logits.
      width: number of channels of the convolution.
      adapted_width: width of the adapted feature; None for no adaptation layer.
      dtype: type of the convolution; None for that of its parameters.
      norm_groups: see `BatchNorm.groups`.
    """

    num_classes: int
    width: int
    adapted_width: int | None = None
    dtype: str | None = None
    norm_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> HeadOutput:
        """Classifies `x` `[batch, height, width, channels]`."""
        wide = Conv(self.width, dtype=self.dtype, norm_groups=self.norm_groups, name="widen")
        x = wide(x, train=train)
        pooled = PooledLinearHead(self.num_classes, adapted_width=self.adapted_width, name="pooled")
        return pooled(x)


class EfficientNetLite(ConvolutionalModel):
    """EfficientNet-Lite0: sixteen inverted bottleneck blocks without squeeze-and-excitation.

    The last exit follows a 1x1 convolution to 1,280 channels. Images are normalised to
    (x - 127) / 128 (`data.statistics=efficientnet_lite`).

    Attributes:
      exits: blocks that an early exit follows, counted from 1, in rising order.
      width: number of channels of the stem; others are in proportion.
      head_width: number of channels of the convolution in early heads.
      head_dropout: dropout rate before the last classifier.

    Raises:
      UserError: blocks that do not exist or do not rise.

    Reference: Tan and Le, "EfficientNet", ICML 2019, and the Lite variants of 2020.

    Example:
      >>> EfficientNetLite(num_classes=1000, exits=(5, 11)).num_exits
      3
    """

    exits: tuple[int, ...] = (5, 8, 11)
    width: int = STEM
    head_width: int = 512
    head_dropout: float = 0.2

    def __post_init__(self):
        self.exits = tuple(self.exits)
        check_whole("width", self.width)
        check_whole("head_width", self.head_width)
        known = range(1, len(BLOCKS))
        if not self.exits or list(self.exits) != [k for k in known if k in self.exits]:
            raise UserError(
                f"exits must be some of the blocks 1 to {len(BLOCKS) - 1} in rising order, such as "
                f"(5, 8, 11), got {self.exits!r}"
            )
        super().__post_init__()

    @property
    def num_exits(self) -> int:
        return len(self.exits) + 1

    def setup(self):
        how = {"dtype": self.dtype, "norm_groups": self.batch_norm_groups}
        top, start = self._scaled(TOP), 0
        for i, end in enumerate((*self.exits, len(BLOCKS))):
            is_last = i == len(self.exits)
            blocks = tuple(
                (k + 1, self._scaled(features), *shape)
                for k, (features, *shape) in enumerate(BLOCKS[start:end], start)
            )
            segment = Segment(
                blocks,
                stem=self.width if i == 0 else None,
                top=top if is_last else None,
                **how,
            )
            head: nn.Module
            if is_last:
                head = PooledLinearHead(self.num_classes, dropout=self.head_dropout)
            else:
                adapted = top if self.adapt_features else None
                head = WideHead(self.num_classes, self.head_width, adapted, **how)
            setattr(self, f"block{i + 1}", segment)
            setattr(self, f"head{i + 1}", head)
            start = end

    def block(self, i: int, carry: jax.Array, *, train: bool) -> jax.Array:
        return getattr(self, f"block{i + 1}")(carry, train=train)

    def head(self, i: int, x: jax.Array, *, train: bool) -> HeadOutput:
        return getattr(self, f"head{i + 1}")(x, train=train)

    def _scaled(self, channels: int) -> int:
        return max(1, round(channels * self.width / STEM))
