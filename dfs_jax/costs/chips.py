"""Named chips, and a guess of what a step takes on them: the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dfs_jax.costs.compiled import Collective, Operations

GB, GIB = 10**9, 2**30


class Chip(NamedTuple):
    """What its maker says of a chip; bytes and operations a second.

    Attributes:
      bf16_flops: peak of dense matrix products of bfloat16.
      float32_flops: the same of float32 at the precision that JAX has by default: one pass of
        bfloat16 on a TPU, TensorFloat-32 on a GPU.
      memory_bytes: of its own memory.
      memory_bandwidth: to that memory.
      link_bandwidth: to other chips, in one direction, all links together.
    """

    bf16_flops: float
    float32_flops: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float


# TPUs: docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e; they give the links of both directions
# together (v4, in an older form, 2,400 Gbit/s of one), halved here. GPUs: NVIDIA's data sheets of
# the A100 80GB SXM and the H100 SXM, without sparsity; NVLink's both directions halved likewise.
CHIPS = {
    "v4": Chip(275e12, 275e12, 32 * GIB, 1200 * GB, 300 * GB),
    "v5e": Chip(197e12, 197e12, 16 * GB, 819 * GB, 200 * GB),
    "v5p": Chip(459e12, 459e12, 95 * GB, 2765 * GB, 600 * GB),
    "v6e": Chip(918e12, 918e12, 32 * GB, 1638 * GB, 400 * GB),
    "A100": Chip(312e12, 156e12, 80 * GB, 2039 * GB, 300 * GB),
    "H100": Chip(989e12, 494e12, 80 * GB, 3350 * GB, 450 * GB),
}


class Roofline(NamedTuple):
    """The seconds that a chip needs for each part of a step, if nothing else held it up.

    Attributes:
      products_s: convolutions and matrix products, at the peak.
      memory_s: what is read and written, at the full bandwidth; less where it stays on the chip.
      links_s: what is sent to other chips, at the full bandwidth.
    """

    products_s: float
    memory_s: float
    links_s: float

    @property
    def step_s(self) -> float:
        """The longest of them: all at once, perfectly overlapped."""
        return max(self)

    @property
    def bound_by(self) -> str:
        """Which one that is: "products", "memory" or "links"."""
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
      chip: of `CHIPS`, or one's own.
      operations: of one device.
      collectives: that it takes part in.
      bf16: whether products are of bfloat16.

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
