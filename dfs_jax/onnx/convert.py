"""Converts a function's traced program into an ONNX model.

The program is evaluated on names of values instead of arrays. What depends on no input is computed
at once and becomes a constant; then constants are folded into convolutions and dense layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export
from jax.extend.core import JaxprEqn

from dfs_jax.onnx.contractions import CONTRACTIONS
from dfs_jax.onnx.elementwise import ELEMENTWISE, cast, elementwise
from dfs_jax.onnx.graph import BATCH, OPSET, Graph, serialized
from dfs_jax.onnx.moves import MOVES
from dfs_jax.onnx.named import NAMED, called
from dfs_jax.onnx.reductions import REDUCTIONS
from dfs_jax.onnx.simplify import simplified
from dfs_jax.onnx.values import (
    Tensor,
    Value,
    as_array,
    as_tensor,
    avals,
    full,
    in_order,
    narrowed,
    ordered,
    usual_axes,
)
from dfs_jax.tracing.equations import CALLS, CHECKPOINTS, bind, evaluate, opened
from dfs_jax.types import UserError

__all__ = ["OPSET", "Input", "to_onnx"]

_CALLED = {
    **CALLS,
    **CHECKPOINTS,
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
_RULES = {**MOVES, **REDUCTIONS, **CONTRACTIONS}
_IDENTITIES = ("copy", "copy_p", "optimization_barrier", "exit_logits", "stop_gradient")


class Input(NamedTuple):
    """An input of a model.

    Attributes:
      name: name in the graph.
      shape: shape of one example, without the batch.
      dtype: type.
      axes: order of the logical axes, the batch among them, in the graph's tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[int, ...]


class Converted(NamedTuple):
    """An ONNX model.

    Attributes:
      model: bytes of the model.
      outputs: the outputs as a following model's inputs, under the names given.
    """

    model: bytes
    outputs: tuple[Input, ...]


def to_onnx(
    function: Callable[..., Any],
    inputs: Sequence[Input],
    outputs: Sequence[str],
    *,
    name: str = "network",
) -> Converted:
    """Converts a function of arrays, whose first axis is the batch, for a batch of any size.

    Args:
      function: function of as many arrays as there are inputs, which returns a flat sequence of
        arrays with the batch first. Arrays that it closes over become constants.
      inputs: its inputs.
      outputs: names of its results.
      name: name of the graph.

    Raises:
      UserError: an operation that has no counterpart, or a function that cannot be traced for a
        batch of any size.
    """
    (batch,) = export.symbolic_shape(BATCH)
    shapes = [jax.ShapeDtypeStruct((batch, *x.shape), x.dtype) for x in inputs]
    try:
        closed = jax.make_jaxpr(lambda *arrays: tuple(function(*arrays)))(*shapes)
    except (TypeError, ValueError, NotImplementedError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name} cannot be traced for a batch of any size: {reason}") from error
    graph = Graph()
    given = [_channels_first(graph, Tensor(x.name, x.axes, (batch, *x.shape))) for x in inputs]
    sizes = graph.add("Shape", inputs[0].name, start=0, end=1)
    results = _Walk(graph, sizes).run(closed.jaxpr, closed.consts, given)
    made, following = [], []
    for wanted, value, aval in zip(outputs, results, closed.out_avals, strict=True):
        tensor = as_tensor(graph, full(graph, value, aval.shape, sizes))
        tensor = tensor if tensor.axes[0] == 0 else _plain(graph, tensor)
        made.append(graph.add("Identity", tensor.name))
        following.append(Input(wanted, tuple(aval.shape[1:]), narrowed(aval.dtype), tensor.axes))
    names = simplified(graph, made)
    _rename(graph, dict(zip(names, outputs, strict=True)))
    model = serialized(
        graph, dict(map(_described, inputs)), dict(map(_described, following)), name=name
    )
    return Converted(model, tuple(following))


