"""Runs stages on whoever waits for them: some leave with an answer, the others go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dfs_jax.inference.answers import AnswerTable
from dfs_jax.inference.policy import Policy
from dfs_jax.inference.programs import Programs
from dfs_jax.inference.waiting import Buffer, Waiting
from dfs_jax.types import PyTree

# So much padding costs less than one more run: places, and a share of the examples.
_PLACES, _SHARE = 8, 0.25
# So many observed exits say more than those that the policy expects.
_ENOUGH = 1024


class Counts:
    """What has happened since the counting began.

    Attributes:
      exits: how many examples each exit answered after running stage by stage.
      whole: how many the whole network answered as one program.
      close: how many decisions lay within 1e-6 of a threshold, where rounding decides.
    """

    def __init__(self, num_exits: int):
        self.exits = [0] * num_exits
        self.whole = 0
        self.close = 0

    def shares(self) -> tuple[float, ...] | None:
        """Returns the share of examples that each exit answered, once 1,024 tell."""
        total = sum(self.exits)
        return tuple(n / total for n in self.exits) if total >= _ENOUGH else None


class Engine(NamedTuple):
    """What every pipeline of a predictor shares.

    Attributes:
      programs: the compiled stages.
      policy: who leaves where.
      shapes: the batch sizes that programs are compiled for, ascending; the last is a full batch.
      make_buffer: room for the carries of a full batch of one kind of example.
      runs_whole: whether the next batch goes through the whole network as one program.
      counts: what has happened.
    """

    programs: Programs
    policy: Policy
    shapes: tuple[int, ...]
    make_buffer: Callable[[PyTree], Buffer]
    runs_whole: Callable[[], bool]
    counts: Counts

    @property
    def full(self) -> int:
        """The largest batch."""
        return self.shapes[-1]

    def shape_for(self, n: int) -> int:
        """Returns the smallest shape that n examples fit into."""
        return next(shape for shape in self.shapes if shape >= n)

    def shape_within(self, n: int) -> int:
        """Returns how many of n examples to run without padding: all, if they fill no shape."""
        return max((shape for shape in self.shapes if shape <= n), default=n)

    def next_run(self, n: int) -> int:
        """Returns how many of n examples to run next, if all are to run now.

        All, unless that takes much padding: then as many as fill a shape.
        """
        padding = self.shape_for(n) - n
        return n if padding <= max(_PLACES, _SHARE * n) else self.shape_within(n)


class Pipeline:
    """The queues before the stages; a stage runs as soon as a full batch waits for it."""

    def __init__(self, engine: Engine, table: AnswerTable):
        self._engine = engine
        self._table = table
        self._queues = [
            Waiting(lambda carry=carry: engine.make_buffer(carry), engine.full)
            for carry in engine.programs.carries
        ]

    def add(self, images: np.ndarray, tickets: np.ndarray) -> None:
        """Takes images `[n, height, width, channels]` that were given these tickets."""
        self._pass_on(0, images, np.arange(len(images)), tickets)

    def finish(self) -> None:
        """Runs whatever waits, full batch or not, until everybody is answered."""
        for k in range(len(self._queues)):
            self._run_all(k)

    def run_overdue(self, max_wait: float) -> None:
        """Runs the stages for which somebody has waited longer than `max_wait` seconds."""
        now = time.perf_counter()
        for k, queue in enumerate(self._queues):
            if queue.count and now - queue.since[0] >= max_wait:
                self._run_all(k)

    def seconds_left(self, max_wait: float) -> float | None:
        """Returns how long until somebody is overdue; None where nobody waits."""
        came = [queue.since[0] for queue in self._queues if queue.count]
        return max(0.0, min(came) + max_wait - time.perf_counter()) if came else None

    def run_first(self, ticket: int) -> None:
        """Runs the stage for which the example with this ticket waits, first in its queue."""
        firsts = [queue.tickets[0] if queue.count else None for queue in self._queues]
        k = firsts.index(ticket)
        # No more than fill a shape: the others wait for company, which costs less than padding.
        self._run(k, self._engine.shape_within(self._queues[k].count))

    def _pass_on(self, k: int, carry: PyTree, rows: np.ndarray, tickets: np.ndarray) -> None:
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
            answers = engine.programs.run_whole(carry)[:n]
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
        """Notes the answers of those who leave at stage k; returns the rows that stay."""
        engine = self._engine
        confidence = answers[:, engine.programs.classes]
        leaves = engine.policy.leaves(k, confidence)
        engine.counts.close += int(np.count_nonzero(engine.policy.is_close(k, confidence)))
        engine.counts.exits[k] += int(np.count_nonzero(leaves))
        self._table.record(tickets[leaves], answers[leaves], k)
        return np.flatnonzero(~leaves)
