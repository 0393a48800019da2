"""Training loop: epochs of steps, evaluations, checkpoints, and a clean stop at any time."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dfs_jax.data import Dataset
from dfs_jax.data.dataset import AnySplit, Split
from dfs_jax.exits.confidence import ExitPredictions
from dfs_jax.guard import usual_numerics
from dfs_jax.interop.pretrained import weights_file
from dfs_jax.paths import output_directory
from dfs_jax.training.checkpoint import Checkpoints, has_steps
from dfs_jax.training.clock import Clock, Lap
from dfs_jax.training.config import check_config, open_workdir, record_config
from dfs_jax.training.conflict import ConflictProbe, conflict_line
from dfs_jax.training.data_changes import as_known
from dfs_jax.training.dispatch import INDICES, steps_at_once
from dfs_jax.training.evaluate import ResidentSplit, evaluate
from dfs_jax.training.experiment import (
    Experiment,
    abstract_state,
    build_experiment,
    evaluation_step,
    initial_state,
    state_copier,
    training_step,
)
from dfs_jax.training.feed import Feed, create_feed, steps_per_dispatch
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
from dfs_jax.training.recalibrate import Recalibration
from dfs_jax.training.run_data import RunData, describe_data, known_data, record_data
from dfs_jax.training.sharding import put_replicated
from dfs_jax.training.signals import StopSignals
from dfs_jax.training.state import NO_BAD_STEP, EpochTotals, TrainState
from dfs_jax.training.step import TrainStep
from dfs_jax.types import Config, UserError


class TrainResult(NamedTuple):
    """Outcome of a run: complete, or stopped by a signal (its number) and resumable.

    The number is `signal.SIGINT` for a run stopped by its event, and `signal.SIGPIPE` for one whose
    standard output was closed.
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
    """Trains as `config` says, in `workdir`; continues an interrupted run.

    A run that was stopped at any time and is started again with the same config ends with the same
    parameters and metrics, bit for bit, as an uninterrupted one (on the same machine and devices).

    Args:
      config: configuration of the run.
      workdir: directory of the run.
      dataset: data set of the config, if it is in memory already; None reads it.
      accept_data_changes: whether to continue if the data changed since the run began, as far as
        possible (see `dfs_jax.training.data_changes`).
      stop: event that stops the run like Ctrl-C once it is set; needed outside of the main thread,
        since Python receives signals only there.

    Raises:
      UserError: a mistake in the config or the directory, another process that trains there, data
        that changed since the run began, a checkpoint of another network, or a non-finite loss.
    """
    check_config(config)
    workdir = output_directory(workdir, "workdir")
    if config.init_from is not None and not has_steps(workdir):
        weights_file(config.init_from)
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
    as_before = partial(
        _as_before, known=known, workdir=workdir, section=config.data, accept=accept_data_changes
    )
    experiment = build_experiment(config, dataset, prepare=as_before)
    checkpoints = Checkpoints(workdir)
    restored = checkpoints.restore_latest(abstract_state(experiment))
    record_config(workdir, config)
    record_data(workdir, describe_data(experiment.dataset, config.data))
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
    """One process's part of a run: the loop and its outputs.

    The device stays busy while the host reads, writes or prints: the host's work after a step is
    done once the next dispatch has been sent (`_later`).
    """

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
        self._progress = Progress(experiment, lambda: signals.request(signal.SIGPIPE))
        self._eval_step = evaluation_step(experiment)
        self._copy = state_copier(experiment)
        self._resident: ResidentSplit | None = None
        self._probe = _create_probe(experiment)
        self._recalibration: Recalibration | None = None
        self._clock = Clock()
        self._later: list[Callable[[], None]] = []

    def steps(self, state: TrainState, start: int) -> TrainResult:
        """Runs the steps from `start` on."""
        experiment, total = self._experiment, self._experiment.total_steps
        self._progress.start(start)
        if start >= total:
            return TrainResult(experiment, total, None)
        feed = create_feed(experiment, start)
        if feed.takes == INDICES and isinstance(experiment.dataset.validation, Split):
            self._resident = ResidentSplit(experiment, experiment.dataset.validation)
        due = (
            experiment.sampler.steps_per_epoch,
            self._config.checkpoint_every_steps,
            self._config.conflict_every_steps,
        )
        self._clock.restart()
        step, train_step = start, self._start_phase(feed, start)
        while step < total:
            if step == experiment.frozen_steps and step > start:  # the first of an epoch
                train_step = self._start_phase(feed, step)
            before = step
            step += steps_at_once(step, steps_per_dispatch(self._config), due)
            state = train_step(state, *self._next_inputs(feed, step - before))
            self._catch_up()
            if _passes(self._config.log_every_steps, before, step):
                self._log(state, step)
            if self._probe is not None and _passes(self._config.conflict_every_steps, before, step):
                self._measure_conflict(self._probe, state, step)
            if step % experiment.sampler.steps_per_epoch == 0:
                state = self._end_epoch(state, step)
            elif _passes(self._config.checkpoint_every_steps, before, step):
                self._later.append(partial(self._save, self._copy(state), step, score=None))
            stopped_by = self._signals.stop_after(step)
            if stopped_by is not None and step < total:
                self._catch_up()
                self._save(state, step, score=None)
                self._checkpoints.wait()
                return TrainResult(experiment, step, stopped_by)
        self._catch_up()
        self._checkpoints.wait()
        return TrainResult(experiment, total, None)

    def close(self) -> None:
        """Flushes and closes all outputs."""
        self._progress.close()
        self._metrics.close()
        self._checkpoints.close()

    def _start_phase(self, feed: Feed, step: int) -> TrainStep:
        """Returns the training step from `step` on, with the trunk frozen or not."""
        self._recalibration = _create_recalibration(self._experiment, step)
        return training_step(self._experiment, feed.takes, step=step)

    def _next_inputs(self, feed: Feed, steps: int) -> tuple[jax.Array, ...]:
        with self._clock.waiting_for(steps):
            return feed.next(steps)

    def _catch_up(self) -> None:
        """Does the pending work of earlier steps."""
        later, self._later = self._later, []
        for task in later:
            task()

    def _log(self, state: TrainState, step: int) -> None:
        """Shows the progress once this step has been taken."""
        kept = jax.tree.map(jnp.copy, (state.first_bad_step, state.totals))

        def show() -> None:
            bad, totals = jax.device_get(kept)
            self._check_finite(bad)
            self._progress.update(step, totals)

        self._later.append(show)

    def _measure_conflict(self, probe: ConflictProbe, state: TrainState, step: int) -> None:
        """Writes the agreement of the exits' gradients, before any checkpoint of this step."""
        jax.block_until_ready(state)  # so that pending steps count as the epoch's time
        with self._clock.stopped():
            gram = probe(state.params, state.batch_stats)
            epoch = step // self._experiment.sampler.steps_per_epoch
            self._metrics.write(conflict_line(gram, probe.tensor_names, step=step, epoch=epoch))

    def _end_epoch(self, state: TrainState, step: int) -> TrainState:
        """Evaluates and saves as the config says, and starts the next epoch's sums."""
        epoch = step // self._experiment.sampler.steps_per_epoch
        totals, state = state.totals, state.replace(totals=self._zero_totals())
        if epoch % self._config.eval_every_epochs and epoch != self._config.epochs:
            return state
        lap = self._clock.lap()
        if self._recalibration is not None:
            state = self._recalibration(state)
        kept = self._copy(state)
        answers = None if self._resident is None else self._resident.start(kept.eval_variables)
        report = partial(self._report_epoch, kept, totals, lap, answers, step=step, epoch=epoch)
        self._later.append(report)
        if self._experiment.dataset.validation is not None and answers is None:
            self._catch_up()  # evaluated batch by batch, before the next step is sent
        return state

    def _report_epoch(
        self,
        state: TrainState,
        totals: EpochTotals,
        lap: Lap,
        answers: Callable[[], ExitPredictions] | None,
        *,
        step: int,
        epoch: int,
    ) -> None:
        """Writes an epoch's metrics, then its checkpoint."""
        self._check_finite(state.first_bad_step)
        totals = jax.device_get(totals)  # waits for the epoch's last step
        timing = self._clock.read(lap, self._config.batch_size)
        self._metrics.write({**training_line(totals, step=step, epoch=epoch), **timing})
        score = self._evaluate(state, answers, step, epoch)
        self._clock.restart()
        self._save(state, step, score)

    def _evaluate(
        self,
        state: TrainState,
        answers: Callable[[], ExitPredictions] | None,
        step: int,
        epoch: int,
    ) -> float:
        """Writes the validation metrics and returns the score: the mean accuracy of the exits."""
        split = self._experiment.dataset.validation
        if split is None:
            self._progress.evaluated(epoch, None)
            return float(step)  # no score without validation data: the last epoch is the best
        begin = time.perf_counter()
        predictions = answers() if answers is not None else self._evaluate_batches(state, split)
        line = evaluation_line(predictions, step=step, epoch=epoch, split="validation")
        speed = split.num_examples / (time.perf_counter() - begin)
        self._metrics.write({**line, "images_per_second": speed})
        self._progress.evaluated(epoch, line)
        return mean_exit_accuracy(predictions)

    def _evaluate_batches(self, state: TrainState, split: AnySplit) -> ExitPredictions:
        return evaluate(
            self._eval_step,
            state.eval_variables,
            split,
            batch_size=self._config.eval_batch_size,
            mesh=self._experiment.mesh,
        )

    def _save(self, state: TrainState, step: int, score: float | None) -> None:
        self._check_finite(state.first_bad_step)
        self._lock.check()
        self._checkpoints.start_saving(state, step, score)

    def _check_finite(self, first_bad_step: jax.Array) -> None:
        bad = int(first_bad_step)
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


def _create_recalibration(experiment: Experiment, step: int) -> Recalibration | None:
    examples = experiment.config.get("recalibrate_examples")
    return None if examples is None else Recalibration(experiment, examples, step=step)


def _passes(every: int, before: int, step: int) -> bool:
    """Returns whether (before, step] contains a multiple of `every`; False if `every` is 0."""
    return every > 0 and step // every > before // every
