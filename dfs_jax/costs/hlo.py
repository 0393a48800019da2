"""Parses the text of a compiled module into instructions and the number of times each runs."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-0-9]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)[a-z0-9]*\[([0-9,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_CALLED_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Array(NamedTuple):
    """Type of an array: bits of an element, and dimensions."""

    bits: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in bytes, without the padding of a layout."""
        return -(-self.size * self.bits // 8)


class Instruction(NamedTuple):
    """One line of a module.

    Attributes:
      name: name, unique in its computation.
      opcode: opcode, such as "convolution" or "all-reduce".
      results: types of its results; several if it returns a tuple.
      operands: names of instructions of the same computation.
      attributes: text after the operands.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, name: str) -> str | None:
        """Returns the text after `name=`, up to a blank or a comma; None if it is not set."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return None if found is None else found[1]


class Module:
    """A compiled module, parsed from its text.

    Args:
      text: text of `compiled.as_text()`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> text = jax.jit(jnp.dot).lower(jnp.ones((2, 3)), jnp.ones((3, 5))).compile().as_text()
      >>> module = Module(text)
      >>> [i.results[0].shape for i, _, times in module.executed() if i.opcode == "dot"]
      [(2, 5)]
    """

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, Instruction]] = {}
        entry, current = "", {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self._computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
            elif found := _INSTRUCTION.match(line):
                instruction = _instruction(*found.groups())
                current[instruction.name] = instruction
        if not entry:
            raise ValueError("the module's text has no entry computation")
        self._entry = entry

    def executed(self) -> Iterator[tuple[Instruction, list[Array], int]]:
        """Yields every instruction, the types of its operands, and the number of times it runs.

        A loop's body runs as often as the compiler knows, or once if it does not; all branches of a
        conditional run.
        """
        yield from self._walk(self._entry, 1)

    def _walk(self, name: str, times: int) -> Iterator[tuple[Instruction, list[Array], int]]:
        instructions = self._computations[name]
        for instruction in instructions.values():
            known = (instructions[operand] for operand in instruction.operands)
            yield instruction, [array for x in known for array in x.results], times
            inner = times * _trip_count(instruction)
            for called in _called(instruction.attributes):
                yield from self._walk(called, inner)


def _instruction(name: str, results: str, opcode: str, rest: str) -> Instruction:
    end = _closing(rest)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    return Instruction(name, opcode, _arrays(results), operands, rest[end + 1 :])


def _closing(text: str) -> int:
    """Returns the index of the parenthesis that closes one opened before the text."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i
    return len(text)


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(_bits(kind), tuple(map(int, dimensions.split(","))) if dimensions else ())
        for kind, dimensions in _ARRAY.findall(text)
    )


@functools.cache
def _bits(kind: str) -> int:
    """Returns the number of bits of an element, from its type's name, such as "bf16" or "f8"."""
    return _BITS[kind] if kind in _BITS else int(re.sub(r"\D", "", kind))


def _trip_count(instruction: Instruction) -> int:
    found = _TRIP_COUNT.search(instruction.attributes) if instruction.opcode == "while" else None
    return 1 if found is None else int(found[1])


def _called(attributes: str) -> list[str]:
    lists = _CALLED_LISTS.findall(attributes)
    return [
        *_CALLED.findall(attributes),
        *(name.strip().lstrip("%") for names in lists for name in names.split(",") if name.strip()),
    ]
