"""Predictions of every exit on a split, with each example counted once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from dfs_jax.data.dataset import AnySplit, Split
from dfs_jax.data.pipeline import eval_batches
from dfs_jax.exits.confidence import ExitPredictions, concatenate_predictions
from dfs_jax.guard import usual_numerics
from dfs_jax.training.checkpoint import Checkpoints
from dfs_jax.training.dispatch import BATCHES
from dfs_jax.training.experiment import Experiment, abstract_state, evaluation_step
from dfs_jax.training.sharding import gathered, put_batch, round_up_to_devices, rows_here
from dfs_jax.types import UserError

SPLITS = ("train", "validation", "test")


class RunEvaluation(NamedTuple):
    """Predictions of one checkpoint, on the reported split and on the split for thresholds.

    `fitting` is None if the images for thresholds are not available; `is_best` says whether the
    checkpoint is the run's best.
    """

    experiment: Experiment
    step: int
    variables: dict[str, Any]
    reported: ExitPredictions
    reported_split: str
    fitting: ExitPredictions | None
    fitting_split: str
    is_best: bool


def evaluate(
    eval_step: Callable[..., ExitPredictions],
    variables: dict[str, Any],
    split: AnySplit,
    *,
    batch_size: int,
    mesh: Mesh,
) -> ExitPredictions:
    """Returns every exit's predictions on `split`, in order; independent of the batch size."""
    parts, masks = [], []
    batch_size = round_up_to_devices(batch_size, mesh)
    for images, labels, mask in eval_batches(split, batch_size, rows_here(batch_size, mesh)):
        parts.append(eval_step(variables, *put_batch((images, labels), mesh)))
        masks.append(put_batch(mask, mesh) if jax.process_count() > 1 else mask)
    return concatenate_predictions(jax.device_get(parts), gathered(masks))


class ResidentSplit:
    """A split in device memory, in batches, so that one dispatch evaluates all of it.

    Args:
      experiment: experiment that gives the batch size and the evaluation step.
      split: split in memory.
    """

    def __init__(self, experiment: Experiment, split: Split):
        mesh = experiment.mesh
        batch_size = round_up_to_devices(experiment.config.eval_batch_size, mesh)
        batches = eval_batches(split, batch_size, rows_here(batch_size, mesh))
        images, labels, masks = (np.stack(parts) for parts in zip(*batches, strict=True))
        self._batches = put_batch((images, labels), mesh, axis=1)
        self._masks: Any = masks
        if jax.process_count() > 1:
            self._masks = gathered(put_batch(masks, mesh, axis=1))
        self._step = evaluation_step(experiment, BATCHES)

    def start(self, variables: dict[str, Any]) -> Callable[[], ExitPredictions]:
        """Starts the evaluation; the function returned waits for all predictions, in order."""
        answers = self._step(variables, *self._batches)
        return lambda: self._joined(jax.device_get(answers))

    def _joined(self, answers: ExitPredictions) -> ExitPredictions:
        parts = [ExitPredictions(*fields) for fields in zip(*answers, strict=True)]
        return concatenate_predictions(parts, self._masks)


@usual_numerics()
def evaluate_run(
    workdir: Path, experiment: Experiment, *, split: str = "test", checkpoint: str = "best"
) -> RunEvaluation:
    """Evaluates a checkpoint (`"best"`, `"latest"` or a step) of the run in `workdir`.

    Raises:
      UserError: an unknown split, no such checkpoint, or a split that the run does not have.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    checkpoints = Checkpoints(workdir, read_only=True)
    data: AnySplit | None = getattr(experiment.dataset, split)
    if data is None:
        raise UserError(f"the run in {workdir} holds no {split} split out (validation_examples=0)")
    state, step = checkpoints.restore(checkpoint, abstract_state(experiment))
    eval_step = evaluation_step(experiment)

    def answers(data: AnySplit) -> ExitPredictions:
        return evaluate(
            eval_step,
            state.eval_variables,
            data,
            batch_size=experiment.config.eval_batch_size,
            mesh=experiment.mesh,
        )

    fitting_split = experiment.score_split
    reported = fitting = answers(data)
    if split != fitting_split:
        try:
            fitting = answers(getattr(experiment.dataset, fitting_split))
        except UserError as error:
            if jax.process_count() > 1:  # other processes may have the images, and would wait
                raise
            logging.warning("no thresholds are fitted: %s", error)
            fitting = None
    return RunEvaluation(
        experiment,
        step,
        state.eval_variables,
        reported,
        split,
        fitting,
        fitting_split,
        is_best=step == checkpoints.best_step(),
    )
