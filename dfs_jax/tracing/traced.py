"""A traced program as one flat list of operations, which makes counting simple.

`jax.make_jaxpr` represents jitted, rematerialised and differentiated functions as nested programs.
Here the operations of a call replace it, and a value remains the same object inside and outside.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

# Joins values that cannot be followed (a loop's carry): each output depends on every input.
JOIN = "join"
# The outputs are the inputs, one by one; rematerialisation inserts the barrier.
_IDENTITIES = ("optimization_barrier", "copy", "copy_p")
# Results have the same numbers as the input, in another shape or precision.
_RESHAPING = (
    "broadcast_in_dim",
    "convert_element_type",
    "expand_dims",
    "reshape",
    "squeeze",
    "transpose",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """An array of a program, compared by identity.

    Attributes:
      shape: shape of the array.
      dtype: type of the array.
      literal: its number, if it is a literal of the program.
    """

    shape: tuple[int, ...]
    dtype: Any
    literal: Any = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_inexact(self) -> bool:
        """Whether it has a floating-point type, so that it can have a gradient."""
        return jnp.issubdtype(self.dtype, jnp.inexact)


class Operation(NamedTuple):
    """One step of a program.

    Attributes:
      name: name of its JAX primitive, or `JOIN`.
      inputs, outputs: arrays that it reads and computes.
      params: static parameters of the primitive.
      times: number of runs; None in a `while` loop, whose length is unknown.
    """

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    params: Mapping[str, Any]
    times: int | None


class Kind(enum.IntEnum):
    """Kind of a value by what it depends on, the last kind that applies."""

    CONSTANT = 0
    WEIGHT = 1
    ACTIVATION = 2
    GRADIENT = 3


class TracedProgram:
    """A program without calls, with the origins of its values.

    A scan's operations run as often as it does. Of a conditional, the branch with the most
    multiply-adds is used; if it depends on the platform, the branch of all platforms without their
    own.

    Args:
      program: program traced by `jax.make_jaxpr`.
      input_kinds: kind of each of its inputs.

    Attributes:
      operations: operations in order, each after those whose outputs it reads.
      inputs, outputs: inputs and outputs of the program.

    Example:
      >>> import jax
      >>> program = jax.make_jaxpr(jax.jit(lambda a: jax.nn.relu(-a)))(1.0)
      >>> [operation.name for operation in TracedProgram(program, [Kind.ACTIVATION]).operations]
      ['neg', 'max']
    """

    def __init__(self, program: ClosedJaxpr, input_kinds: Iterable[Kind]):
        self.operations: list[Operation] = []
        self.inputs = [_value(v) for v in program.jaxpr.invars]
        self.outputs = _inline(program.jaxpr, self.inputs, 1, self.operations)
        self._producers = {v: op for op in self.operations for v in op.outputs}
        self._kinds = dict(zip(self.inputs, input_kinds, strict=True))
        for operation in self.operations:
            kind = max(map(self.kind, operation.inputs), default=Kind.CONSTANT)
            self._kinds.update(dict.fromkeys(operation.outputs, kind))

    def kind(self, value: Value) -> Kind:
        """Returns the kind of a value; literals are constants."""
        return self._kinds.get(value, Kind.CONSTANT)

    def producer(self, value: Value) -> Operation | None:
        """Returns the operation that computes a value; None for inputs and literals."""
        return self._producers.get(value)

    def before_reshaping(self, value: Value) -> Value:
        """Returns the value with the same numbers in the shape in which they were computed."""
        producer = self.producer(value)
        while producer is not None and producer.name in _RESHAPING:
            value = producer.inputs[0]
            producer = self.producer(value)
        return value


def multiply_adds(operation: Operation) -> int:
    """Counts the multiply-adds of one run of a convolution or matrix product; 0 for all others.

        convolution      output elements x kernel positions x input channels of one group
        matrix product   output elements x contracted elements

    Products with padding count, as in the literature; products with the zeros that an input
    dilation inserts do not (see `multiply_adds_by_input`).
    """
    if operation.name == "dot_general":
        (contracted, _), _ = operation.params["dimension_numbers"]
        shape = operation.inputs[0].shape
        return operation.outputs[0].size * math.prod(shape[axis] for axis in contracted)
    if operation.name != "conv_general_dilated":
        return 0
    if any(step > 1 for step in operation.params["lhs_dilation"]):
        return multiply_adds_by_input(operation)
    kernel, spec = operation.inputs[1].shape, operation.params["dimension_numbers"].rhs_spec
    positions = math.prod(kernel[axis] for axis in spec[2:])
    return operation.outputs[0].size * positions * kernel[spec[1]]


def multiply_adds_by_input(operation: Operation) -> int:
    """Counts a convolution's multiply-adds from its input, as for a transposed convolution.

        input elements x kernel positions x output channels of one group

    The input gradient of a convolution is a transposed convolution of the output's gradient, which
    thus costs exactly as much as the convolution, for any stride and padding.
    """
    kernel, spec = operation.inputs[1].shape, operation.params["dimension_numbers"].rhs_spec
    positions = math.prod(kernel[axis] for axis in spec[2:])
    channels = kernel[spec[0]] // operation.params["feature_group_count"]
    return operation.inputs[0].size * positions * channels


def _inline(
    jaxpr: Jaxpr, inputs: Sequence[Value], times: int | None, operations: list[Operation]
) -> list[Value]:
    """Appends a jaxpr's operations on `inputs` and returns its outputs."""
    environment = dict(zip(jaxpr.invars, inputs, strict=True))
    environment.update({v: _value(v) for v in jaxpr.constvars})

    def read(atom: Any) -> Value:
        return _value(atom) if isinstance(atom, Literal) else environment[atom]

    for eqn in jaxpr.eqns:
        outputs = _append(eqn, tuple(map(read, eqn.invars)), times, operations)
        environment.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _append(
    eqn: JaxprEqn, inputs: tuple[Value, ...], times: int | None, operations: list[Operation]
) -> Sequence[Value]:
    name, inner = eqn.primitive.name, [j for p in eqn.params.values() for j in _jaxprs_in(p)]
    if name in _IDENTITIES:
        return inputs
    if not inner or name.startswith("reduce"):  # their inner programs combine two numbers
        outputs = tuple(map(_value, eqn.outvars))
        operations.append(Operation(name, inputs, outputs, eqn.params, times))
        return outputs
    if name == "cond":
        return _inline_branch(eqn, inputs[1:], times, operations)
    if len(inner) == 1 and name != "scan" and _fits(inner[0], eqn):
        return _inline(inner[0], inputs, times, operations)
    if name == "while" or times is None:
        times = None
    elif name == "scan":
        times *= eqn.params["length"]
    results = list(inputs)
    for jaxpr in inner:
        # Everything that a loop carries may depend on all its inputs.
        joined = Operation(JOIN, inputs, tuple(map(_value, jaxpr.invars)), {}, times)
        operations.append(joined)
        results += _inline(jaxpr, joined.outputs, times, operations)
    outputs = tuple(map(_value, eqn.outvars))
    operations.append(Operation(JOIN, tuple(results), outputs, {}, times))
    return outputs


