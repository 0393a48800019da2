"""Measures the conflict of the exits' gradients during a run, always on the same examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dfs_jax.data import Split
from dfs_jax.data.augmentation import normalise
from dfs_jax.gradients.conflict import (
    count_pairs,
    gradient_norms,
    joint_gram,
    measure_gram,
    pair_cosines,
    tensor_names,
)
from dfs_jax.training.experiment import Experiment, abstract_state, variable_shardings
from dfs_jax.training.sharding import (
    batch_parts,
    batch_sharded,
    jit_for_mesh,
    put_batch,
    replicated,
    rows_here,
)
from dfs_jax.training.state_sharding import constrain
from dfs_jax.types import UserError

SPLIT = "probe"  # name of the split in metrics.jsonl


class ConflictProbe:
    """Measures the gradients of a run's exits on a fixed batch, without changing the run.

    The batch is the first examples of the validation split, or of train if none is held out,
    without augmentation.

    Args:
      experiment: experiment of the run.
      examples: number of examples, limited to the split and rounded down to a multiple of devices.

    Raises:
      UserError: fewer examples than devices, or a model that mixes trunk and heads.
    """

    def __init__(self, experiment: Experiment, examples: int):
        self.tensor_names = tensor_names(abstract_state(experiment).params)
        self.split = experiment.score_split
        self._batch = put_batch(_first_examples(experiment, examples), experiment.mesh)
        self._measure = _compiled(experiment)

    @property
    def examples(self) -> int:
        """Number of examples in the batch."""
        return len(self._batch.labels)

    def __call__(self, params: Any, batch_stats: Any) -> np.ndarray:
        """Returns the Gram matrices `[tensors, exits, exits]`, see `measure_gram`."""
        variables = {"params": params, "batch_stats": batch_stats}
        return np.asarray(self._measure(variables, *self._batch))


def conflict_line(
    gram: np.ndarray, names: tuple[str, ...], *, step: int, epoch: int
) -> dict[str, Any]:
    """Returns the line of `metrics.jsonl` for one measurement; NaN if a quantity is undefined.

        trunk/conflicting_pairs    fraction of pairs with a negative cosine, over all tensors
        block1/conflicting_pairs   the same over the tensors of a block
        exit1/exit2/cosine         mean over the tensors that both exits reach
        exit1/gradient_norm        norm over the whole trunk; 0 for an exit that reaches none of it

    Args:
      gram: Gram matrices `[tensors, exits, exits]` of `measure_gram`.
      names: names of the tensors.
      step: number of steps taken.
      epoch: number of epochs completed.
    """
    blocks = {
        f"{block}/conflicting_pairs": count_pairs(gram[rows]).conflicting_share
        for block, rows in rows_by_prefix(names, depth=1).items()
    }
    cosines, norms = mean_cosines(gram), np.nan_to_num(gradient_norms(joint_gram(gram)))
    shallow, deep = np.triu_indices(len(norms), k=1)
    return {
        "step": step,
        "epoch": epoch,
        "split": SPLIT,
        "trunk/conflicting_pairs": count_pairs(gram).conflicting_share,
        **blocks,
        **{
            f"exit{i + 1}/exit{j + 1}/cosine": float(cosines[i, j])
            for i, j in zip(shallow, deep, strict=True)
        },
        **{f"exit{i}/gradient_norm": float(norm) for i, norm in enumerate(norms, start=1)},
    }


def mean_cosines(gram: np.ndarray) -> np.ndarray:
    """Returns each pair's mean cosine over the tensors that both reach, `[exits, exits]`."""
    cosines = pair_cosines(gram)
    counts = (~np.isnan(cosines)).sum(0)
    return np.where(counts, np.nansum(cosines, axis=0) / np.maximum(counts, 1), np.nan)


def rows_by_prefix(names: Sequence[str], *, depth: int | None) -> dict[str, list[int]]:
    """Groups tensors by the first `depth` parts of their names, in order: `parts[:depth]`.

    >>> rows_by_prefix(("block1/conv/bias", "block1/conv/kernel", "block2/conv/kernel"), depth=1)
    {'block1': [0, 1], 'block2': [2]}
    """
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault("/".join(name.split("/")[:depth]), []).append(row)
    return rows


def _first_examples(experiment: Experiment, examples: int) -> Split:
    split = getattr(experiment.dataset, experiment.score_split)
    devices = batch_parts(experiment.mesh)
    count = min(examples, split.num_examples) // devices * devices
    if count < 1:
        raise UserError(
            f"conflict is measured on at least {devices} example(s), one for each device: "
            f"{examples} were asked for, the {experiment.score_split} split has "
            f"{split.num_examples}"
        )
    return split.take(rows_here(count, experiment.mesh))


def _compiled(experiment: Experiment):
    e = experiment

    def measure(variables: dict[str, Any], images: jax.Array, labels: jax.Array) -> jax.Array:
        variables = constrain(variables, e.mesh, e.model, gathered=True)
        images = normalise(images, e.dataset.mean, e.dataset.std)
        return measure_gram(e.model, e.fork, e.loss, variables, images, labels)

    whole, split = replicated(e.mesh), batch_sharded(e.mesh)
    where = variable_shardings(e) or whole
    shardings = {"in_shardings": (where, split, split), "out_shardings": whole}
    return jit_for_mesh(measure, e.mesh, runs=e.model, **shardings)
