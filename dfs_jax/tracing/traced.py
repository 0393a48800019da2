"""A traced program as one flat list of operations, so that counting needs no care for nesting.

`jax.make_jaxpr` keeps jitted, rematerialised and differentiated functions as programs within the
program. Here the operations of a call take its place, and a value stays the same object across.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

# Joins what cannot be followed value by value (a loop's carry): outputs depend on every input.
JOIN = "join"
# Outputs are the inputs, one by one; the barrier comes with rematerialisation.
_IDENTITIES = ("optimization_barrier", "copy", "copy_p")
# One number in, the same number out, wherever it then lies and in whatever precision.
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
    """An array of a program, told from others by identity.

    Attributes:
      shape: its shape.
      dtype: its type.
      literal: the number, where one is written into the program.
    """

    shape: tuple[int, ...]
    dtype: Any
    literal: Any = None

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def is_inexact(self) -> bool:
        """Whether its numbers are of floating point, so that it can have a gradient."""
        return jnp.issubdtype(self.dtype, jnp.inexact)


class Operation(NamedTuple):
    """One step of a program.

    Attributes:
      name: of its JAX primitive, or `JOIN`.
      inputs, outputs: its arrays.
      params: the primitive's static parameters.
      times: how often it runs; None in a `while` loop, whose length nobody knows.
    """

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    params: Mapping[str, Any]
    times: int | None


class Kind(enum.IntEnum):
    """What a value depends on; one that depends on several is of the last kind among them."""

    CONSTANT = 0
    WEIGHT = 1
    ACTIVATION = 2
    GRADIENT = 3


class TracedProgram:
    """A program without calls, and where its values come from.

    A scan's operations run as often as it does. Of a conditional the branch with the most
    multiply-adds is kept; where it is on the platform, that of platforms which have none of their
    own.

    Args:
      program: what `jax.make_jaxpr` traced.
      input_kinds: what each of its inputs is.

    Attributes:
      operations: in order, each after those whose outputs it reads.
      inputs, outputs: of the program.

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
        """Returns what a value depends on; literals are constants."""
        return self._kinds.get(value, Kind.CONSTANT)

    def producer(self, value: Value) -> Operation | None:
        """Returns the operation that computes a value; None for inputs and literals."""
        return self._producers.get(value)

    def before_reshaping(self, value: Value) -> Value:
        """Returns the value that holds the same numbers in the shape they were computed in."""
        producer = self.producer(value)
        while producer is not None and producer.name in _RESHAPING:
            value = producer.inputs[0]
            producer = self.producer(value)
        return value


def multiply_adds(operation: Operation) -> int:
    """Counts the multiply-adds of running a convolution or matrix product once; 0 for all others.

        convolution      output elements x kernel positions x input channels of one group
        matrix product   output elements x contracted elements

    Products with padding count, as everywhere in the literature; the zeros that an input dilation
    puts between the inputs do not (see `multiply_adds_by_input`).
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
    """Counts a convolution's multiply-adds from its input's side, as for a transposed convolution.

        input elements x kernel positions x output channels of one group

    The input gradient of a convolution is such a convolution, of the output's gradient; counted
    like this it costs exactly what the convolution does, whatever the stride and the padding.
    """
    kernel, spec = operation.inputs[1].shape, operation.params["dimension_numbers"].rhs_spec
    positions = math.prod(kernel[axis] for axis in spec[2:])
    channels = kernel[spec[0]] // operation.params["feature_group_count"]
    return operation.inputs[0].size * positions * channels


def _inline(
    jaxpr: Jaxpr, inputs: Sequence[Value], times: int | None, operations: list[Operation]
) -> list[Value]:
    """Appends a jaxpr's operations on `inputs`; returns its outputs."""
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
    if not inner or name.startswith("reduce"):  # their inner programs say how two numbers combine
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
        # What a loop carries may come to depend on anything that goes in.
        joined = Operation(JOIN, inputs, tuple(map(_value, jaxpr.invars)), {}, times)
        operations.append(joined)
        results += _inline(jaxpr, joined.outputs, times, operations)
    outputs = tuple(map(_value, eqn.outvars))
    operations.append(Operation(JOIN, tuple(results), outputs, {}, times))
    return outputs


def _inline_branch(
    eqn: JaxprEqn, inputs: tuple[Value, ...], times: int | None, operations: list[Operation]
) -> list[Value]:
    """Appends one branch of a conditional: that of any other platform, or the dearest."""
    branches = []
    for branch in eqn.params["branches"]:
        body: list[Operation] = []
        branches.append((body, _inline(branch.jaxpr, inputs, times, body)))
    platforms = eqn.params.get("branches_platforms") or ()
    if None in platforms:  # programs that differ by platform compute the same
        body, outputs = branches[platforms.index(None)]
    else:
        body, outputs = max(branches, key=lambda branch: sum(map(multiply_adds, branch[0])))
    operations.extend(body)
    return outputs


def _fits(jaxpr: Jaxpr, eqn: JaxprEqn) -> bool:
    """Whether the jaxpr takes and returns what the equation does, as a plain call's does."""
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
