"""A trained run as stages, and the logits of its exits on a split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dfs_jax.data import eval_batches, normalise
from dfs_jax.inference.stages import Stage, model_stages, recorded_logits
from dfs_jax.training.checkpoint import Checkpoints
from dfs_jax.training.experiment import Experiment, abstract_state, rebuild_experiment
from dfs_jax.training.run_data import RunData, read_run_data
from dfs_jax.types import UserError

_BATCH = 250


class _Normalise(NamedTuple):
    """Normalisation of images; equal ones compare equal, so that compiled programs are shared."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: jax.Array) -> jax.Array:
        return normalise(images, self.mean, self.std)


class StagedRun(NamedTuple):
    """One checkpoint of a run.

    Attributes:
      experiment: the experiment that the run's config describes.
      step: step of the checkpoint.
      stages: stages of the network; the first takes uint8 images and normalises them.
      example: shape and type of one image.
      variables: the model's variables at that step, of which the stages are made.
      data: the run's record of its data; None for runs of earlier versions.
    """

    experiment: Experiment
    step: int
    stages: tuple[Stage, ...]
    example: jax.ShapeDtypeStruct
    variables: dict[str, Any]
    data: RunData | None = None

    def logits(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns every exit's logits `[exits, n, classes]` on a split, and the labels `[n]`."""
        data = self.split(split)
        labels = []

        def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for images, some_labels, mask in eval_batches(data, _BATCH):
                labels.append(some_labels[mask])
                yield images, mask

        return recorded_logits(self.stages, batches()), np.concatenate(labels)

    def images(self, split: str, count: int) -> np.ndarray:
        """Returns up to `count` images from the start of a split, uint8."""
        kept, found = [], 0
        for images, _, mask in eval_batches(self.split(split), _BATCH):
            kept.append(images[mask])
            found += len(kept[-1])
            if found >= count:
                break
        return np.concatenate(kept)[:count]

    def split(self, name: str) -> Any:
        """Returns a split of the run's data set.

        Raises:
          UserError: the run has no such split.
        """
        data = getattr(self.experiment.dataset, name)
        if data is None:
            raise UserError(f"the run holds no {name} split out (validation_examples=0)")
        return data

    def about(self) -> dict[str, object]:
        """Returns the origin of the network, as plain data."""
        config, dataset = self.experiment.config, self.experiment.dataset
        return {
            "model": config.model.name,
            "data": config.data.name,
            "fork": config.fork.name,
            "loss": config.loss.name,
            "step": self.step,
            "mean": list(map(float, dataset.mean)),
            "std": list(map(float, dataset.std)),
        }


def load_staged(
    workdir: Path, *, checkpoint: str = "best", data_dir: str | None = None
) -> StagedRun:
    """Returns a checkpoint of the run in `workdir`.

    Args:
      workdir: directory of the run.
      checkpoint: "best", "latest" or a step number.
      data_dir: directory of the data, if it has moved.

    Raises:
      UserError: no run, no such checkpoint, no data.
    """
    experiment = rebuild_experiment(workdir, data_dir=data_dir)
    state, step = Checkpoints(workdir, read_only=True).restore(
        checkpoint, abstract_state(experiment)
    )
    data = read_run_data(workdir)
    return staged_run(experiment, state.eval_variables, step, data)


def staged_run(
    experiment: Experiment, variables: dict[str, Any], step: int, data: RunData | None = None
) -> StagedRun:
    """Returns the network of an experiment with the given variables, those after `step` steps."""
    dataset = experiment.dataset
    example = jax.ShapeDtypeStruct(dataset.image_shape, np.uint8)
    stages = model_stages(
        experiment.model,
        variables,
        experiment.fork,
        example,
        prepare=_Normalise(tuple(dataset.mean), tuple(dataset.std)),
    )
    return StagedRun(experiment, step, stages, example, variables, data)
