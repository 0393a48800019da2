"""Specifications of chips, and a roofline estimate of a step's time on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dfs_jax.costs.compiled import Collective, Operations

GB, GIB = 10**9, 2**30


class Chip(NamedTuple):
    """Specification of a chip by its maker, in bytes, and bytes and operations per second.

    Attributes:
      bf16_flops: peak of dense matrix products in bfloat16.
      float32_flops: peak in float32 at JAX's default precision: one pass of bfloat16 on a TPU,
        TensorFloat-32 on a GPU.
      memory_bytes: size of its memory.
      memory_bandwidth: bandwidth to its memory.
      link_bandwidth: bandwidth to other chips, in one direction, over all links together.
    """

    bf16_flops: float
    float32_flops: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float


# TPUs: docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e; their link bandwidths count both
# directions (v4, in an older form, 2,400 Gbit/s for one) and are halved here. GPUs: NVIDIA's data
# sheets of the A100 80GB SXM and the H100 SXM, without sparsity; NVLink's are halved likewise.
CHIPS = {
    "v4": Chip(275e12, 275e12, 32 * GIB, 1200 * GB, 300 * GB),
    "v5e": Chip(197e12, 197e12, 16 * GB, 819 * GB, 200 * GB),
    "v5p": Chip(459e12, 459e12, 95 * GB, 2765 * GB, 600 * GB),
    "v6e": Chip(918e12, 918e12, 32 * GB, 1638 * GB, 400 * GB),
    "A100": Chip(312e12, 156e12, 80 * GB, 2039 * GB, 300 * GB),
    "H100": Chip(989e12, 494e12, 80 * GB, 3350 * GB, 450 * GB),
}


class Roofline(NamedTuple):
    """Time in seconds that a chip needs for each part of a step, without any other limit.

    Attributes:
      products_s: time of convolutions and matrix products at the peak.
      memory_s: time of memory traffic at full bandwidth; less if data stay on the chip.
      links_s: time of communication with other chips at full bandwidth.
    """

    products_s: float
    memory_s: float
    links_s: float

    @property
    def step_s(self) -> float:
        """Time of the step if all parts overlap perfectly: the longest of them."""
        return max(self)

    @property
    def bound_by(self) -> str:
        """Part that takes the longest: "products", "memory" or "links"."""
        longest = max(self._fields, key=lambda part: getattr(self, part))
        return longest.removesuffix("_s")


def roofline(
    chip: Chip,
    operations: Operations,
    collectives: Sequence[Collective],
    *,
    bf16: bool = False,
) -> Roofline:
    """Returns the time for the work of one device, which is one chip.

    Args:
      chip: chip of `CHIPS`, or your own.
      operations: operations of one device.
      collectives: collectives in which it takes part.
      bf16: whether products are in bfloat16.

    Example: 197 TFLOPs of products, half a second of memory traffic, nothing sent.
      >>> roofline(CHIPS["v5e"], Operations(2e14, 4.095e11, 197 * 10**12), [])
      Roofline(products_s=1.0, memory_s=0.5, links_s=0.0)

    Reference: Williams et al., "Roofline", CACM 2009.
    """
    peak = chip.bf16_flops if bf16 else chip.float32_flops
    sent = sum(collective.sent_bytes for collective in collectives)
    return Roofline(
        operations.product_flops / peak,
        operations.bytes_accessed / chip.memory_bandwidth,
        sent / chip.link_bandwidth,
    )
