"""Requests to stop a run, by signals or by an event from another thread."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point


class StopSignals:
    """Turns SIGTERM, SIGHUP and the first Ctrl-C into a request that the loop checks between steps.

    With several processes, a request to one is enough, and all stop after the same step. JAX
    handles SIGTERM for that purpose, as its notice of preemption.

    Python receives signals in the main thread only: in another thread only the event stops a run.
    If SIGHUP is ignored at the start (`nohup`), it stays ignored.

    Args:
      event: event that stops the run like Ctrl-C once it is set; None for no event.
    """

    def __init__(self, event: threading.Event | None = None):
        self._event = event
        self._received: list[int] = []
        self._is_alone = jax.process_count() == 1
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        caught = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        if not self._is_alone:
            caught.remove(signal.SIGTERM)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            caught.remove(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._receive) for number in caught}
        return self

    def request(self, number: int) -> None:
        """Requests a stop after the current step, as the signal of that number would."""
        is_first = not self._received
        self._received.append(number)
        if is_first and not self._is_alone:
            signal.raise_signal(signal.SIGTERM)

    def stop_after(self, step: int) -> int | None:
        """Returns the signal that ends the run after this step; must be called after each step."""
        if self._event is not None and self._event.is_set() and not self._received:
            self.request(signal.SIGINT)
        if self._is_alone:
            return self._received[0] if self._received else None
        return signal.SIGTERM if reached_preemption_sync_point(step) else None

    def __exit__(self, *_: object) -> None:
        for number in self._before:
            self._restore(number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        # A second request ends the run at once, except SIGHUP, which the shell repeats.
        if number in self._received and number != signal.SIGHUP:
            self._restore(number)
            signal.raise_signal(number)
        self.request(number)

    def _restore(self, number: int) -> None:
        before = self._before[number]  # None for a handler that Python did not install
        signal.signal(number, signal.SIG_DFL if before is None else before)  # pyright: ignore
