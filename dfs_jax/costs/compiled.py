"""Costs of a compiled program on one device: memory, operations, communication."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from dfs_jax.costs.hlo import Array, Instruction, Module

# Names of collectives in a module; asynchronous ones end in -start and -done.
ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
ALL_TO_ALL, PERMUTE = "all-to-all", "collective-permute"
COLLECTIVES = (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, PERMUTE)


class Memory(NamedTuple):
    """Memory in bytes that the compiler plans for a program on one device.

    Attributes:
      arguments: size of the inputs.
      outputs: size of the outputs.
      donated: size of outputs that share memory with inputs.
      temporaries: size of intermediate values.
    """

    arguments: int
    outputs: int
    donated: int
    temporaries: int

    @property
    def total(self) -> int:
        """Total; donated memory counts once."""
        return self.arguments + self.outputs - self.donated + self.temporaries


class Operations(NamedTuple):
    """Work of one device.

    Attributes:
      flops: all operations, as counted by XLA; loop bodies count as often as they run.
      bytes_accessed: bytes read and written, as if no output of a fusion stayed on the chip.
      product_flops: operations of convolutions and matrix products, twice their multiply-adds, read
        from the module.
    """

    flops: float
    bytes_accessed: float
    product_flops: int


class Collective(NamedTuple):
    """All collectives of one kind among groups of one size.

    Attributes:
      kind: kind, one of `COLLECTIVES`.
      devices: number of devices in a group.
      count: number of collectives.
      bytes: size of their whole arrays on a device: what is reduced, or has been gathered.
    """

    kind: str
    devices: int
    count: int
    bytes: int

    @property
    def sent_bytes(self) -> float:
        """Least number of bytes that each device sends.

        all-reduce           2 (n-1)/n bytes     all-gather, reduce-scatter, all-to-all   half
        collective-permute   all bytes
        """
        if self.kind == PERMUTE:
            return self.bytes
        share = (self.devices - 1) / self.devices * self.bytes
        return 2 * share if self.kind == ALL_REDUCE else share


def memory(compiled: Any) -> Memory:
    """Returns the memory of a `jax.stages.Compiled`."""
    sizes = compiled.memory_analysis()
    return Memory(
        arguments=sizes.argument_size_in_bytes,
        outputs=sizes.output_size_in_bytes,
        donated=sizes.alias_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
    )


def operations(compiled: Any, module: Module | None = None) -> Operations:
    """Returns the work of a `jax.stages.Compiled`.

    XLA counts the body of a loop once; its figures are scaled as the products are.

    Args:
      compiled: compiled program.
      module: its module, if its text has been read already.
    """
    counted, module = compiled.cost_analysis(), module or Module(compiled.as_text())
    once, always = 0, 0
    for instruction, operands, times in module.executed():
        macs = _multiply_adds(instruction, operands)
        once, always = once + macs, always + times * macs
    scale = always / once if once else 1.0
    flops, accessed = (scale * counted.get(key, 0.0) for key in ("flops", "bytes accessed"))
    return Operations(flops, accessed, 2 * always)


def collectives(module: Module, num_devices: int) -> list[Collective]:
    """Returns the collectives of a program, largest first.

    Args:
      module: module of one device's program.
      num_devices: number of devices that run it.
    """
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for instruction, operands, times in module.executed():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        key = kind, _group_size(instruction, num_devices)
        count, size = found.get(key, (0, 0))
        found[key] = count + times, size + times * _whole_bytes(kind, instruction, operands)
    rows = [Collective(*key, *sums) for key, sums in found.items() if key[1] > 1]
    return sorted(rows, key=lambda row: -row.bytes)


def _whole_bytes(kind: str, instruction: Instruction, operands: Sequence[Array]) -> int:
    read = sum(array.bytes for array in operands)
    if kind != ALL_GATHER:
        return read
    # An asynchronous collective also returns its operands.
    written = sum(array.bytes for array in instruction.results)
    return written - read if instruction.opcode.endswith("-start") else written


def _group_size(instruction: Instruction, num_devices: int) -> int:
    """Returns the number of devices in a group; 1 if they do not communicate."""
    attributes = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{(\{[^=]*?\})\}", attributes):
        moves = re.findall(r"(\d+),(\d+)", pairs[1])
        return num_devices if any(a != b for a, b in moves) else 1
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        # Part of an axis: 'axis_0':(1)2 has 2 of its devices.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return num_devices


def _multiply_adds(instruction: Instruction, operands: Sequence[Array]) -> int:
    """Counts like `dfs_jax.tracing.traced.multiply_adds`, except for zeros of a dilation."""
    if instruction.opcode == "dot":
        axes = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")
        shape = operands[0].shape
        return instruction.results[0].size * math.prod(shape[int(axis)] for axis in axes)
    if instruction.opcode != "convolution":
        return 0
    kernel = operands[1].shape
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
    by_label = dict(zip(labels[1], kernel, strict=True)) if labels else {}
    contracted = math.prod(size for label, size in by_label.items() if label != "o")
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    dilated = re.search(r"lhs_dilate=([\dx]+)", window[1]) if window else None
    zeros = math.prod(map(int, dilated[1].split("x"))) if dilated else 1
    return instruction.results[0].size * contracted // zeros
