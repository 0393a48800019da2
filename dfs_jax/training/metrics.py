"""Metrics of a run as lines of JSON and as TensorBoard events."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dfs_jax.exits.confidence import ExitPredictions, anytime_accuracy, ensemble_accuracy
from dfs_jax.files import replacing, what_helps
from dfs_jax.paths import reason
from dfs_jax.training.state import EpochTotals
from dfs_jax.training.tensorboard import EventsFile
from dfs_jax.types import UserError

FILE = "metrics.jsonl"
EVENTS_DIRECTORY = "tensorboard"
_COORDINATES = ("step", "epoch", "split")


class MetricsWriter:
    """Appends lines to `metrics.jsonl` in a run's directory, and writes the same to TensorBoard.

    Args:
      workdir: directory of the run.
      start_step: step that the run starts from. Lines of later steps, from a run that was stopped
        after its last checkpoint, are removed.
    """

    def __init__(self, workdir: Path, start_step: int):
        self._path = workdir / FILE
        _cut_back(self._path, start_step)
        self._events = EventsFile(workdir / EVENTS_DIRECTORY, start_step)

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes a line (`step`, `epoch`, `split` and numbers) and syncs it to disk.

        Raises:
          UserError: the line could not be written, for example on a full disk.
        """
        finite = {name: _none_unless_finite(value) for name, value in line.items()}
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._events.write(line["step"], _scalars(finite))
        except OSError as error:
            raise UserError(
                f"{self._path} could not be written ({reason(error)}): {what_helps(error)}"
            ) from error

    def close(self) -> None:
        """Flushes the events."""
        self._events.close()


class NoMetrics:
    """Replaces `MetricsWriter` in processes that write nothing."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl`, oldest first, without a truncated last one."""
    path = workdir / FILE
    return [json.loads(line) for line in _whole_lines(path)] if path.exists() else []


def evaluation_line(
    predictions: ExitPredictions, *, step: int, epoch: int, split: str
) -> dict[str, Any]:
    """Returns the line of one evaluation.

        loss              cross-entropy in nats, mean over examples and exits; chance is ln(classes)
        exit1/loss        the same of one exit
        exit1/accuracy    fraction of the examples

    Args:
      predictions: predictions of every exit on the split.
      step: number of steps taken.
      epoch: number of epochs completed.
      split: name of the split.
    """
    losses = predictions.loss.mean(axis=1)
    return {
        "step": step,
        "epoch": epoch,
        "split": split,
        "loss": float(losses.mean()),
        **{f"exit{i}/loss": float(loss) for i, loss in enumerate(losses, start=1)},
        **exit_accuracies(anytime_accuracy(predictions)),
        "ensemble/accuracy": float(ensemble_accuracy(predictions)),
    }


def training_line(totals: EpochTotals, *, step: int, epoch: int) -> dict[str, Any]:
    """Returns the line of an epoch of training: the loss, mean over exits, and accuracies."""
    examples = max(int(totals.examples), 1)
    return {
        "step": step,
        "epoch": epoch,
        "split": "train",
        "loss": mean_exit_loss(totals),
        **exit_accuracies(totals.correct / examples),
    }


def mean_exit_loss(totals: EpochTotals) -> float:
    """Returns the training loss of an epoch so far, mean over examples and exits."""
    return float(totals.loss) / max(int(totals.examples), 1) / len(totals.correct)


def exit_accuracies(accuracies: Iterable[Any]) -> dict[str, float]:
    """Returns accuracies by the names of their exits, shallow first.

    >>> exit_accuracies([0.25, 0.5])
    {'exit1/accuracy': 0.25, 'exit2/accuracy': 0.5}
    """
    return {f"exit{i}/accuracy": float(value) for i, value in enumerate(accuracies, start=1)}


def mean_exit_accuracy(predictions: ExitPredictions) -> float:
    """Returns the mean of the exits' accuracies, a fraction, which is a checkpoint's score."""
    return float(anytime_accuracy(predictions).mean())


def _none_unless_finite(value: Any) -> Any:
    """Returns the value, or None for NaN and infinity, which JSON cannot represent."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(line: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in line.items() if name not in _COORDINATES}
    return {f"{line['split']}/{k}": value for k, value in numbers.items() if value is not None}


def _cut_back(path: Path, start_step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= start_step]
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _whole_lines(path: Path) -> list[str]:
    """Returns the lines that end in a newline; a killed writer may leave an incomplete one."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]