class _Walk:
    """Evaluates a program on values of a graph."""

    def __init__(self, graph: Graph, batch: str):
        self._graph, self._batch = graph, batch

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Value]) -> list[Value]:
        """Returns the outputs of a program."""
        return evaluate(jaxpr, [as_array(c) for c in consts], args, self._apply)

    def _apply(self, equation: JaxprEqn, inputs: list[Any]) -> list[Value]:
        name = equation.primitive.name
        values = [_typed(x, aval) for x, aval in zip(inputs, avals(equation), strict=True)]
        if name == "custom_jvp_call" and called(equation) in NAMED and not _are_known(values):
            return NAMED[called(equation)](self._graph, equation, values, self._batch)
        if name in _CALLED:
            return self.run(*opened(equation.params[_CALLED[name]]), values)
        if name in _IDENTITIES:
            return values
        if name == "scan":
            return self._unrolled(equation, values)
        if name == "dim_as_value":
            return [self._size_of_batch(equation)]
        if name not in ("broadcast_in_dim", *ELEMENTWISE) and _are_known(values):
            shapes = [aval.shape for aval in avals(equation)]
            arrays = [np.broadcast_to(x, s) for x, s in zip(values, shapes, strict=True)]
            return [as_array(x) for x in bind(equation, arrays)]
        try:
            if name in ELEMENTWISE:
                return [elementwise(self._graph, equation, values)]
            if name in _RULES:
                return _RULES[name](self._graph, equation, values, self._batch)
            raise NotImplementedError("it has no counterpart here")
        except NotImplementedError as error:
            where = str(equation.source_info.name_stack) or "the function"
            raise UserError(f"{name} of {where} cannot be converted to ONNX: {error}") from error

    def _size_of_batch(self, equation: JaxprEqn) -> Value:
        """Returns the size of the batch, as a number that the function computes with."""
        dim = equation.params["dim"]
        aval: Any = equation.outvars[0].aval
        if str(dim) != BATCH:
            raise UserError(f"{dim} cannot be converted to ONNX: only the batch's size itself can")
        scalar = self._graph.add("Squeeze", self._batch, self._graph.integers([0]))
        return Tensor(cast(self._graph, scalar, aval.dtype), (), ())

    def _unrolled(self, equation: JaxprEqn, values: list[Value]) -> list[Value]:
        """Returns the results of a loop of fixed length, written out."""
        params, graph = equation.params, self._graph
        body = params["jaxpr"]
        at, upto = params["num_consts"], params["num_consts"] + params["num_carry"]
        consts, carry, stacked = values[:at], values[at:upto], values[upto:]
        of_rows = avals(equation)[upto:]
        steps = range(params["length"])
        rows: list[list[Value]] = []
        for k in reversed(steps) if params["reverse"] else steps:
            xs = [_row(graph, x, aval, k) for x, aval in zip(stacked, of_rows, strict=True)]
            found = self.run(body.jaxpr, body.consts, [*consts, *carry, *xs])
            carry, ys = found[: upto - at], found[upto - at :]
            rows.append(ys)
        rows = rows[::-1] if params["reverse"] else rows
        shapes: list[Any] = [v.aval for v in equation.outvars[upto - at :]]
        joined = [
            _stack(graph, list(ys), aval.shape, self._batch)
            for ys, aval in zip(zip(*rows, strict=True), shapes, strict=True)
        ]
        return [*carry, *joined]


def _typed(x: Any, aval: Any) -> Value:
    """Returns an input; a literal of the program in the type that it has there."""
    return x if isinstance(x, Tensor) else np.asarray(x).astype(narrowed(aval.dtype))


def _are_known(values: Sequence[Value]) -> bool:
    return not any(isinstance(x, Tensor) for x in values)


def _channels_first(graph: Graph, x: Tensor) -> Tensor:
    """Returns an input with its channels first: images are moved while they are uint8."""
    axes = usual_axes(x.rank)
    return Tensor(ordered(graph, x, axes), axes, x.sizes)


def _plain(graph: Graph, tensor: Tensor) -> Tensor:
    axes = in_order(tensor.rank)
    return Tensor(ordered(graph, tensor, axes), axes, tensor.sizes)


def _row(graph: Graph, x: Value, aval: Any, k: int) -> Value:
    if not isinstance(x, Tensor):
        return np.broadcast_to(x, aval.shape)[k]
    at = x.place(0)
    index = k if x.sizes[0] != 1 else 0  # a broadcast axis has one row
    name = graph.add("Gather", x.name, graph.constant(np.int64(index)), axis=at)
    return Tensor(name, tuple(a - 1 for a in x.axes if a), x.sizes[1:])


def _stack(graph: Graph, rows: list[Value], shape: tuple[Any, ...], batch: str) -> Value:
    if not rows or _are_known(rows):
        return np.stack([np.broadcast_to(row, shape[1:]) for row in rows])  # type: ignore[arg-type]
    plain = [_plain(graph, as_tensor(graph, full(graph, row, shape[1:], batch))) for row in rows]
    ones = [graph.add("Unsqueeze", row.name, graph.integers([0])) for row in plain]
    return Tensor(graph.add("Concat", *ones, axis=0), in_order(len(shape)), shape)


def _described(x: Input) -> tuple[str, tuple[np.dtype, list[int | str]]]:
    sizes = (BATCH, *x.shape)
    return x.name, (narrowed(x.dtype), [sizes[a] for a in x.axes])


def _rename(graph: Graph, names: dict[str, str]) -> None:
    for node in graph.nodes:
        node.output = names.get(node.output, node.output)
        node.inputs = [names.get(name, name) for name in node.inputs]