def _inline_branch(
    eqn: JaxprEqn, inputs: tuple[Value, ...], times: int | None, operations: list[Operation]
) -> list[Value]:
    """Appends one branch of a conditional: that of all other platforms, or the most expensive."""
    branches = []
    for branch in eqn.params["branches"]:
        body: list[Operation] = []
        branches.append((body, _inline(branch.jaxpr, inputs, times, body)))
    platforms = eqn.params.get("branches_platforms") or ()
    if None in platforms:  # the programs of all platforms compute the same
        body, outputs = branches[platforms.index(None)]
    else:
        body, outputs = max(branches, key=lambda branch: sum(map(multiply_adds, branch[0])))
    operations.extend(body)
    return outputs


def _fits(jaxpr: Jaxpr, eqn: JaxprEqn) -> bool:
    """Returns whether a jaxpr has the inputs and outputs of the equation, like a plain call's."""
    inside, outside = (jaxpr.invars, jaxpr.outvars), (eqn.invars, eqn.outvars)
    return all(
        [_value(v).shape for v in ours] == [_value(v).shape for v in theirs]
        for ours, theirs in zip(inside, outside, strict=True)
    )


def _jaxprs_in(parameter: Any) -> Iterator[Jaxpr]:
    if isinstance(parameter, ClosedJaxpr):
        yield parameter.jaxpr
    elif isinstance(parameter, Jaxpr):
        yield parameter
    elif isinstance(parameter, (tuple, list)):
        for item in parameter:
            yield from _jaxprs_in(item)


def _value(atom: Any) -> Value:
    return Value(atom.aval.shape, atom.aval.dtype, getattr(atom, "val", None))
