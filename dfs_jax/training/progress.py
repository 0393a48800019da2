"""Progress of a run for the user: a bar on a terminal, otherwise a line for each evaluation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

from tqdm import tqdm

from dfs_jax.output import show
from dfs_jax.training.experiment import Experiment
from dfs_jax.training.metrics import mean_exit_loss
from dfs_jax.training.state import EpochTotals

_BAR = "{desc} |{bar:16}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}]{postfix}"


class Progress:
    """Shows epoch, step, images/s, loss, each exit's accuracy and the time left.

    Args:
      experiment: run to show.
      at_closed_pipe: function called when the stream's reader has gone (`| head`). A closed
        terminal or a full disk does not stop a run, which continues without output.
      stream: output stream; a bar is shown only on a terminal.
    """

    def __init__(
        self,
        experiment: Experiment,
        at_closed_pipe: Callable[[], object] = lambda: None,
        stream: TextIO | None = None,
    ):
        self._experiment = experiment
        self._at_closed_pipe = at_closed_pipe
        self._stream = stream or sys.stdout
        self._bar: tqdm | None = None

    def start(self, step: int) -> None:
        """Describes the run and its first step."""
        self._say(_describe(self._experiment))
        if step >= self._experiment.total_steps:
            self._say(f"the run is complete: {step} steps")
            return
        if step:
            self._say(f"continuing after step {step}")
        self._show(lambda: self._open_bar(step))

    def update(self, step: int, totals: EpochTotals) -> None:
        """Moves the bar to `step` with the epoch's loss and accuracies so far."""
        bar = self._bar
        if bar is not None and not bar.disable:
            self._show(lambda: self._move(bar, step, totals))

    def evaluated(self, epoch: int, line: Mapping[str, Any] | None) -> None:
        """Shows one evaluation on validation data; `line` is None if none is held out."""
        label = f"epoch {epoch}/{self._experiment.config.epochs}"
        if line is None:
            self._say(f"{label}  saved (no validation data is held out)")
            return
        exits = [value for name, value in line.items() if _is_exit_accuracy(name)]
        self._say(
            f"{label}  validation: loss {line['loss']:.3f} per exit, accuracy {percents(exits)}, "
            f"ensemble {100 * line['ensemble/accuracy']:.1f} %"
        )

    def close(self) -> None:
        """Closes the bar and leaves it on the screen."""
        if self._bar is not None:
            self._show(self._bar.close)

    def _open_bar(self, step: int) -> None:
        self._bar = tqdm(
            total=self._experiment.total_steps,
            initial=step,
            desc="compiling",
            bar_format=_BAR,
            file=self._stream,
            disable=not self._stream.isatty(),
            dynamic_ncols=True,
        )

    def _move(self, bar: tqdm, step: int, totals: EpochTotals) -> None:
        examples = max(int(totals.examples), 1)
        epoch = (step - 1) // self._experiment.sampler.steps_per_epoch + 1
        bar.set_description(f"epoch {epoch}/{self._experiment.config.epochs}", refresh=False)
        bar.update(step - bar.n)
        rate = bar.format_dict["rate"] or 0.0
        speed = rate * self._experiment.config.batch_size
        bar.set_postfix_str(
            f"{speed:.0f} images/s, loss {mean_exit_loss(totals):.3f} per exit, "
            f"exits {percents(totals.correct / examples)}"
        )

    def _say(self, text: str) -> None:
        self._show(lambda: tqdm.write(text, file=self._stream))

    def _show(self, write: Callable[[], object]) -> None:
        if isinstance(show(self._stream, write), BrokenPipeError):
            self._at_closed_pipe()


def percents(fractions: Iterable[float]) -> str:
    """Formats fractions as a row of percentages.

    >>> percents([0.5, 0.987])
    '50.0 98.7 %'
    """
    return " ".join(f"{100 * float(fraction):.1f}" for fraction in fractions) + " %"


def _is_exit_accuracy(name: str) -> bool:
    return name.startswith("exit") and name.endswith("/accuracy")


def _describe(experiment: Experiment) -> str:
    config, dataset = experiment.config, experiment.dataset
    held_out = 0 if dataset.validation is None else dataset.validation.num_examples
    return (
        f"{config.model.name} with {experiment.model.num_exits} exits, fork {config.fork.name}, "
        f"loss {config.loss.name}, on {config.data.name}: {dataset.train.num_examples} training, "
        f"{held_out} validation, {dataset.test.num_examples} test images; "
        f"{experiment.total_steps} steps of {config.batch_size} on {experiment.mesh.size} device(s)"
    )
