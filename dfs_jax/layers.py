"""Layers of the published networks that Flax lacks or defines differently."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dfs_jax.types import UserError


def conv_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Returns a convolution's initial kernel: He normal, variance 2 / fan_in.

    The number of values drawn is rounded up to a power of two and the surplus is dropped, so that
    the many shapes of a network need few compiled random draws.

    Args:
      key: random key.
      shape: shape of the kernel, `(height, width, input channels of a group, output channels)`.
      dtype: type of the kernel.

    Reference: He et al., ICCV 2015.

    Example:
      >>> conv_init(jax.random.key(0), (3, 3, 5, 7)).shape
      (3, 3, 5, 7)
    """
    drawn = jax.random.normal(key, (1 << (math.prod(shape) - 1).bit_length(),), dtype)
    return _cut_and_scaled(drawn, shape, math.sqrt(2 / math.prod(shape[:-1])))


@functools.partial(jax.jit, static_argnums=1)
def _cut_and_scaled(drawn: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
    return drawn[: math.prod(shape)].reshape(shape) * scale


# Published networks pad every 3x3 by 1 on each side; "SAME" pads (0, 1) at stride 2.
Conv3x3 = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1, kernel_init=conv_init)
Conv1x1 = functools.partial(nn.Conv, kernel_size=(1, 1), padding=0, kernel_init=conv_init)


class ConvNorm(nn.Module):
    """Convolution, BatchNorm and, on request, an activation.

    Attributes:
      features: number of output channels.
      kernel: side of the kernel, an odd number.
      stride: stride of the convolution.
      use_bias: whether the convolution has a bias.
      depthwise: whether each channel has a kernel of its own.
      padding: "SAME" as in TensorFlow; None for half of the kernel on each side, as in PyTorch.
      activation: activation after the normalisation; None for none.
      momentum: see `BatchNorm`.
      epsilon: see `BatchNorm`.
      dtype: type of the convolution; None for that of its parameters.
      norm_groups: see `BatchNorm.groups`.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    use_bias: bool = False
    depthwise: bool = False
    padding: str | None = None
    activation: Callable[[jax.Array], jax.Array] | None = nn.relu
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: str | None = None
    norm_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[batch, height, width, channels]` to `[batch, height', width', features]`."""
        conv = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            self.stride,
            padding=self.kernel // 2 if self.padding is None else self.padding,
            feature_group_count=self.features if self.depthwise else 1,
            use_bias=self.use_bias,
            dtype=self.dtype,
            kernel_init=conv_init,
            name="conv",
        )
        norm = BatchNorm(self.momentum, self.epsilon, self.norm_groups, name="norm")
        x = norm(conv(x), train=train)
        return x if self.activation is None else self.activation(x)


def stem_pool(x: jax.Array) -> jax.Array:
    """Applies the max-pool of ImageNet stems: 3x3, stride 2, padded with one pixel of -inf."""
    pads = ((1, 1), (1, 1))
    return nn.max_pool(x, (3, 3), (2, 2), pads)  # pyright: ignore[reportArgumentType]


