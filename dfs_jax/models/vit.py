"""Vision transformer with exits after its later encoder layers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax.sharding import PartitionSpec

from dfs_jax.models.contract import TENSOR_AXIS, MultiExitModel
from dfs_jax.types import HeadOutput, UserError, check_whole

POOLS = ("class", "mean")
MLP_RATIO = 4

_init = nn.initializers.truncated_normal(0.02)
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)
Dense = functools.partial(nn.Dense, kernel_init=_init)


class Embedding(nn.Module):
    """Embeds an image: a class token and one token for each patch, with trained positions.

        [class, conv(patch 1), ..., conv(patch n)] + position

    Attributes:
      width: width of a token.
      patch_size: side of a patch in pixels.
      dtype: type of the tokens; None for that of the parameters.
    """

    width: int
    patch_size: int
    dtype: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images `[batch, height, width, 3]` to tokens `[batch, 1 + patches, width]`.

        Raises:
          UserError: a patch size that does not divide the images' sides, or images of another size
            than the position embedding's.
        """
        self._check_size(images.shape)
        size = (self.patch_size, self.patch_size)
        cut = nn.Conv(
            self.width, size, strides=size, padding="VALID", dtype=self.dtype, name="patches"
        )
        patches = cut(images).reshape(images.shape[0], -1, self.width)
        first = self.param("class_token", nn.initializers.normal(1e-6), (1, 1, self.width))
        first = jnp.broadcast_to(first, (images.shape[0], 1, self.width))
        tokens = jnp.concatenate([first, patches], axis=1)
        tokens = tokens + self.param("position", _init, (1, *tokens.shape[1:]))
        return tokens.astype(patches.dtype)

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


