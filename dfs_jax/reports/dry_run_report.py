"""Results of a dry run, as data and as tables for a terminal."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from dfs_jax.costs.chips import CHIPS, Chip, Roofline, roofline
from dfs_jax.costs.compiled import Collective, Memory, Operations
from dfs_jax.tables import aligned

_MIB = 2**20


class DryRun(NamedTuple):
    """Costs of one training step on one device.

    Attributes:
      model, fork, loss: their names in the config.
      rule: name of the gradient rule.
      device_kind: kind of the devices that the step was compiled for.
      mesh: number of devices along each axis.
      devices_per_chip: number of devices per chip, 2 for a TPU v4.
      batch_size: number of images in a step, over all devices.
      bf16: whether blocks compute in bfloat16.
      memory: memory planned by the compiler.
      operations: operations of the compiled module.
      counted_flops: FLOPs of convolutions and matrix products as `traced_step_cost` counts them,
        twice their multiply-adds; None if a step is not a single pass of the exits' summed loss.
      collectives: communication between devices.
    """

    model: str
    fork: str
    loss: str
    rule: str
    device_kind: str
    mesh: dict[str, int]
    devices_per_chip: int
    batch_size: int
    bf16: bool
    memory: Memory
    operations: Operations
    counted_flops: float | None
    collectives: list[Collective]

    @property
    def num_devices(self) -> int:
        """Number of devices in the mesh."""
        return math.prod(self.mesh.values())

    def on_chip(self, chip: Chip) -> Roofline:
        """Returns the estimated time of a step on the same number of chips of a given kind."""
        return roofline(self._share(chip), self.operations, self.collectives, bf16=self.bf16)

    def fits(self, chip: Chip) -> bool:
        """Returns whether the planned memory fits the chip."""
        return self.memory.total <= self._share(chip).memory_bytes

    def _share(self, chip: Chip) -> Chip:
        return Chip(*(value / self.devices_per_chip for value in chip))


_ROOFLINE = ("roofline", "products ms", "memory ms", "links ms", "step ms", "images/s", "memory")


def report(found: DryRun) -> dict[str, Any]:
    """Returns all results as plain data for JSON.

    The fields of `DryRun`, with each named tuple as a dict; `memory` with its `total`, and every
    collective with its `sent_bytes`; and `chips`, for each of `CHIPS` `{"products_s", "memory_s",
    "links_s", "step_s", "bound_by", "images_per_second", "fits"}`.
    """
    return {
        **found._asdict(),
        "num_devices": found.num_devices,
        "memory": {**found.memory._asdict(), "total": found.memory.total},
        "operations": found.operations._asdict(),
        "collectives": [
            {**row._asdict(), "sent_bytes": row.sent_bytes} for row in found.collectives
        ],
        "chips": {name: _on_chip(found, chip) for name, chip in CHIPS.items()},
    }


def table_for_terminal(found: DryRun) -> str:
    """Returns the report as tables with their legends, without a final newline."""
    axes = " x ".join(f"{axis}={size}" for axis, size in found.mesh.items())
    kind = "bfloat16" if found.bf16 else "float32"
    parts = [
        f"One training step: {found.model}, {found.fork}, {found.loss}, {found.rule}; "
        f"{kind}; batch {found.batch_size}",
        f"compiled for {found.num_devices} x {found.device_kind}: {axes}. "
        f"All numbers below are for one device.",
        "",
        aligned([("memory", "MiB"), *_memory_rows(found.memory)], left=(0,)),
        "donated buffers are arguments that outputs overwrite; they count once.",
        "",
        aligned([("operations", "billions"), *_operation_rows(found)], left=(0,)),
        "1 multiply-add = 2 FLOPs.",
        "",
        *_collective_lines(found.collectives),
        "",
        aligned([_ROOFLINE, *(_chip_row(name, found) for name in CHIPS)], left=(0,)),
        "Estimates: this module at each chip's published peaks, with perfect overlap. Real steps "
        "overlap less;",
        "chips that keep arrays in on-chip memory read less.",
    ]
    return "\n".join(parts)


def _memory_rows(memory: Memory) -> list[tuple[str, str]]:
    sizes = {**memory._asdict(), "total": memory.total}
    return [(name, f"{size / _MIB:,.1f}") for name, size in sizes.items()]


def _operation_rows(found: DryRun) -> list[tuple[str, str]]:
    counted, ours = found.operations, found.counted_flops
    rows = [
        ("FLOPs of everything, by XLA", counted.flops),
        ("FLOPs of products, in the module", counted.product_flops),
        ("FLOPs of products, as defined", ours),
        ("bytes read and written, by XLA", counted.bytes_accessed),
    ]
    return [(name, f"{value / 1e9:,.3f}") for name, value in rows if value is not None]


def _collective_lines(collectives: list[Collective]) -> list[str]:
    if not collectives:
        return ["collectives: none"]
    rows = [
        (
            row.kind,
            str(row.devices),
            str(row.count),
            f"{row.bytes / _MIB:,.3f}",
            f"{row.sent_bytes / _MIB:,.3f}",
        )
        for row in collectives
    ]
    return [aligned([("collectives", "devices", "count", "MiB", "sent MiB"), *rows], left=(0,))]


def _chip_row(name: str, found: DryRun) -> tuple[str, ...]:
    chip = CHIPS[name]
    times = found.on_chip(chip)
    return (
        name,
        *(f"{1e3 * seconds:,.3f}" for seconds in (*times, times.step_s)),
        f"{found.batch_size / times.step_s:,.0f}",
        "fits" if found.fits(chip) else "too little",
    )


def _on_chip(found: DryRun, chip: Chip) -> dict[str, Any]:
    times = found.on_chip(chip)
    return {
        **times._asdict(),
        "step_s": times.step_s,
        "bound_by": times.bound_by,
        "images_per_second": found.batch_size / times.step_s,
        "fits": found.fits(chip),
    }