def upsample_bilinear(x: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes `[batch, h, w, channels]` bilinearly with half-pixel centres, as PyTorch does.

    Doubling, the most common case, takes a few multiplications for each output, where
    `jax.image.resize` would multiply by matrices.

    Example:
      >>> upsample_bilinear(jnp.array([0.0, 4.0]).reshape(1, 1, 2, 1), 1, 4).ravel().tolist()
      [0.0, 1.0, 3.0, 4.0]
    """
    for axis, size in ((1, height), (2, width)):
        if size == 2 * x.shape[axis]:
            x = doubled(x, axis)
    return jax.image.resize(x, (x.shape[0], height, width, x.shape[3]), "bilinear")


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def doubled(x: jax.Array, axis: int) -> jax.Array:
    """Doubles an axis: 3/4 of each value plus 1/4 of its left, then of its right neighbour.

    Being linear, it is its own derivative. The rule keeps it together in a traced program, so that
    `dfs_jax.onnx` finds it there by its name.
    """
    return _doubled(x, axis)


@doubled.defjvp
def _doubled_jvp(axis: int, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return _doubled(x, axis), _doubled(dx, axis)


def _doubled(x: jax.Array, axis: int) -> jax.Array:
    size = x.shape[axis]
    cut = functools.partial(jax.lax.slice_in_dim, x, axis=axis)
    before = jnp.concatenate([cut(0, 1), cut(0, size - 1)], axis)
    after = jnp.concatenate([cut(1, size), cut(size - 1, size)], axis)
    pairs = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis=axis + 1)
    return pairs.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _moments(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns the mean and the biased variance over `axes`, which are kept with size 1.

    On several devices, the values take two all-reduced sums and the gradient takes none.
    """
    mean = jnp.mean(x, axes, keepdims=True)
    return mean, jnp.mean(jnp.square(x - mean), axes, keepdims=True)


@_moments.defjvp
def _moments_jvp(axes: tuple[int, ...], primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    """Omits d var / d mean, which is zero because deviations from the mean sum to zero."""
    (x,), (dx,) = primals, tangents
    mean, var = _moments(x, axes)
    changes = (dx, 2 * (x - mean) * dx)
    return (mean, var), tuple(jnp.mean(change, axes, keepdims=True) for change in changes)


class BatchNorm(nn.Module):
    """Batch normalisation over the last axis, with PyTorch's running statistics.

        y = scale * (x - mean) / sqrt(var + eps) + bias
        running = momentum * running + (1 - momentum) * batch

    The batch is normalised by its biased variance, while the running variance averages the unbiased
    one, n / (n - 1) times as large, as in PyTorch (Flax's own layer stores the biased one).
    Statistics are computed in float32 or wider; the result has the type of `x`.

    Attributes:
      momentum: weight of the old running value (1 minus PyTorch's momentum).
      epsilon: constant added to the variance.
      groups: number of equal consecutive parts of a training batch, each normalised by its own
        statistics, as on as many GPUs; the running statistics average theirs.

    Raises:
      UserError: (when called) a batch that cannot be divided into the groups, or, in training, a
        single value per channel, whose variance is always 0.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Normalises `x` `[..., channels]`; `train` uses and records the batch's statistics."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        parts = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if not train:
            mean, var = running_mean.value, running_var.value
        else:
            parts = parts if self.groups == 1 else self._grouped(parts)
            axes = tuple(range(parts.ndim - x.ndim, parts.ndim - 1))
            mean, var = _moments(parts, axes)
            n = x.size // channels // self.groups
            self._check_values(n, x.shape)
            if not self.is_initializing():
                unbiased = var * (n / (n - 1))
                running_mean.value = self._blend(running_mean.value, mean)
                running_var.value = self._blend(running_var.value, unbiased)
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        normalised = parts * factor + (bias - mean * factor)
        return normalised.reshape(x.shape).astype(x.dtype)

    def _grouped(self, x: jax.Array) -> jax.Array:
        if len(x) % self.groups:
            raise UserError(
                f"a batch of {len(x)} cannot be divided into batch_norm_groups={self.groups} equal "
                f"groups: choose a multiple of {self.groups}"
            )
        return x.reshape(self.groups, -1, *x.shape[1:])

    def _check_values(self, n: int, shape: tuple[int, ...]) -> None:
        if n < 2:
            sides = "x".join(map(str, shape[1:-1])) or "1"
            groups = "" if self.groups == 1 else f" in {self.groups} batch_norm_groups"
            raise UserError(
                f"BatchNorm takes its training statistics from more than 1 value per channel, but "
                f"a batch of {shape[0]}{groups} with maps of {sides} has {n}: use larger images, a "
                f"larger batch_size, or fewer accumulate_steps or batch_norm_groups"
            )

    def _blend(self, running: jax.Array, by_group: jax.Array) -> jax.Array:
        batch = by_group.reshape(-1, len(running)).mean(axis=0)
        return self.momentum * running + (1 - self.momentum) * batch
