"""Timing of programs in turn, and of a training step's parts: forward, backward, the rest."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.training_step import step_timing
from benchmarks.training_step.step_timing import (
    StepPrograms,
    compile_step,
    compile_whole_step,
    time_steps,
)
from dfs_jax.stopwatch import median_seconds
from dfs_jax.training.experiment import build_experiment, initial_state
from tests.support.helpers import tiny_config


class FakeClock:
    """Time that passes only while a program runs, each run as long as its list says."""

    def __init__(self, monkeypatch):
        self.now, self.ran = 0.0, []
        monkeypatch.setattr(step_timing.time, "perf_counter", lambda: self.now)

    def program(self, name, *seconds):
        lengths = iter(seconds)

        def run():
            self.now += next(lengths)
            self.ran.append(name)

        return run


def test_programs_run_in_turn_and_the_order_alternates(monkeypatch):
    clock = FakeClock(monkeypatch)
    programs = [clock.program("a", 99, 3, 1, 8), clock.program("b", 99, 5, 7, 6)]
    assert median_seconds(programs, 3) == [3, 6]  # the first run of each is not counted
    assert "".join(clock.ran) == "ab" + "ab" + "ba" + "ab"


def test_parts_are_differences(monkeypatch):
    clock = FakeClock(monkeypatch)
    lengths = [(0.25, 0.75, 0.875, 0.5), (1, 3, 7, 2)]
    rows = [StepPrograms(*(clock.program("", s, s) for s in row)) for row in lengths]
    assert time_steps(rows, 1) == [(250, 500, 125, 875, 500), (1000, 2000, 4000, 7000, 2000)]


@pytest.fixture(scope="module")
def tiny():
    """An experiment on a network of two convolutions, and its compiled step."""
    changes = {"model.name": "tests.support.helpers:TinyNetwork", "model.width": 3}
    experiment = build_experiment(tiny_config(**changes, **{"optimizer.weight_decay": 0.01}))
    return experiment, compile_step(experiment)


def test_the_parts_are_those_of_the_training_step(tiny):
    experiment, programs = tiny
    loss, _ = programs.forward()
    found = programs.forward_backward()
    stepped = programs.step()
    examples = experiment.config.batch_size
    assert float(found.loss) == pytest.approx(float(loss), rel=1e-6)
    assert float(stepped.totals.loss) == pytest.approx(examples * float(loss), rel=1e-5)
    rate, decay = experiment.config.optimizer.learning_rate, 0.01
    start = initial_state(experiment).params
    expected = jax.tree.map(lambda w, g: w - rate * (g + decay * w), start, found.updates)
    for ours, other in zip(jax.tree.leaves(stepped.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-6)
    # The step goes on from its own result, the others stay where they are.
    assert int(programs.step().step) == 2
    assert float(programs.forward()[0]) == float(loss)
    programs.data()


def test_a_whole_step_is_the_same_and_goes_on(tiny):
    experiment, _ = tiny
    whole, parts = compile_whole_step(experiment).run, compile_step(experiment)
    for number in (1, 2):
        ours, other = whole(), parts.step()
        assert int(ours.step) == number
        chex.assert_trees_all_equal(ours.params, other.params)


def test_a_plain_step_is_compiled_without_options(tiny, monkeypatch):
    experiment, programs = tiny
    monkeypatch.setattr(step_timing, "jit_for_mesh", None)  # it would give them
    plain = compile_step(experiment, plain_jit=True)
    assert float(plain.forward()[0]) == pytest.approx(float(programs.forward()[0]), rel=1e-5)
    assert int(plain.step().step) == 1


def test_compilation_and_memory(tiny):
    experiment, programs = tiny
    assert programs.compile_s > 0
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(initial_state(experiment)))
    assert state_bytes < programs.peak_mib * 2**20 < 2**20


def test_the_measured_compilation_leaves_the_cache_alone(tmp_path):
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        arguments = (jnp.zeros(7),)
        step_timing._compile_cold(jax.jit(lambda x: x * 3 + 1), *arguments)
        assert not list(tmp_path.iterdir())
        jax.jit(lambda x: x * 5 - 1).lower(*arguments).compile()
        assert list(tmp_path.iterdir())
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        step_timing.compilation_cache.reset_cache()
