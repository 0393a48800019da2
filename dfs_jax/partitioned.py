"""Convolutions and dense layers whose backward pass skips the channels that train nothing.

Where a fork put [f+, stop_gradient(f-)], the layer that reads it owes no gradient to f-. Written as
a concatenation in front of an ordinary layer that saves nothing: the whole input gradient is
computed, then cut. Here the layer computes it for the live channels alone:

    y = conv(x, w)                                  forward, over all channels
    dw = weight gradient of (x, dy)                 over all channels
    dx[live] = input gradient of (dy, w[live])      exact zeros in the other channels

`PartitionedConv` and `PartitionedDot` go into `nn.Conv(conv_general_dilated=...)` and
`nn.Dense(dot_general=...)`, so that parameters, initialisers and checkpoints stay Flax's.

Reference: Gong et al., "Deep Feature Surgery", ECCV 2024.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dfs_jax.cpu_kernels import Geometry, Passes, fast_passes, max_pool_2x2
from dfs_jax.layers import BatchNorm
from dfs_jax.surgery import LiveChannels
from dfs_jax.types import UserError

_LAYOUT = ("NHWC", "HWIO", "NHWC")


@dataclasses.dataclass(frozen=True)
class PartitionedConv:
    """`jax.lax.conv_general_dilated` with an input gradient for the live input channels alone.

    Works under jit, vmap, remat and sharding, in any precision, and can be differentiated again:
    reverse over reverse and forward over reverse. Plain forward mode is refused, as by every
    `jax.custom_vjp`. Grouped and depthwise convolutions mix few channels and compute their whole
    input gradient, as the plain operation does.

    Args:
      live: the input channels that can carry gradient; None for all, `()` for none. A hint that has
        to be true: whatever reads the other channels' gradient finds zeros.
      cpu_kernels: use this package's own kernels where the program runs on a CPU. Switch them off
        for a mesh of several devices; other platforms never see them.

    Raises:
      ValueError: when called, `live` exceeds the input's channels.

    Example:
      >>> from flax import linen as nn
      >>> layer = nn.Conv(7, (3, 3), conv_general_dilated=PartitionedConv(((0, 2),)))
      >>> x = jnp.ones((1, 5, 5, 3))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> dx = jax.grad(lambda x: layer.apply(variables, x).sum())(x)
      >>> [bool(channel.any()) for channel in jnp.moveaxis(dx, -1, 0)]
      [True, True, False]
    """

    live: LiveChannels = None
    cpu_kernels: bool = True

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        window_strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        lhs_dilation: Sequence[int] | None = None,
        rhs_dilation: Sequence[int] | None = None,
        dimension_numbers: Any = None,
        feature_group_count: int = 1,
        batch_group_count: int = 1,
        precision: Any = None,
        preferred_element_type: Any = None,
    ) -> jax.Array:
        """Convolves as `jax.lax.conv_general_dilated` does, whose arguments these are."""
        numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        convolve = functools.partial(
            lax.conv_general_dilated,
            window_strides=window_strides,
            padding=padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=numbers,
            feature_group_count=feature_group_count,
            batch_group_count=batch_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
        axes = numbers.lhs_spec[1], numbers.rhs_spec[1]
        grouped = feature_group_count != 1 or batch_group_count != 1
        geometry = _geometry(convolve, lhs, rhs) if self.cpu_kernels else None
        if grouped and geometry is None:
            return convolve(lhs, rhs)
        passes = _plain_passes(convolve, lhs, rhs, axes)
        if geometry is not None:
            passes = fast_passes(passes, geometry)
        return _partitioned(passes, None if grouped else self.live, axes, lhs, rhs)


@dataclasses.dataclass(frozen=True)
class PartitionedDot:
    """`jax.lax.dot_general` with a gradient for the live channels of its left operand alone.

    For `nn.Dense`, which contracts the last axis of its input with the first of its kernel. See
    `PartitionedConv`, whose properties it shares.

    Args:
      live: the input channels that can carry gradient; None for all, `()` for none.

    Raises:
      ValueError: when called, `live` exceeds the input's channels, or the product is not one of a
        single contracted axis without batch axes.

    Example:
      >>> from flax import linen as nn
      >>> layer = nn.Dense(7, dot_general=PartitionedDot(((1, 3),)))
      >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
      >>> dx = jax.grad(lambda x: layer.apply(variables, x).sum())(jnp.ones((2, 3)))
      >>> [bool(channel.any()) for channel in dx.T]
      [False, True, True]
    """

    live: LiveChannels = None

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        **options: Any,
    ) -> jax.Array:
        """Multiplies as `jax.lax.dot_general` does, whose arguments these are."""
        (lhs_axes, rhs_axes), (lhs_batch, rhs_batch) = dimension_numbers
        if len(lhs_axes) != 1 or lhs_batch or rhs_batch:
            raise UserError(
                "PartitionedDot contracts one axis and has no batch axes, as nn.Dense does, got "
                f"dimension_numbers={dimension_numbers}: use jax.lax.dot_general"
            )
        multiply = functools.partial(
            lax.dot_general,
            dimension_numbers=dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
            **options,
        )
        axes = lhs_axes[0], rhs_axes[0]
        return _partitioned(_plain_passes(multiply, lhs, rhs, axes), self.live, axes, lhs, rhs)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model's layers run; the two switches leave what they compute as it is.

    Every layer that reads a forked feature asks here for its function, and gets None, Flax's own,
    where both switches are off.

    Args:
      partitioned_backward: leave out the gradient of channels that train nothing.
      cpu_kernels: use this package's own kernels where the program runs on a CPU.
      dtype: in which layers compute, such as "bfloat16"; None for that of their parameters.
      batch_norm_groups: see `dfs_jax.layers.BatchNorm.groups`.

    Example:
      >>> Execution().conv(((0, 2),))
      PartitionedConv(live=((0, 2),), cpu_kernels=True)
      >>> Execution(partitioned_backward=False, cpu_kernels=False).conv(((0, 2),)) is None
      True
    """

    partitioned_backward: bool = True
    cpu_kernels: bool = True
    dtype: str | None = None
    batch_norm_groups: int = 1

    def batch_norm(self, name: str) -> BatchNorm:
        """Returns a BatchNorm of that name, to be called within a module's own method."""
        return BatchNorm(groups=self.batch_norm_groups, name=name)

    def conv(self, live: LiveChannels = None) -> PartitionedConv | None:
        """Returns `nn.Conv`'s `conv_general_dilated` for an input with these live channels."""
        live = live if self.partitioned_backward else None
        needed = live is not None or self.cpu_kernels
        return PartitionedConv(live, self.cpu_kernels) if needed else None

    def dot(self, live: LiveChannels = None) -> PartitionedDot | None:
        """Returns `nn.Dense`'s `dot_general` for an input with these live channels."""
        needed = live is not None and self.partitioned_backward
        return PartitionedDot(live) if needed else None

    def max_pool_2x2(self, x: jax.Array) -> jax.Array:
        """Returns the largest of every 2x2 pixels of `x` `[batch, height, width, channels]`."""
        return max_pool_2x2(x, cpu_kernels=self.cpu_kernels)


