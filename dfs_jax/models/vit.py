"""Vision transformer with exits after its later encoder layers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfs_jax.models.contract import MultiExitModel
from dfs_jax.surgery import LiveChannels
from dfs_jax.types import HeadOutput, UserError, check_whole

POOLS = ("class", "mean")
MLP_RATIO = 4

_init = nn.initializers.truncated_normal(0.02)
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)
Dense = functools.partial(nn.Dense, kernel_init=_init)


class Embedding(nn.Module):
    """Patches as tokens, a class token before them, and a trained vector for each position.

        [class, conv(patch 1), ..., conv(patch n)] + position

    Attributes:
      width: of a token.
      patch_size: side of a patch in pixels.
    """

    width: int
    patch_size: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images `[batch, height, width, 3]` to tokens `[batch, 1 + patches, width]`.

        Raises:
          UserError: patches do not fill the images, or the images are not of the size that the
            position embedding was made for.
        """
        self._check_size(images.shape)
        size = (self.patch_size, self.patch_size)
        patches = nn.Conv(self.width, size, strides=size, padding="VALID", name="patches")(images)
        patches = patches.reshape(len(images), -1, self.width)
        first = self.param("class_token", nn.initializers.normal(1e-6), (1, 1, self.width))
        first = jnp.broadcast_to(first, (len(images), 1, self.width))
        tokens = jnp.concatenate([first, patches], axis=1)
        return tokens + self.param("position", _init, (1, *tokens.shape[1:]))

    def _check_size(self, shape: tuple[int, ...]) -> None:
        _, height, width, _ = shape
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"images of {height}x{width} cannot be cut into patches of {self.patch_size}x"
                f"{self.patch_size}: choose a patch_size that divides both sides"
            )
        count = (height // self.patch_size) * (width // self.patch_size)
        if self.has_variable("params", "position"):
            known = self.get_variable("params", "position").shape[1] - 1
            if known != count:
                raise UserError(
                    f"images of {height}x{width} make {count} patches, but these weights hold "
                    f"positions for {known}: give images of the size they were trained on"
                )


class SelfAttention(nn.Module):
    """Multi-head self-attention; one linear layer makes queries, keys and values, in this order.

    Attributes:
      heads: among which the width is split.
      dropout: rate after the output's linear layer.
    """

    heads: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `x` `[batch, tokens, width]` to the same shape."""
        batch, tokens, width = x.shape
        qkv = Dense(3 * width, name="qkv")(x)
        qkv = qkv.reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = jnp.unstack(qkv, axis=2)
        mixed = nn.dot_product_attention(query, key, value)
        output = Dense(width, name="output")(mixed.reshape(x.shape))
        return nn.Dropout(self.dropout, deterministic=not train)(output)


class EncoderLayer(nn.Module):
    """Pre-norm encoder layer: `x += attention(norm(x))`, then `x += mlp(norm(x))`.

    The MLP is two linear layers with an exact GELU between them, `MLP_RATIO` times as wide inside.

    Attributes:
      heads: of the attention.
      dropout: rate after the attention and after the MLP.
    """

    heads: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `x` `[batch, tokens, width]` to the same shape."""
        attention = SelfAttention(self.heads, self.dropout, name="attention")
        x = x + attention(LayerNorm(name="norm1")(x), train=train)
        inner = Dense(MLP_RATIO * x.shape[-1], name="mlp1")(LayerNorm(name="norm2")(x))
        outer = Dense(x.shape[-1], name="mlp2")(nn.gelu(inner, approximate=False))
        return x + nn.Dropout(self.dropout, deterministic=not train)(outer)


class EncoderBlock(nn.Module):
    """The encoder layers up to an exit; the first block begins with the embedding.

    Attributes:
      layers: their labels, counted from 1 through the whole network.
      width: of a token.
      heads: of the attention.
      dropout: see `EncoderLayer`.
      patch_size: of the embedding; None in later blocks, which have none.
    """

    layers: tuple[int, ...]
    width: int
    heads: int
    dropout: float = 0.0
    patch_size: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images, in the first block, or tokens to tokens `[batch, tokens, width]`."""
        if self.patch_size is not None:
            x = Embedding(self.width, self.patch_size, name="embedding")(x)
        for label in self.layers:
            x = EncoderLayer(self.heads, self.dropout, name=f"layer{label}")(x, train=train)
        return x


class TokenHead(nn.Module):
    """LayerNorm, then the class token or the mean of the patches' tokens, then a linear classifier.

    Attributes:
      num_classes: width of the logits.
      pool: "class" or "mean".
      adapted_width: width of the adapted feature; None for no adaptation layer.
    """

    num_classes: int
    pool: str = "class"
    adapted_width: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> HeadOutput:
        """Classifies tokens `[batch, tokens, width]`, the class token first."""
        x = LayerNorm(name="norm")(x)
        pooled = x[:, 0] if self.pool == "class" else x[:, 1:].mean(1)
        logits = Dense(self.num_classes, name="classifier")(pooled)
        if self.adapted_width is None:
            return HeadOutput(logits, pooled)
        return HeadOutput(logits, nn.Dense(self.adapted_width, name="adaptation")(pooled))


class ViT(MultiExitModel):
    """Vision transformer: exits after encoder layers `first_exit_layer`, ..., `depth`.

    The tokens are forked along their width. Between a fork and the linear layers that read it
    stands a LayerNorm, whose statistics, and trained scale, need the whole gradient: here Deep
    Feature Surgery separates the gradients of exits, but saves no work in the backward pass.

    The position embedding has one vector for each patch and the class token, so weights belong to
    one image size and are refused with another.

    Attributes:
      width: of a token.
      heads: of the attention; they divide the width.
      depth: encoder layers.
      patch_size: side of a patch in pixels; it divides the images' sides.
      first_exit_layer: the encoder layer after which the first exit stands, counted from 1.
      pool: what classifiers read: the "class" token, or the "mean" of the patches' tokens.
      dropout: rate after each attention and MLP, in training.

    Raises:
      UserError: an argument is out of range or does not fit another, or (when called) images that
        do not fit the patches or the weights.

    Reference: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; exits as in Gong et
    al., ECCV 2024.

    Example:
      >>> ViTTiny(num_classes=1000).num_exits
      7
    """

    width: int = 192
    heads: int = 3
    depth: int = 12
    patch_size: int = 16
    first_exit_layer: int = 6
    pool: str = "class"
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("width", "heads", "depth", "patch_size"):
            check_whole(name, getattr(self, name))
        if self.width % self.heads:
            raise UserError(
                f"a width of {self.width} cannot be split evenly among {self.heads} heads: "
                f"choose a width that is a multiple of heads"
            )
        if self.first_exit_layer not in range(1, self.depth + 1):
            raise UserError(
                f"first_exit_layer must be one of the {self.depth} encoder layers, counted from 1, "
                f"got {self.first_exit_layer!r}"
            )
        if self.pool not in POOLS:
            raise UserError(f"pool must be one of {', '.join(POOLS)}, got {self.pool!r}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must lie in [0, 1), got {self.dropout!r}")
        super().__post_init__()

    @property
    def num_exits(self) -> int:
        return self.depth - self.first_exit_layer + 1

    def layers_of_block(self, i: int) -> tuple[int, ...]:
        """Returns the labels of the encoder layers in block i (0-based), counted from 1."""
        last = self.first_exit_layer + i
        return (last,) if i else tuple(range(1, last + 1))

    def setup(self):
        last = self.num_exits - 1
        for i in range(self.num_exits):
            block = EncoderBlock(
                self.layers_of_block(i),
                self.width,
                self.heads,
                self.dropout,
                patch_size=None if i else self.patch_size,
            )
            adapted = self.width if self.adapt_features and i < last else None
            setattr(self, f"block{i + 1}", block)
            setattr(self, f"head{i + 1}", TokenHead(self.num_classes, self.pool, adapted))

    def block(
        self, i: int, carry: jax.Array, live: LiveChannels = None, *, train: bool
    ) -> jax.Array:
        del live  # LayerNorm comes first, and its gradient needs every channel
        return getattr(self, f"block{i + 1}")(carry, train=train)

    def head(self, i: int, x: jax.Array, live: LiveChannels = None, *, train: bool) -> HeadOutput:
        del live, train  # as in `block`; no dropout here
        return getattr(self, f"head{i + 1}")(x)


ViTTiny = functools.partial(ViT, width=192, heads=3)
ViTSmall = functools.partial(ViT, width=384, heads=6)
ViTBase = functools.partial(ViT, width=768, heads=12)
