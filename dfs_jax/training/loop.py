"""The training run: epochs of steps, evaluations, checkpoints, and a clean end at any moment."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dfs_jax.data import Dataset
from dfs_jax.data.pipeline import train_batches
from dfs_jax.guard import usual_numerics
from dfs_jax.paths import input_file, output_directory
from dfs_jax.training.checkpoint import Checkpoints, has_steps
from dfs_jax.training.config import check_config, open_workdir
from dfs_jax.training.conflict import ConflictProbe, conflict_line
from dfs_jax.training.data_changes import as_known
from dfs_jax.training.evaluate import evaluate
from dfs_jax.training.experiment import (
    Experiment,
    abstract_state,
    build_experiment,
    evaluation_step,
    initial_state,
    training_step,
)
from dfs_jax.training.lock import WorkdirLock, locked
from dfs_jax.training.metrics import (
    MetricsWriter,
    NoMetrics,
    evaluation_line,
    mean_exit_accuracy,
    training_line,
)
from dfs_jax.training.processes import is_writer
from dfs_jax.training.progress import Progress
from dfs_jax.training.run_data import RunData, describe_data, known_data, record_data
from dfs_jax.training.sharding import put_batch, put_replicated, rows_here
from dfs_jax.training.signals import StopSignals
from dfs_jax.training.state import NO_BAD_STEP, EpochTotals, TrainState
from dfs_jax.types import Config, UserError


class TrainResult(NamedTuple):
    """How a run ended: after its last step, or stopped by a signal (its number) and resumable.

    A run that was stopped by its event has `signal.SIGINT` there, and `signal.SIGPIPE` one whose
    standard output nobody reads any more.
    """

    experiment: Experiment
    step: int
    stopped_by: int | None


def train(
    config: Config,
    workdir: Path,
    dataset: Dataset | None = None,
    *,
    accept_data_changes: bool = False,
    stop: threading.Event | None = None,
) -> TrainResult:
    """Trains as `config` says, in `workdir`; picks up where an interrupted run left off.

    Started again with the same config, a run that was stopped at any moment ends with the same
    parameters and metrics, bit for bit, as one that never was (on the same machine and devices).

    Args:
      config: configuration of the run.
      workdir: directory of the run.
      dataset: data set of the config, if it is in memory already; None reads it.
      accept_data_changes: whether to go on where the data changed since the run began, as far as
        that is possible (see `dfs_jax.training.data_changes`).
      stop: an event that, once set, stops the run as Ctrl-C does; the way to stop one that does not
        train in the main thread, where alone Python receives signals.

    Raises:
      UserError: a mistake in the config or the directory, another process that trains there, data
        that changed since the run began, a checkpoint of another network, or a loss that became
        non-finite.
    """
    check_config(config)
    workdir = output_directory(workdir, "workdir")
    if config.init_from is not None and not has_steps(workdir):
        input_file(config.init_from, "init_from")
    with usual_numerics(), locked(workdir) as lock:
        return _train(config, workdir, dataset, accept_data_changes, StopSignals(stop), lock)


def _train(
    config: Config,
    workdir: Path,
    dataset: Dataset | None,
    accept_data_changes: bool,
    stop_signals: StopSignals,
    lock: WorkdirLock,
) -> TrainResult:
    open_workdir(workdir, config)
    known = known_data(workdir)
    as_before = functools.partial(
        _as_before, known=known, workdir=workdir, section=config.data, accept=accept_data_changes
    )
    experiment = build_experiment(config, dataset, prepare=as_before)
    record_data(workdir, describe_data(experiment.dataset, config.data))
    checkpoints = Checkpoints(workdir)
    restored = checkpoints.restore_latest(abstract_state(experiment))
    state, start = restored or (initial_state(experiment), 0)
    with stop_signals as signals:
        metrics = MetricsWriter(workdir, start) if is_writer() else NoMetrics()
        run = _Run(experiment, checkpoints, metrics, signals, lock)
        try:
            return run.steps(state, start)
        finally:
            run.close()


def _as_before(dataset: Dataset, *, known: RunData | None, **options: Any) -> Dataset:
    return dataset if known is None else as_known(dataset, known, **options)


class _Run:
    """One process's part of a run: the loop and what it writes."""

    def __init__(
        self,
        experiment: Experiment,
        checkpoints: Checkpoints,
        metrics: MetricsWriter | NoMetrics,
        signals: StopSignals,
        lock: WorkdirLock,
    ):
        self._experiment = experiment
        self._config = experiment.config
        self._checkpoints = checkpoints
        self._metrics = metrics
        self._signals = signals
        self._lock = lock
        self._train_step = training_step(experiment)
        self._eval_step = evaluation_step(experiment)
        self._progress = Progress(experiment, lambda: signals.request(signal.SIGPIPE))
        self._probe = _create_probe(experiment)
        self._clock = _Clock()

    def steps(self, state: TrainState, start: int) -> TrainResult:
        """Runs the steps from `start` on."""
        experiment, total = self._experiment, self._experiment.total_steps
        self._progress.start(start)
        batches = train_batches(
            experiment.dataset.train,
            experiment.sampler,
            start,
            stop_step=total,
            rows=rows_here(self._config.batch_size, experiment.mesh),
        )
        self._clock.restart()
        for step in range(start + 1, total + 1):
            state = self._train_step(state, *self._next_batch(batches))
            if step % self._config.log_every_steps == 0:
                self._log(state, step)
            if self._probe is not None and step % self._config.conflict_every_steps == 0:
                self._measure_conflict(self._probe, state, step)
            if step % experiment.sampler.steps_per_epoch == 0:
                state = self._end_epoch(state, step)
            elif self._is_checkpoint_due(step):
                self._save(state, step, score=None)
            stopped_by = self._signals.stop_after(step)
            if stopped_by is not None and step < total:
                self._save(state, step, score=None)
                return TrainResult(experiment, step, stopped_by)
        return TrainResult(experiment, total, None)

    def close(self) -> None:
        """Flushes and frees everything."""
        self._progress.close()
        self._metrics.close()
        self._checkpoints.close()

    def _next_batch(self, batches: Iterator) -> tuple[jax.Array, jax.Array]:
        with self._clock.waiting_for_batch():
            return put_batch(next(batches), self._experiment.mesh)

    def _log(self, state: TrainState, step: int) -> None:
        """Shows how it goes; the only place in an epoch where the host waits for the device."""
        self._check_finite(state)
        self._progress.update(step, jax.device_get(state.totals))

    def _measure_conflict(self, probe: ConflictProbe, state: TrainState, step: int) -> None:
        """Writes how the exits' gradients agree; before any checkpoint of this step is saved."""
        jax.block_until_ready(state)  # what is still under way is the epoch's own time
        with self._clock.stopped():
            gram = probe(state.params, state.batch_stats)
            epoch = step // self._experiment.sampler.steps_per_epoch
            self._metrics.write(conflict_line(gram, probe.tensor_names, step=step, epoch=epoch))

    def _end_epoch(self, state: TrainState, step: int) -> TrainState:
        """Evaluates and saves where the config asks for it, and starts the next epoch's sums."""
        epoch = step // self._experiment.sampler.steps_per_epoch
        totals = jax.device_get(state.totals)  # waits for the epoch's last step
        timing = self._clock.read(self._config.batch_size)
        state = state.replace(totals=self._zero_totals())
        if epoch % self._config.eval_every_epochs == 0 or epoch == self._config.epochs:
            self._check_finite(state)
            self._metrics.write({**training_line(totals, step=step, epoch=epoch), **timing})
            self._save(state, step, score=self._evaluate(state, step, epoch))
        self._clock.restart()
        return state

    def _evaluate(self, state: TrainState, step: int, epoch: int) -> float:
        """Writes the validation line and returns the score: the mean accuracy over the exits."""
        split = self._experiment.dataset.validation
        if split is None:
            self._progress.evaluated(epoch, None)
            return float(step)  # nothing to choose by: the last epoch is the best
        begin = time.perf_counter()
        predictions = evaluate(
            self._eval_step,
            state.eval_variables,
            split,
            batch_size=self._config.eval_batch_size,
            mesh=self._experiment.mesh,
        )
        line = evaluation_line(predictions, step=step, epoch=epoch, split="validation")
        speed = split.num_examples / (time.perf_counter() - begin)
        self._metrics.write({**line, "images_per_second": speed})
        self._progress.evaluated(epoch, line)
        return mean_exit_accuracy(predictions)

    def _is_checkpoint_due(self, step: int) -> bool:
        every = self._config.checkpoint_every_steps
        return every > 0 and step % every == 0

    def _save(self, state: TrainState, step: int, score: float | None) -> None:
        self._check_finite(state)
        self._lock.check()
        self._checkpoints.save(state, step, score)

    def _check_finite(self, state: TrainState) -> None:
        bad = int(state.first_bad_step)
        if bad == NO_BAD_STEP:
            return
        rate = np.asarray(self._experiment.schedule(bad)).item()
        last_good = self._checkpoints.latest_step()
        kept = f"checkpoint of step {last_good}" if last_good is not None else "none was saved yet"
        raise UserError(
            f"the loss or its update became non-finite at step {bad + 1} (learning rate {rate:g}); "
            f"last good checkpoint: {kept}; try a lower optimizer.learning_rate, "
            f"schedule.warmup_epochs or optimizer.gradient_clip"
        )

    def _zero_totals(self) -> EpochTotals:
        totals = EpochTotals.zero(self._experiment.model.num_exits)
        return put_replicated(totals, self._experiment.mesh)


def _create_probe(experiment: Experiment) -> ConflictProbe | None:
    every = experiment.config.conflict_every_steps
    if every < 0:
        raise UserError(f"conflict_every_steps must be at least 0, got {every}")
    return ConflictProbe(experiment, experiment.config.conflict_examples) if every else None


class _Clock:
    """Times an epoch's steps, and how much of it was spent waiting for the next batch."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """Begins a new epoch."""
        self._begin, self._waited, self._batches = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def waiting_for_batch(self) -> Iterator[None]:
        """Counts a batch, and the time within as waiting for it."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin
        self._batches += 1

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Leaves the time within out of the epoch's."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    def read(self, batch_size: int) -> dict[str, float]:
        """Returns the speed and the fraction of time spent waiting for data."""
        seconds = time.perf_counter() - self._begin
        speed = self._batches * batch_size / seconds
        return {"images_per_second": speed, "data_wait": self._waited / seconds}