class QueryKeyValue(nn.Module):
    """Linear layer for the queries, keys and values of every head, in this order.

    Its kernel is `[width, 3 * width]`. Devices along `TENSOR_AXIS` each compute some of the heads.

    Attributes:
      heads: number of heads that the width is split into.
      dtype: type of the computation; None for that of the parameters.
    """

    heads: int
    dtype: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` `[batch, tokens, width]` to `[batch, tokens, 3, heads, width / heads]`."""
        width = x.shape[-1]
        kernel = self.param("kernel", _init, (width, 3 * width))
        bias = self.param("bias", nn.initializers.zeros_init(), (3 * width,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        shape = (3, self.heads, width // self.heads)
        by_head = _split_heads(kernel.reshape(width, *shape))
        return jnp.einsum("btw,wchd->btchd", x, by_head) + bias.reshape(shape)


def _split_heads(kernel: jax.Array) -> jax.Array:
    """Shards `[width, 3, heads, size]` by heads over the devices along `TENSOR_AXIS`."""
    parts = jax.sharding.get_abstract_mesh().shape.get(TENSOR_AXIS, 1)
    if parts == 1:
        return kernel
    if kernel.shape[2] % parts:
        raise UserError(
            f"{kernel.shape[2]} heads cannot be split over {TENSOR_AXIS}={parts} devices: choose a "
            f"divisor of the heads"
        )
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec(None, None, TENSOR_AXIS))


class SelfAttention(nn.Module):
    """Multi-head self-attention, with a softmax in float32 or wider.

    Attributes:
      heads: number of heads that the width is split into.
      dropout: dropout rate after the output's linear layer.
      dtype: type of the computation; None for that of the parameters.
    """

    heads: int
    dropout: float = 0.0
    dtype: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `x` `[batch, tokens, width]` to the same shape."""
        qkv = QueryKeyValue(self.heads, self.dtype, name="qkv")(x)
        query, key, value = jnp.unstack(qkv, axis=2)
        weights = nn.dot_product_attention_weights(
            query, key, force_fp32_for_softmax=query.dtype == jnp.bfloat16
        )
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)
        output = Dense(x.shape[-1], dtype=self.dtype, name="output")(mixed.reshape(x.shape))
        return nn.Dropout(self.dropout, deterministic=not train)(output)


class EncoderLayer(nn.Module):
    """Pre-norm encoder layer: `x += attention(norm(x))`, then `x += mlp(norm(x))`.

    The MLP is two linear layers with an exact GELU between them, `MLP_RATIO` times as wide inside.

    Attributes:
      heads: number of attention heads.
      dropout: dropout rate after the attention and after the MLP.
      dtype: type of the computation; None for that of the parameters.
    """

    heads: int
    dropout: float = 0.0
    dtype: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `x` `[batch, tokens, width]` to the same shape."""
        norm, dense = (functools.partial(layer, dtype=self.dtype) for layer in (LayerNorm, Dense))
        attention = SelfAttention(self.heads, self.dropout, self.dtype, name="attention")
        x = x + attention(norm(name="norm1")(x), train=train)
        inner = dense(MLP_RATIO * x.shape[-1], name="mlp1")(norm(name="norm2")(x))
        outer = dense(x.shape[-1], name="mlp2")(nn.gelu(inner, approximate=False))
        return x + nn.Dropout(self.dropout, deterministic=not train)(outer)


class EncoderBlock(nn.Module):
    """Encoder layers up to an exit; the first block starts with the embedding.

    Attributes:
      layers: numbers of the layers, counted from 1 through the whole network.
      width: width of a token.
      heads: number of attention heads.
      dropout: dropout rate, see `EncoderLayer`.
      patch_size: side of a patch in pixels in the first block; None in later ones, which have no
        embedding.
      dtype: type of the computation; None for that of the parameters.
    """

    layers: tuple[int, ...]
    width: int
    heads: int
    dropout: float = 0.0
    patch_size: int | None = None
    dtype: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images (first block) or tokens to tokens `[batch, tokens, width]`."""
        if self.patch_size is not None:
            x = Embedding(self.width, self.patch_size, self.dtype, name="embedding")(x)
        for label in self.layers:
            layer = EncoderLayer(self.heads, self.dropout, self.dtype, name=f"layer{label}")
            x = layer(x, train=train)
        return x


class TokenHead(nn.Module):
    """LayerNorm, the class token or the mean of the patches' tokens, and a linear classifier.

    It computes in float32 or wider, whatever the type of the tokens.

    Attributes:
      num_classes: number of classes, the width of the logits.
      pool: token that the classifier reads: the "class" token, or the "mean" of the others.
      adapted_width: width of the adapted feature; None for no adaptation layer.
    """

    num_classes: int
    pool: str = "class"
    adapted_width: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> HeadOutput:
        """Classifies tokens `[batch, tokens, width]`, the class token first."""
        x = LayerNorm(name="norm")(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        pooled = x[:, 0] if self.pool == "class" else x[:, 1:].mean(1)
        logits = Dense(self.num_classes, name="classifier")(pooled)
        if self.adapted_width is None:
            return HeadOutput(logits, pooled)
        return HeadOutput(logits, nn.Dense(self.adapted_width, name="adaptation")(pooled))


class ViT(MultiExitModel):
    """Vision transformer with exits after encoder layers `first_exit_layer`, ..., `depth`.

    The tokens are forked along their width. A LayerNorm lies between a fork and the linear layers
    that read it, and its statistics and trained scale need the whole gradient. Deep Feature Surgery
    therefore separates the exits' gradients here, but saves no work in the backward pass.

    The position embedding has one vector for each patch and for the class token, so that weights
    belong to one image size and are refused with another.

    Attributes:
      width: width of a token.
      heads: number of attention heads, a divisor of the width.
      depth: number of encoder layers.
      patch_size: side of a patch in pixels, a divisor of the images' sides.
      first_exit_layer: encoder layer that the first exit follows, counted from 1.
      pool: token that classifiers read: the "class" token, or the "mean" of the others.
      dropout: dropout rate after each attention and MLP.
      dtype: type in which blocks compute, such as "bfloat16"; None for that of the parameters.
        Parameters, softmax and classifiers stay float32.

    Raises:
      UserError: an argument out of range, arguments that do not fit together, or (when called)
        images that do not fit the patches or the weights.

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
    dtype: str | None = None

    # Attention is split by heads and the MLP by its inner units. One kernel holds queries, keys and
    # values side by side; it is stored split along its input axis and resharded by heads when used.
    tensor_axes: ClassVar[Mapping[str, int]] = {
        "attention/qkv/kernel": -2,
        "attention/output/kernel": -2,
        "mlp1/kernel": -1,
        "mlp1/bias": -1,
        "mlp2/kernel": -2,
    }

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
        """Returns the numbers, from 1, of the encoder layers in block i (0-based)."""
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
                dtype=self.dtype,
            )
            adapted = self.width if self.adapt_features and i < last else None
            setattr(self, f"block{i + 1}", block)
            setattr(self, f"head{i + 1}", TokenHead(self.num_classes, self.pool, adapted))

    def block(self, i: int, carry: jax.Array, *, train: bool) -> jax.Array:
        return getattr(self, f"block{i + 1}")(carry, train=train)

    def head(self, i: int, x: jax.Array, *, train: bool) -> HeadOutput:
        del train  # no dropout here
        return getattr(self, f"head{i + 1}")(x)


ViTTiny = functools.partial(ViT, width=192, heads=3)
ViTSmall = functools.partial(ViT, width=384, heads=6)
ViTBase = functools.partial(ViT, width=768, heads=12)
