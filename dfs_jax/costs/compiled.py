"""What a compiled program costs one device: memory, operations, and what it exchanges."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from dfs_jax.costs.hlo import Array, Instruction, Module

# Names of collectives in a module; those that begin and end apart have -start and -done behind.
ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
ALL_TO_ALL, PERMUTE = "all-to-all", "collective-permute"
COLLECTIVES = (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, PERMUTE)


class Memory(NamedTuple):
    """Bytes of one device that the compiler plans for a program.

    Attributes:
      arguments: what goes in.
      outputs: what comes out.
      donated: outputs that lie where arguments did.
      temporaries: what is needed in between.
    """

    arguments: int
    outputs: int
    donated: int
    temporaries: int

    @property
    def total(self) -> int:
        """All of it; what is donated counts once."""
        return self.arguments + self.outputs - self.donated + self.temporaries


class Operations(NamedTuple):
    """Work of one device.

    Attributes:
      flops: of everything, as XLA counts; loop bodies as often as they run.
      bytes_accessed: read and written, as if nothing that a fusion returns stayed on the chip.
      product_flops: of convolutions and matrix products alone, twice their multiply-adds, read from
        the module.
    """

    flops: float
    bytes_accessed: float
    product_flops: int


class Collective(NamedTuple):
    """All collectives of one kind among groups of one size.

    Attributes:
      kind: of `COLLECTIVES`.
      devices: in a group.
      count: how many run.
      bytes: of their arrays, a device's whole ones: what is reduced, or has been gathered.
    """

    kind: str
    devices: int
    count: int
    bytes: int

    @property
    def sent_bytes(self) -> float:
        """What each device sends at least.

        all-reduce           2 (n-1)/n bytes     all-gather, reduce-scatter, all-to-all   half
        collective-permute   all bytes
        """
        if self.kind == PERMUTE:
            return self.bytes
        share = (self.devices - 1) / self.devices * self.bytes
        return 2 * share if self.kind == ALL_REDUCE else share


def memory(compiled: Any) -> Memory:
    """Returns the memory that a `jax.stages.Compiled` takes."""
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
      compiled: the program.
      module: its text, where it has been read already.
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
    """Returns what the devices exchange, the most bytes first.

    Args:
      module: of one device's program.
      num_devices: that run it.
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
    # One that begins apart returns its operands, too.
    written = sum(array.bytes for array in instruction.results)
    return written - read if instruction.opcode.endswith("-start") else written


def _group_size(instruction: Instruction, num_devices: int) -> int:
    """Returns how many devices take part; one where each goes on alone."""
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
        # An axis, or a part of it: 'axis_0':(1)2 are 2 of its devices.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return num_devices


def _multiply_adds(instruction: Instruction, operands: Sequence[Array]) -> int:
    """Counts as `dfs_jax.tracing.traced.multiply_adds` does, but zeros of no dilation."""
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