def _geometry(convolve: functools.partial, x: jax.Array, w: jax.Array) -> Geometry | None:
    """Returns what the CPU's kernels need to know; None for convolutions they do not cover."""
    options = convolve.keywords
    if x.ndim != 4 or not _has_cpu_type(x, w, options):
        return None
    if options["dimension_numbers"] != lax.conv_dimension_numbers(x.shape, w.shape, _LAYOUT):
        return None
    dilations = (*(options["lhs_dilation"] or ()), *(options["rhs_dilation"] or ()))
    groups, channels, features = options["feature_group_count"], x.shape[3], w.shape[3]
    depthwise = groups == channels == features > 1
    if any(step != 1 for step in dilations) or options["batch_group_count"] != 1:
        return None
    if groups != 1 and not depthwise:
        return None
    strides, padding = tuple(options["window_strides"]), options["padding"]
    sides = x.shape[1], x.shape[2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(sides, w.shape[:2], strides, padding)
    (top, bottom), (left, right) = padding
    height, width, _, _ = w.shape
    return Geometry((height, width), strides, ((top, bottom), (left, right)), sides, depthwise)


def _has_cpu_type(x: jax.Array, w: jax.Array, options: dict[str, Any]) -> bool:
    """Whether sizes are known, and numbers those that the CPU's kernels compute with."""
    known = all(isinstance(size, int) for size in (*x.shape, *w.shape))
    ordinary = options["precision"] in (None, lax.Precision.DEFAULT)
    same = x.dtype == w.dtype and options["preferred_element_type"] in (None, x.dtype)
    return known and ordinary and same and x.dtype in (jnp.float32, jnp.bfloat16)


def _plain_passes(
    forward: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    w: jax.Array,
    axes: tuple[int, int],
) -> Passes:
    """Returns the passes as JAX derives them; `axes` are the channel axes of `x` and `w`."""

    def weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
        (dw,) = jax.linear_transpose(functools.partial(forward, x), w)(dy)
        return dw

    def input_gradient(dy: jax.Array, some_w: jax.Array) -> jax.Array:
        shape = list(x.shape)
        shape[axes[0]] = x.shape[axes[0]] * some_w.shape[axes[1]] // w.shape[axes[1]]
        some_x = jax.ShapeDtypeStruct(tuple(shape), x.dtype)
        (dx,) = jax.linear_transpose(lambda x: forward(x, some_w), some_x)(dy)
        return dx

    x, w = jax.typeof(x), jax.typeof(w)
    return Passes(forward, weight_gradient, input_gradient)


def _partitioned(
    passes: Passes, live: LiveChannels, axes: tuple[int, int], x: jax.Array, w: jax.Array
) -> jax.Array:
    """Returns `passes.forward(x, w)`, differentiated by the other two for the live channels."""
    channels = x.shape[axes[0]]
    intervals = _checked(live, channels)

    @jax.custom_vjp
    def layer(x: jax.Array, w: jax.Array) -> jax.Array:
        return passes.forward(x, w)

    # Only what the backward pass will read is kept: images, for one, need no gradient, and then the
    # input gradient is not even traced.
    def forward(x: Any, w: Any):
        kept = (x.value if w.perturbed else None, w.value if x.perturbed and intervals else None)
        return passes.forward(x.value, w.value), kept

    def backward(kept: tuple[jax.Array | None, jax.Array | None], dy: Any):
        x, w = kept
        if isinstance(dy, jax.custom_derivatives.SymbolicZero):
            return None, None
        dw = None if x is None else passes.weight_gradient(x, dy)
        dx = None if w is None else _live_gradient(passes, intervals, channels, axes, dy, w)
        return dx, dw

    layer.defvjp(forward, backward, symbolic_zeros=True)
    return layer(x, w)


def _live_gradient(
    passes: Passes,
    intervals: Sequence[tuple[int, int]],
    channels: int,
    axes: tuple[int, int],
    dy: jax.Array,
    w: jax.Array,
) -> jax.Array:
    """Returns the input's gradient, computed for the live channels at once, 0 in the others."""
    x_axis, w_axis = axes
    if intervals == ((0, channels),):
        return passes.input_gradient(dy, w)
    slices = [lax.slice_in_dim(w, start, stop, axis=w_axis) for start, stop in intervals]
    dx = passes.input_gradient(dy, lax.concatenate(slices, w_axis) if slices[1:] else slices[0])
    pieces, done, taken = [], 0, 0
    for start, stop in (*intervals, (channels, channels)):
        pieces.append(_zeros(dx, x_axis, start - done))
        pieces.append(lax.slice_in_dim(dx, taken, taken + stop - start, axis=x_axis))
        done, taken = stop, taken + stop - start
    return lax.concatenate([piece for piece in pieces if piece.shape[x_axis]], x_axis)


def _zeros(like: jax.Array, axis: int, size: int) -> jax.Array:
    shape = (*like.shape[:axis], size, *like.shape[axis + 1 :])
    return jnp.zeros(shape, like.dtype)


def _checked(live: LiveChannels, channels: int) -> tuple[tuple[int, int], ...]:
    """Returns the live intervals, every channel for None."""
    if live is None:
        return ((0, channels),)
    done = 0
    for start, stop in live:
        if not done <= start < stop <= channels:
            raise UserError(
                f"live channels must be disjoint ascending intervals within {channels} channels, "
                f"got {live}"
            )
        done = stop
    return tuple((start, stop) for start, stop in live)
