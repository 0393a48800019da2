"""Elements of every value that can carry gradient: the theory for the cost of a step.

Liveness is propagated element by element through the forward program: concatenations, pools and
additions pass it on, and products with weights make all outputs live.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dfs_jax.tracing.traced import Operation, TracedProgram, Value

# Elements of a value that can carry gradient: all, none, or those that are True.
LiveElements = bool | np.ndarray


def values_with_gradient(program: TracedProgram) -> set[Value]:
    """Returns the values on which the outputs depend along a path that passes gradients."""
    reached = set(program.outputs)
    for operation in reversed(program.operations):
        if operation.name != "stop_gradient" and not reached.isdisjoint(operation.outputs):
            reached.update(v for v in operation.inputs if v.is_inexact)
    return reached


def live_elements(program: TracedProgram, num_parameters: int) -> dict[Value, LiveElements]:
    """Returns the elements of every value that depend on a parameter along a differentiable path.

    The parameters are the first inputs of the program.
    """
    live: dict[Value, LiveElements] = {v: i < num_parameters for i, v in enumerate(program.inputs)}
    for operation in program.operations:
        live.update({v: False for v in operation.inputs if v not in live})  # literals
        lives = _live_output(operation, [live[v] for v in operation.inputs])
        live.update({v: lives if v.is_inexact else False for v in operation.outputs})
    return live


def _live_output(operation: Operation, inputs: Sequence[LiveElements]) -> LiveElements:
    if operation.name == "stop_gradient" or not any(np.any(live) for live in inputs):
        return False
    rule = _LIVE_RULES.get(operation.name)
    if rule is None or all(live is True for live in inputs):
        return True  # unknown operations may mix channels
    masks = [
        np.broadcast_to(live, v.shape) for live, v in zip(inputs, operation.inputs, strict=True)
    ]
    output = rule(operation, *masks)
    return True if output.all() else output


def live_share(operation: Operation, position: int, live: LiveElements, macs: int) -> int:
    """Returns the multiply-adds of an operand's gradient if only live channels have one."""
    if isinstance(live, bool):
        return macs if live else 0
    if operation.name == "dot_general":
        summed = operation.params["dimension_numbers"][0][position]
    else:
        numbers = operation.params["dimension_numbers"]
        summed = (numbers.lhs_spec[1] if position == 0 else numbers.rhs_spec[1],)
    channels = live.any(axis=tuple(axis for axis in range(live.ndim) if axis not in summed))
    return macs * int(channels.sum()) // channels.size


def _live_elementwise(operation: Operation, *masks: np.ndarray) -> np.ndarray:
    shape = operation.outputs[0].shape
    return np.logical_or.reduce([np.broadcast_to(mask, shape) for mask in masks])


def _live_reshaped(operation: Operation, mask: np.ndarray) -> np.ndarray:
    return mask.reshape(operation.outputs[0].shape)


def _live_broadcast(operation: Operation, mask: np.ndarray) -> np.ndarray:
    shape = np.ones(len(operation.params["shape"]), int)
    shape[list(operation.params["broadcast_dimensions"])] = mask.shape
    return np.broadcast_to(mask.reshape(shape), operation.params["shape"])


def _live_slice(operation: Operation, mask: np.ndarray) -> np.ndarray:
    starts, stops = operation.params["start_indices"], operation.params["limit_indices"]
    strides = operation.params["strides"] or (1,) * mask.ndim
    return mask[tuple(map(slice, starts, stops, strides))]


def _live_concatenation(operation: Operation, *masks: np.ndarray) -> np.ndarray:
    return np.concatenate(masks, axis=operation.params["dimension"])


def _live_reduction(operation: Operation, mask: np.ndarray) -> np.ndarray:
    return np.asarray(mask.any(axis=operation.params["axes"]))


def _live_pool(operation: Operation, mask: np.ndarray) -> np.ndarray:
    window = operation.params["window_dimensions"]
    pooled = mask.any(axis=tuple(i for i, n in enumerate(window) if n > 1), keepdims=True)
    return np.broadcast_to(pooled, operation.outputs[0].shape)


# Propagation of live elements through operations, by the names of their primitives.
_LIVE_RULES: dict[str, Callable[..., np.ndarray]] = {
    **dict.fromkeys(
        ("add", "convert_element_type", "div", "max", "min", "mul", "neg", "select_n", "sub"),
        _live_elementwise,
    ),
    **dict.fromkeys(("expand_dims", "reshape", "squeeze"), _live_reshaped),
    **dict.fromkeys(("reduce_max", "reduce_sum"), _live_reduction),
    **dict.fromkeys(("reduce_window_max", "reduce_window_sum"), _live_pool),
    "broadcast_in_dim": _live_broadcast,
    "concatenate": _live_concatenation,
    "slice": _live_slice,
}
