"""Times the parts of training steps: every program in turn, round after round.

Disturbances of the machine then affect all programs equally, so that ratios are more reliable than
times. The programs are plain functions, of any framework.
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

    `step` includes the work of `forward_backward`, and that includes the work of `forward`; each
    starts from a batch of uint8 images on the device. Results are returned for inspection only.

    Attributes:
      forward: normalises the images and computes the summed losses in training mode.
      forward_backward: also computes gradients, combined if the method combines those of exits; for
        a method that looks ahead, it includes trial steps and the optimizer's updates.
      step: also runs the optimizer's update and sums accuracies: the whole step. Takes a number of
        steps (1 by default), and waits only for the last one.
      data: makes the next batch and copies it to the device.
      compile_s: seconds to trace and compile the step without any cache; None for frameworks that
        do not compile.
      peak_mib: memory of the compiled step: arguments, outputs and temporaries, with donated
        buffers counted once; None if the framework does not report it.
    """

    forward: Program
    forward_backward: Program
    step: Callable[..., Any]
    data: Program
    compile_s: float | None = None
    peak_mib: float | None = None


class StepTimes(NamedTuple):
    """Times of the parts of one step in milliseconds.

    Attributes:
      forward_ms: time of the losses.
      backward_ms: additional time of their gradient.
      other_ms: additional time of the rest of the step: optimizer, accuracies.
      step_ms: time of the whole step.
      data_ms: time to make a batch, which is not part of the step.
    """

    forward_ms: float
    backward_ms: float
    other_ms: float
    step_ms: float
    data_ms: float


def time_steps(rows: Sequence[StepPrograms], repeats: int) -> list[StepTimes]:
    """Times all parts of all rows in turn and returns the medians, as differences of parts.

    Args:
      rows: programs to compare.
      repeats: number of rounds, in each of which every program runs once.

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
    """Returns the number of cores that this process may use, which XLA also uses."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # systems without affinities


def compile_step(experiment: Experiment, *, plain_jit: bool = False) -> StepPrograms:
    """Compiles the parts of an experiment's own training step and returns them, ready to run.

    Args:
      experiment: experiment of the step.
      plain_jit: whether to compile like plain `jax.jit`, without this package's options.
    """
    batches = train_batches(experiment.dataset.train, experiment.sampler)
    images, labels = put_batch(next(batches), experiment.mesh)
    state = initial_state(experiment)
    step: Any = training_step(experiment)
    if plain_jit:
        step = jax.jit(step.__wrapped__, donate_argnums=0)  # `__wrapped__` avoids our rewriting
    how = {"mesh": experiment.mesh, "runs": experiment.model}
    jit = jax.jit if plain_jit else functools.partial(jit_for_mesh, **how)
    step, seconds = _compile_cold(step, state, images, labels)
    forward, forward_backward = (
        jit(function, out_shardings=replicated(experiment.mesh))
        .lower(state, images, labels)
        .compile()
        for function in _loss_functions(experiment)
    )
    kept = jax.tree.map(jnp.copy, state)  # for programs that do not return the next state

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
      run: takes a number of steps (1 by default), waits only for the last one, and returns the
        state after it.
      compiled: compiled program.
      compile_s: seconds to trace and compile it, less if it came from the cache.
    """

    run: Callable[..., TrainState]
    compiled: Any
    compile_s: float


def compile_whole_step(experiment: Experiment) -> WholeStep:
    """Compiles an experiment's own training step, or loads it from the cache.

    All steps use the same batch.
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
    running = [state]  # donated to the step, and replaced by its result

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
    """Compiles as if the program were new to the machine; returns it and the time in seconds."""
    with _without_compilation_cache():
        begin = time.perf_counter()
        compiled = step.lower(*arguments).compile()
        return compiled, time.perf_counter() - begin


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    enabled = jax.config.values["jax_enable_compilation_cache"]
    # JAX decides once whether to use the cache, until it is reset.
    _enable_compilation_cache(False)
    try:
        yield
    finally:
        _enable_compilation_cache(enabled)


def _enable_compilation_cache(enable: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", enable)
    compilation_cache.reset_cache()
