"""What a compiled program costs: memory, operations, collectives."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from dfs_jax.costs.compiled import Collective, collectives, memory, operations
from dfs_jax.costs.hlo import Module

LAYOUT = ("NHWC", "HWIO", "NHWC")


def compiled(function, *shapes, **options):
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function, **options).lower(*inputs).compile()


def test_memory_counts_what_is_donated_once():
    found = memory(compiled(lambda x: x + 1, (1024,), donate_argnums=0))
    assert (found.arguments, found.donated) == (4096, 4096)
    assert found.total == found.outputs + found.temporaries


def conv(stride=1, groups=1):
    def function(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            "SAME",
            dimension_numbers=LAYOUT,
            feature_group_count=groups,
        )

    return function


IMAGES = (2, 8, 8, 6)
DEFINED = 2 * 8 * 8 * 10 * 3 * 3 * 6


@pytest.mark.parametrize(
    ("function", "shapes", "macs"),
    [
        (jnp.matmul, ((3, 5), (5, 7)), 3 * 5 * 7),
        (jnp.matmul, ((2, 3, 5), (2, 5, 7)), 2 * 3 * 5 * 7),
        (conv(), (IMAGES, (3, 3, 6, 10)), DEFINED),
        (conv(stride=2), (IMAGES, (3, 3, 6, 10)), DEFINED // 4),
        (conv(groups=2), (IMAGES, (3, 3, 3, 10)), DEFINED // 2),
        (jax.grad(lambda x, k: conv()(x, k).sum() ** 2, 1), (IMAGES, (3, 3, 6, 10)), 2 * DEFINED),
        (
            jax.grad(lambda x, k: jnp.sum(conv(stride=2)(x, k) ** 2), (0, 1)),
            (IMAGES, (3, 3, 6, 10)),
            3 * DEFINED // 4,
        ),
        (lambda x: lax.scan(lambda x, _: (jnp.tanh(x @ x), 0), x, None, length=4), ((3, 3),), 108),
    ],
)
def test_products_in_a_module(function, shapes, macs):
    assert operations(compiled(function, *shapes)).product_flops == 2 * macs


def test_xlas_own_count_grows_with_the_length_of_a_loop():
    def loop(length):
        return compiled(lambda x: lax.scan(lambda x, _: (x @ x, 0), x, None, length=length), (9, 9))

    short, long = operations(loop(3)), operations(loop(30))
    assert long.flops == pytest.approx(10 * short.flops, rel=0.1)
    assert operations(compiled(jnp.sin, (7,))).product_flops == 0


GROUPS = {
    "replica_groups={{0,1,2,3},{4,5,6,7}}": 4,
    "replica_groups={{0,1}}, use_global_device_ids=true": 2,
    "replica_groups=[2,4]<=[8]": 4,
    "replica_groups=[4,2]<=[2,4]T(1,0)": 2,
    "replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}": 8,
    "replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}": 4,
    "replica_groups=mesh['a'=8,'b'=2] {'a':(1)4,'b'}": 8,
    "replica_groups={}": 8,
}


def module(line):
    return Module(
        f"ENTRY %main (p: f32[64]) -> f32[64] {{\n  %p = f32[64] parameter(0)\n{line}\n}}"
    )


@pytest.mark.parametrize(("groups", "devices"), GROUPS.items())
def test_groups_of_devices(groups, devices):
    line = f"  ROOT %r = f32[64] all-reduce(%p), channel_id=1, {groups}"
    assert collectives(module(line), 8) == [Collective("all-reduce", devices, 1, 256)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%r = f32[256] all-gather(%p), replica_groups=[2,4]<=[8]", ("all-gather", 4, 1, 1024)),
        (
            "%r = (f32[64], f32[256]) all-gather-start(%p), replica_groups=[2,4]<=[8]",
            ("all-gather", 4, 1, 1024),
        ),
        (
            "%r = f32[16] reduce-scatter(%p), replica_groups=[2,4]<=[8]",
            ("reduce-scatter", 4, 1, 256),
        ),
        (
            "%r = f32[64] collective-permute(%p), source_target_pairs={{0,1},{1,0}}",
            ("collective-permute", 8, 1, 256),
        ),
    ],
)
def test_bytes_of_collectives(line, expected):
    assert collectives(module(f"  ROOT {line}"), 8) == [Collective(*expected)]


def test_what_exchanges_nothing_is_left_out():
    alone = "  ROOT %r = f32[64] all-reduce(%p), replica_groups=[8,1]<=[8]"
    assert collectives(module(alone), 8) == []
    ended = "  ROOT %r = f32[64] all-reduce-done(%p)"
    assert collectives(module(ended), 8) == []


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-reduce", 2 * 75),
        ("all-gather", 75),
        ("reduce-scatter", 75),
        ("all-to-all", 75),
        ("collective-permute", 100),
    ],
)
def test_what_a_device_sends(kind, sent):
    assert Collective(kind, 4, 1, 100).sent_bytes == sent
