"""Runs stages on queued examples: confident examples exit, the rest pass to the next queue."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dfs_jax.inference.answers import AnswerTable
from dfs_jax.inference.policy import Policy
from dfs_jax.inference.programs import Programs
from dfs_jax.inference.waiting import Carry, Waiting

# Padding up to this many places or this fraction of the examples costs less than another run.
_PLACES, _SHARE = 8, 0.25
# Observed exits replace those that the policy expects after this many examples.
_ENOUGH = 1024


class Counts:
    """Counts of answers since they were last reset.

    Attributes:
      exits: number of examples that each exit answered, run stage by stage.
      whole: number of examples that the whole network answered as one program.
      close: number of decisions within 1e-6 of a threshold, where rounding decides.
    """

    def __init__(self, num_exits: int):
        self.exits = [0] * num_exits
        self.whole = 0
        self.close = 0

    def shares(self) -> tuple[float, ...] | None:
        """Returns the fraction of examples answered by each exit; None before 1,024 examples."""
        total = sum(self.exits)
        return tuple(n / total for n in self.exits) if total >= _ENOUGH else None


class Engine(NamedTuple):
    """State that all pipelines of a predictor share.

    Attributes:
      programs: compiled stages.
      policy: early-exit policy.
      shapes: batch sizes that programs are compiled for, ascending; the last is a full batch.
      runs_whole: function that tells whether to run the next batch as one whole program.
      counts: counts of answers.
    """

    programs: Programs
    policy: Policy
    shapes: tuple[int, ...]
    runs_whole: Callable[[], bool]
    counts: Counts

    @property
    def full(self) -> int:
        """Size of a full batch."""
        return self.shapes[-1]

    def shape_for(self, n: int) -> int:
        """Returns the smallest batch size that holds n examples."""
        return next(shape for shape in self.shapes if shape >= n)

    def shape_within(self, n: int) -> int:
        """Returns the number of n examples to run without padding; all if they fill no shape."""
        return max((shape for shape in self.shapes if shape <= n), default=n)

    def next_run(self, n: int) -> int:
        """Returns the number of n waiting examples to run next.

        All of them, unless padding would be large: then as many as fill a shape.
        """
        padding = self.shape_for(n) - n
        return n if padding <= max(_PLACES, _SHARE * n) else self.shape_within(n)


class Pipeline:
    """Queues before the stages; a stage runs as soon as its queue holds a full batch."""

    def __init__(self, engine: Engine, table: AnswerTable):
        self._engine = engine
        self._table = table
        self._queues = [
            Waiting(lambda k=k: engine.programs.make_buffer(k, engine.full), engine.full)
            for k in range(engine.programs.num_exits)
        ]

    def add(self, images: np.ndarray, tickets: np.ndarray) -> None:
        """Adds images `[n, height, width, channels]` with these tickets."""
        self._pass_on(0, (images,), np.arange(len(images)), tickets)

    def finish(self) -> None:
        """Runs the stages, on partial batches too, until every example is answered."""
        for k in range(len(self._queues)):
            self._run_all(k)

    def run_overdue(self, max_wait: float) -> None:
        """Runs stages in whose queue an example has waited for at least `max_wait` seconds."""
        now = time.perf_counter()
        for k, queue in enumerate(self._queues):
            if queue.count and now - queue.since[0] >= max_wait:
                self._run_all(k)

    def seconds_left(self, max_wait: float) -> float | None:
        """Returns the time in seconds until an example is overdue; None if the queues are empty."""
        came = [queue.since[0] for queue in self._queues if queue.count]
        return max(0.0, min(came) + max_wait - time.perf_counter()) if came else None

    def run_first(self, ticket: int) -> None:
        """Runs the stage in whose queue the example with this ticket is first."""
        firsts = [queue.tickets[0] if queue.count else None for queue in self._queues]
        k = firsts.index(ticket)
        # Only full shapes: later examples can fill the next batch, which costs less than padding.
        self._run(k, self._engine.shape_within(self._queues[k].count))

    def _pass_on(self, k: int, carry: Carry, rows: np.ndarray, tickets: np.ndarray) -> None:
        queue = self._queues[k]
        while len(rows):
            n = min(len(rows), queue.free)
            queue.put(carry, rows[:n], tickets[:n], time.perf_counter())
            if not queue.free:
                self._run(k, queue.count)
            rows, tickets = rows[n:], tickets[n:]

    def _run_all(self, k: int) -> None:
        while count := self._queues[k].count:
            self._run(k, self._engine.next_run(count))

    def _run(self, k: int, n: int) -> None:
        engine, queue = self._engine, self._queues[k]
        carry, tickets = queue.first(n, engine.shape_for(n)), queue.tickets[:n].copy()
        if k == 0 and engine.runs_whole():
            answers = engine.programs.run_whole(carry[0])[:n]
            queue.drop(n)
            engine.counts.whole += n
            self._table.record(tickets, answers, engine.programs.num_exits - 1)
            return
        carry, answers = engine.programs.run(k, carry)
        queue.drop(n)
        stay = self._answer(k, tickets, answers[:n])
        if len(stay):
            self._pass_on(k + 1, carry, stay, tickets[stay])

    def _answer(self, k: int, tickets: np.ndarray, answers: np.ndarray) -> np.ndarray:
        """Records the answers of examples that exit at stage k; returns the rows that stay."""
        engine = self._engine
        confidence = answers[:, engine.programs.classes]
        leaves = engine.policy.leaves(k, confidence)
        engine.counts.close += int(np.count_nonzero(engine.policy.is_close(k, confidence)))
        engine.counts.exits[k] += int(np.count_nonzero(leaves))
        self._table.record(tickets[leaves], answers[leaves], k)
        return np.flatnonzero(~leaves)
