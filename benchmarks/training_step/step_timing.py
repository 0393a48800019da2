"""Times the parts of training steps side by side: every program in turn, round after round.

What disturbs a machine then disturbs all programs alike, so that their ratios hold where their
times do not. Any framework can stand in a row: what is timed are plain functions.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from dfs_jax.costs.compiled import memory
from dfs_jax.data.augmentation import normalise
from dfs_jax.data.pipeline import train_batches
from dfs_jax.gradients import Batch, Trained
from dfs_jax.gradients.summed import summed_loss
from dfs_jax.stopwatch import median_seconds
from dfs_jax.training.experiment import Experiment, initial_state, training_step
from dfs_jax.training.passes import make_step_parts
from dfs_jax.training.sharding import jit_for_mesh, put_batch, replicated
from dfs_jax.training.state import TrainState
from dfs_jax.training.step import step_keys
from dfs_jax.types import PyTree

Program = Callable[[], Any]

_MIB = 2**20


class StepPrograms(NamedTuple):
    """The parts of one training step as functions that return when the work is done.

    `step` does all that `forward_backward` does and that all that `forward` does, each from a batch
    of uint8 images that is on the device already. What they return is for whoever wants to look.

    Attributes:
      forward: normalises the images and computes the summed losses in training mode.
      forward_backward: and their gradient, the exits' own ones combined where a method does so;
        of a method that looks ahead, its trials and the optimizer's updates too.
      step: and the optimizer's update and the sums of accuracies: the whole step. Takes a number of
        steps (1 by default), and waits for the last one alone.
      data: makes the next batch and puts it on the device.
      compile_s: seconds to trace and compile the step, nothing of it kept from earlier; None for
        frameworks that compile nothing.
      peak_mib: memory of the compiled step: arguments, outputs and temporaries, donated buffers
        counted once; None where the framework does not say.
    """

    forward: Program
    forward_backward: Program
    step: Callable[..., Any]
    data: Program
    compile_s: float | None = None
    peak_mib: float | None = None


class StepTimes(NamedTuple):
    """Milliseconds of the parts of one step.

    Attributes:
      forward_ms: the losses.
      backward_ms: what their gradient adds.
      other_ms: what the rest of the step adds: optimizer, accuracies.
      step_ms: the whole step.
      data_ms: making a batch, beside the step.
    """

    forward_ms: float
    backward_ms: float
    other_ms: float
    step_ms: float
    data_ms: float


def time_steps(rows: Sequence[StepPrograms], repeats: int) -> list[StepTimes]:
    """Times all parts of all rows in turn and returns the medians, as differences of parts.

    Args:
      rows: the programs to compare.
      repeats: rounds, in each of which every program runs once.

    Example:
      >>> def wait():
      ...     time.sleep(0.002)
      >>> times, = time_steps([StepPrograms(wait, wait, wait, wait)], repeats=3)
      >>> times.step_ms >= 2
      True
    """
    parts = [(row.forward, row.forward_backward, row.step, row.data) for row in rows]
    seconds = iter(median_seconds([program for row in parts for program in row], repeats))
    times = []
    for _ in parts:
        forward, both, step, data = (1e3 * next(seconds) for _ in range(4))
        times.append(StepTimes(forward, both - forward, step - both, step, data))
    return times


def available_cores() -> int:
    """Returns how many cores this process may use, which is what XLA takes."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # systems without affinities


