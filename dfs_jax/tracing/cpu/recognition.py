"""Recognises the equations of a traced program that a CPU kernel can compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from dfs_jax.tracing.cpu.choice import Geometry, choose_kernels
from dfs_jax.tracing.cpu.pooling import max_pool_2x2, max_pool_2x2_gradient

Kernel = Callable[..., jax.Array]

# Axes of (batch, feature, height, width) of the operands and of the result.
_NHWC, _HWIO, _HWOI, _CHWN = (0, 3, 1, 2), (3, 2, 0, 1), (2, 3, 0, 1), (3, 0, 1, 2)
_FORWARD = (_NHWC, _HWIO, _NHWC)
_INPUT_GRADIENT = (_NHWC, _HWOI, _NHWC)
_WEIGHT_GRADIENT = (_CHWN, _CHWN, _HWOI)
_SINGLE = (1, 1)
_DEFAULT = (None, lax.Precision.DEFAULT, (lax.Precision.DEFAULT,) * 2)


def kernel_for(equation: JaxprEqn) -> Kernel | None:
    """Returns the kernel that computes the equation; None where XLA's own is as good.

    Kernels take the equation's inputs. They are for known sizes, float32 or bfloat16 (computed in
    float32) and default precision.
    """
    avals: list[Any] = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    if any(aval.ndim != 4 or not _is_known(aval) for aval in avals):
        return None
    if equation.primitive.name != "conv_general_dilated":
        return _pool(equation, *avals)
    params, result = equation.params, avals[2]
    types = {params["preferred_element_type"] or result.dtype, *(aval.dtype for aval in avals)}
    if len(types) != 1 or result.dtype not in (jnp.float32, jnp.bfloat16):
        return None
    if params["precision"] not in _DEFAULT:
        return None
    recognise = _CONVOLUTIONS.get(tuple(params["dimension_numbers"]))
    kernel = None if recognise is None else recognise(params, *avals)
    return None if kernel is None else _in_float32(kernel)


def _is_known(aval: Any) -> bool:
    return all(isinstance(size, int) for size in aval.shape)


def _in_float32(kernel: Kernel) -> Kernel:
    return lambda a, b: kernel(a.astype(jnp.float32), b.astype(jnp.float32)).astype(a.dtype)


def _forward(params: dict[str, Any], x: Any, w: Any, y: Any) -> Kernel | None:
    if params["lhs_dilation"] != _SINGLE or params["rhs_dilation"] != _SINGLE:
        return None
    groups = params["feature_group_count"], params["batch_group_count"]
    is_depthwise = _is_depthwise(groups[0], x.shape[3], w.shape[3])
    if groups != (1, 1) and not is_depthwise:
        return None
    geometry = Geometry(
        w.shape[:2], params["window_strides"], params["padding"], x.shape[1:3], is_depthwise
    )
    return choose_kernels(geometry, x.shape[3], w.shape[3]).forward


def _input_gradient(params: dict[str, Any], dy: Any, w: Any, dx: Any) -> Kernel | None:
    if params["window_strides"] != _SINGLE or params["rhs_dilation"] != _SINGLE:
        return None
    groups = params["feature_group_count"], params["batch_group_count"]
    is_depthwise = _is_depthwise(groups[0], dx.shape[3], dy.shape[3])
    if groups != (1, 1) and not is_depthwise:
        return None
    strides, size = params["lhs_dilation"], w.shape[:2]
    before = [k - 1 - low for k, (low, _) in zip(size, params["padding"], strict=True)]
    geometry = _geometry(size, strides, before, dx.shape[1:3], dy.shape[1:3], is_depthwise)
    kernel = choose_kernels(geometry, dx.shape[3], dy.shape[3]).input_gradient
    if kernel is None:
        return None

    def of_reversed(dy: jax.Array, w: jax.Array) -> jax.Array:
        w = lax.rev(w, (0, 1))
        return kernel(dy, w.swapaxes(2, 3) if is_depthwise else w)

    return of_reversed


def _weight_gradient(params: dict[str, Any], x: Any, dy: Any, dw: Any) -> Kernel | None:
    if params["window_strides"] != _SINGLE or params["lhs_dilation"] != _SINGLE:
        return None
    groups = params["feature_group_count"], params["batch_group_count"]
    is_depthwise = _is_depthwise(groups[1], x.shape[3], dy.shape[3])
    if groups != (1, 1) and not is_depthwise:
        return None
    before = [low for low, _ in params["padding"]]
    strides, size = params["rhs_dilation"], dw.shape[:2]
    geometry = _geometry(size, strides, before, x.shape[1:3], dy.shape[1:3], is_depthwise)
    return choose_kernels(geometry, x.shape[3], dy.shape[3]).weight_gradient


_CONVOLUTIONS = {
    _FORWARD: _forward,
    _INPUT_GRADIENT: _input_gradient,
    _WEIGHT_GRADIENT: _weight_gradient,
}


def _is_depthwise(groups: int, channels: int, features: int) -> bool:
    return groups == channels == features > 1


def _geometry(
    kernel: tuple[int, int],
    strides: tuple[int, int],
    before: Sequence[int],
    sides: tuple[int, int],
    outputs: tuple[int, int],
    is_depthwise: bool,
) -> Geometry:
    """Returns the geometry of the forward pass, of which a gradient tells all but the last padding.

    With a stride, several paddings at the end give as many outputs; equal ones on both sides are
    preferred.
    """
    padding: list[Any] = []
    for k, stride, low, side, output in zip(kernel, strides, before, sides, outputs, strict=True):
        least = stride * (output - 1) + k - side - low
        padding.append((low, low if least <= low < least + stride else least))
    return Geometry(kernel, strides, tuple(padding), sides, is_depthwise)


def _pool(equation: JaxprEqn, *avals: Any) -> Kernel | None:
    """Returns the kernel of a 2x2 max-pool over even sides, or of its gradient."""
    params, is_gradient = equation.params, equation.primitive.name == "select_and_scatter_add"
    window = params["window_dimensions"], params["window_strides"]
    dilations = params.get("base_dilation"), params.get("window_dilation")
    image = avals[1] if is_gradient else avals[0]
    if any(tuple(sizes) != (1, 2, 2, 1) for sizes in window):
        return None
    if any(sizes is not None and set(sizes) != {1} for sizes in dilations):
        return None
    if any(tuple(pair) != (0, 0) for pair in params["padding"]) or any(
        side % 2 for side in image.shape[1:3]
    ):
        return None
    if not is_gradient:
        return max_pool_2x2
    if params["select_prim"].name != "ge":
        return None
    return lambda dy, x: max_pool_2x2_gradient(x, dy)
