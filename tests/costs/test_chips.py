"""Named chips and their roofline."""

import pytest

from dfs_jax.costs.chips import CHIPS, Chip, Roofline, roofline
from dfs_jax.costs.compiled import Collective, Operations

CHIP = Chip(200, 100, memory_bytes=7, memory_bandwidth=10, link_bandwidth=5)


def test_each_part_at_its_own_peak():
    work = Operations(flops=1e9, bytes_accessed=30, product_flops=400)
    sent = [Collective("all-gather", 4, 1, 40), Collective("all-reduce", 2, 1, 20)]
    assert roofline(CHIP, work, sent) == Roofline(4.0, 3.0, 10.0)
    assert roofline(CHIP, work, sent, bf16=True) == Roofline(2.0, 3.0, 10.0)


@pytest.mark.parametrize(
    ("times", "step_s", "bound_by"),
    [
        (Roofline(3, 2, 1), 3, "products"),
        (Roofline(1, 3, 2), 3, "memory"),
        (Roofline(1, 2, 3), 3, "links"),
    ],
)
def test_the_longest_part_is_the_step(times, step_s, bound_by):
    assert (times.step_s, times.bound_by) == (step_s, bound_by)


def test_chips_have_likely_numbers():
    assert {"v4", "v5e", "v5p", "v6e", "A100", "H100"} <= set(CHIPS)
    for chip in CHIPS.values():
        assert chip.float32_flops <= chip.bf16_flops
        assert 1e13 < chip.bf16_flops < 1e16
        assert 1e10 < chip.memory_bytes < 1e12
        assert chip.link_bandwidth < chip.memory_bandwidth < chip.bf16_flops