def compile_step(experiment: Experiment, *, plain_jit: bool = False) -> StepPrograms:
    """Compiles the parts of an experiment's own training step and returns them, ready to run.

    Args:
      experiment: whose step it is.
      plain_jit: compile as `jax.jit` does by itself, without this package's options.
    """
    batches = train_batches(experiment.dataset.train, experiment.sampler)
    images, labels = put_batch(next(batches), experiment.mesh)
    state = initial_state(experiment)
    step: Any = training_step(experiment)
    if plain_jit:
        step = jax.jit(step.__wrapped__, donate_argnums=0)  # ours rewrites programs inside
    how = {"mesh": experiment.mesh, "runs": experiment.model}
    jit = jax.jit if plain_jit else functools.partial(jit_for_mesh, **how)
    step, seconds = _compile_cold(step, state, images, labels)
    forward, forward_backward = (
        jit(function, out_shardings=replicated(experiment.mesh))
        .lower(state, images, labels)
        .compile()
        for function in _loss_functions(experiment)
    )
    kept = jax.tree.map(jnp.copy, state)  # for those that leave no next state

    def make_batch() -> None:
        jax.block_until_ready(put_batch(next(batches), experiment.mesh))

    return StepPrograms(
        forward=lambda: jax.block_until_ready(forward(kept, images, labels)),
        forward_backward=lambda: jax.block_until_ready(forward_backward(kept, images, labels)),
        step=_stepping(step, state, images, labels),
        data=make_batch,
        compile_s=seconds,
        peak_mib=memory(step).total / _MIB,
    )


class WholeStep(NamedTuple):
    """A compiled training step, ready to run.

    Attributes:
      run: takes a number of steps (1 by default), waits for the last one alone, and returns the
        state after it.
      compiled: the program.
      compile_s: seconds to trace and compile it, less where it came from the cache.
    """

    run: Callable[..., TrainState]
    compiled: Any
    compile_s: float


def compile_whole_step(experiment: Experiment) -> WholeStep:
    """Compiles an experiment's own training step, or takes it from the cache.

    It takes one batch again and again.
    """
    images, labels = put_batch(
        next(train_batches(experiment.dataset.train, experiment.sampler)), experiment.mesh
    )
    state = initial_state(experiment)
    begin = time.perf_counter()
    step = training_step(experiment).lower(state, images, labels).compile()
    seconds = time.perf_counter() - begin
    return WholeStep(_stepping(step, state, images, labels), step, seconds)


def _stepping(
    step: Any, state: TrainState, images: jax.Array, labels: jax.Array
) -> Callable[..., TrainState]:
    running = [state]  # the step takes it over and leaves the next one

    def run(steps: int = 1) -> TrainState:
        for _ in range(steps):
            running[0] = step(running[0], images, labels)
        return jax.block_until_ready(running[0])

    return run


def _loss_functions(experiment: Experiment) -> tuple[Callable, Callable]:
    """Returns the losses, and the losses with their gradient, of the training step."""
    e = experiment
    parts = make_step_parts(e.model, e.fork, e.loss, e.optimizer, e.config.gradients.exits)
    if not e.rule.looks_ahead:  # the optimizer's update is not part of the backward pass
        parts = parts._replace(update=lambda trained, grads: (trained, grads))
    rule_step = e.rule.wrap(parts)

    total_loss = summed_loss(e.model, e.fork)

    def prepared(state: TrainState, images: jax.Array, labels: jax.Array) -> Batch:
        keys = step_keys(state)
        pixels = normalise(e.augment(images, keys.augment), e.dataset.mean, e.dataset.std)
        return Batch(pixels, labels, keys.dropout, keys.rule)

    def forward(state: TrainState, images: jax.Array, labels: jax.Array):
        batch = prepared(state, images, labels)
        total, (_, stats) = total_loss(state.params, state.batch_stats, batch, e.loss)
        return total, stats

    def forward_backward(state: TrainState, images: jax.Array, labels: jax.Array):
        trained = Trained(state.params, state.batch_stats, state.opt_state)
        return rule_step(trained, state.rule_state, prepared(state, images, labels))

    return forward, forward_backward


def _compile_cold(step: Any, *arguments: PyTree) -> tuple[Any, float]:
    """Compiles as on a machine that never saw the program; returns it and the seconds taken."""
    with _without_compilation_cache():
        begin = time.perf_counter()
        compiled = step.lower(*arguments).compile()
        return compiled, time.perf_counter() - begin


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    enabled = jax.config.values["jax_enable_compilation_cache"]
    # Whether there is a cache is asked once and remembered, until it is reset.
    _enable_compilation_cache(False)
    try:
        yield
    finally:
        _enable_compilation_cache(enabled)


def _enable_compilation_cache(enable: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", enable)
    compilation_cache.reset_cache()
