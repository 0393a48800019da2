"""Accuracies by class, and confusion matrices, of each exit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dfs_jax.exits.confidence import ExitPredictions

# Sets with more classes have no full matrix in a report: CIFAR-100's has 10,000 numbers per exit.
MOST_CLASSES = 100
LARGEST_CONFUSIONS = 20


def confusion_matrices(predictions: ExitPredictions, num_classes: int) -> np.ndarray:
    """Returns the confusion matrix of every exit, `[exits, classes, classes]`.

        matrix_kij = number of examples of class i that exit k classifies as class j

    Args:
      predictions: predictions of every exit on a split.
      num_classes: number of classes.

    Example:
      >>> from types import SimpleNamespace
      >>> answers, labels = np.array([[0, 1, 1], [0, 0, 1]]), np.array([0, 0, 1])
      >>> predictions = SimpleNamespace(predicted=answers, labels=labels)
      >>> confusion_matrices(predictions, 2).tolist()
      [[[1, 1], [0, 1]], [[2, 0], [0, 1]]]
    """
    labels, predicted = np.asarray(predictions.labels), np.asarray(predictions.predicted)
    cells = labels * num_classes + predicted
    counts = [np.bincount(row, minlength=num_classes**2) for row in cells]
    return np.stack(counts).reshape(-1, num_classes, num_classes)


def class_section(predictions: ExitPredictions, names: Sequence[str]) -> dict[str, Any]:
    """Returns the section `classes` of a report.

        names         names of the classes
        examples      number of examples of each class
        accuracy      [{"exit", "by_class"}]: fractions; null for a class without examples
        confusion     [{"exit", "counts"}]: `counts[i][j]` examples of class i were taken for
                      class j; null for more than 100 classes
        confusions    [{"exit", "label", "predicted", "count"}]: the 20 largest of the last exit

    Args:
      predictions: predictions of every exit on the reported split.
      names: names of the classes.
    """
    matrices = confusion_matrices(predictions, len(names))
    examples = matrices[0].sum(axis=1)
    accuracies = [np.diag(matrix) / np.maximum(examples, 1) for matrix in matrices]
    return {
        "names": list(names),
        "examples": examples.tolist(),
        "accuracy": [
            {
                "exit": i,
                "by_class": [
                    float(share) if n else None for share, n in zip(row, examples, strict=True)
                ],
            }
            for i, row in enumerate(accuracies, start=1)
        ],
        "confusion": _counts(matrices) if len(names) <= MOST_CLASSES else None,
        "confusions": _largest(matrices[-1], names, len(matrices)),
    }


def worst_classes(section: Mapping[str, Any], count: int) -> list[tuple[str, float]]:
    """Returns the classes with the lowest accuracy at the last exit, with their accuracies."""
    shares = section["accuracy"][-1]["by_class"]
    known = [
        (name, share)
        for name, share in zip(section["names"], shares, strict=True)
        if share is not None
    ]
    return sorted(known, key=lambda item: item[1])[:count]


def _counts(matrices: np.ndarray) -> list[dict[str, Any]]:
    return [{"exit": i, "counts": m.tolist()} for i, m in enumerate(matrices, start=1)]


def _largest(matrix: np.ndarray, names: Sequence[str], last_exit: int) -> list[dict[str, Any]]:
    wrong = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:LARGEST_CONFUSIONS]
    cells = [np.unravel_index(place, wrong.shape) for place in order]
    return [
        {
            "exit": last_exit,
            "label": names[label],
            "predicted": names[predicted],
            "count": int(wrong[label, predicted]),
        }
        for label, predicted in cells
        if wrong[label, predicted]
    ]
