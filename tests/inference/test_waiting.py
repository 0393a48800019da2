"""Queues before stages: against a plain list, with both kinds of room, whatever comes and goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfs_jax.inference.device_buffer import DeviceBuffer
from dfs_jax.inference.waiting import HostBuffer, Waiting

CAPACITY = 11
EXAMPLE = (jax.ShapeDtypeStruct((2, 3), np.float32), jax.ShapeDtypeStruct((), jnp.bfloat16))


def carry_of(tickets, size):
    """A carry of `size` rows that hold their tickets, the rows beyond them garbage."""
    values = np.full(size, -7.0, np.float32)
    values[: len(tickets)] = tickets
    x = np.broadcast_to(values[:, None, None], (size, 2, 3))
    return jnp.asarray(x), jnp.asarray(values, jnp.bfloat16)


def make(kind):
    return Waiting(lambda: kind(EXAMPLE, CAPACITY), CAPACITY)


def assert_holds(queue, tickets):
    assert queue.count == len(tickets)
    assert queue.free == CAPACITY - len(tickets)
    assert queue.tickets[: queue.count].tolist() == tickets


@pytest.mark.parametrize("kind", [HostBuffer, DeviceBuffer])
@pytest.mark.parametrize("seed", range(3))
def test_equals_a_list(kind, seed):
    """Random batches come, of which some rows stay; random numbers of the first ones leave."""
    rng = np.random.default_rng(seed)
    queue, expected, since, next_ticket = make(kind), [], [], 0
    for now in range(40):
        size = int(rng.choice([1, 4, CAPACITY]))
        rows = np.flatnonzero(rng.random(size) < rng.choice([0.5, 1.0]))[: queue.free]
        tickets = np.arange(next_ticket, next_ticket + size)
        next_ticket = (next_ticket + size) % 200  # bfloat16 holds whole numbers up to 256
        queue.put(carry_of(tickets, size), rows, tickets[rows], float(now))
        expected += tickets[rows].tolist()
        since += [float(now)] * len(rows)
        assert_holds(queue, expected)
        assert queue.since[: queue.count].tolist() == since
        if expected and rng.random() < 0.7:
            n = int(rng.integers(1, len(expected) + 1))
            shape = next(s for s in (1, 4, CAPACITY) if s >= n)
            x, half = jax.device_get(queue.first(n, shape))
            assert x.shape == (shape, 2, 3)
            assert half.dtype == jnp.bfloat16
            for leaf in (x[:n, 0, 0], x[:n, 1, 2], half[:n]):
                assert leaf.astype(int).tolist() == expected[:n]
            queue.drop(n)
            del expected[:n], since[:n]
            assert_holds(queue, expected)


@pytest.mark.parametrize("kind", [HostBuffer, DeviceBuffer])
def test_a_whole_batch_is_passed_on_without_a_copy(kind):
    queue, carry = make(kind), carry_of([3, 5, 7], 4)
    queue.put(carry, np.arange(3), np.array([3, 5, 7]), 0.0)
    assert queue.first(3, 4) is carry
    queue.drop(3)
    assert_holds(queue, [])
    # Into another shape, or behind others, it is copied.
    queue.put(carry, np.arange(3), np.array([3, 5, 7]), 0.0)
    assert queue.first(3, CAPACITY)[0].shape[0] == CAPACITY
    queue.put(carry, np.array([0, 2]), np.array([3, 7]), 0.0)
    assert np.asarray(queue.first(5, CAPACITY)[0])[:5, 0, 0].tolist() == [3, 5, 7, 3, 7]


def test_the_host_reads_in_place():
    """What programs on a CPU read without a copy: memory that starts at a multiple of 64."""
    buffer = HostBuffer(EXAMPLE, CAPACITY)
    for leaf in jax.tree.leaves(buffer.first(4)):
        assert leaf.ctypes.data % 64 == 0
        assert leaf.base is not None
