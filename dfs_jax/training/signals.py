"""Requests to stop a run: signals and, from another thread, an event."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point


class StopSignals:
    """Turns SIGTERM, SIGHUP and the first Ctrl-C into a request that the loop reads between steps.

    Of several processes one that is asked to stop is enough, and all stop after the same step. JAX
    sees to that: SIGTERM is its notice of preemption, which must be left to it.

    Signals arrive in a program's main thread alone: in another one only the event stops a run. A
    program that was started to outlive its terminal (`nohup`) ignores SIGHUP, and goes on doing so.

    Args:
      event: once set, the run stops as after Ctrl-C; None where nobody will.
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
        """Asks the run to stop after the present step, as the signal of that number would."""
        is_first = not self._received
        self._received.append(number)
        if is_first and not self._is_alone:
            signal.raise_signal(signal.SIGTERM)

    def stop_after(self, step: int) -> int | None:
        """Returns the signal that ends the run after this step; has to be asked after each one."""
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
        # Asked twice: the user will not wait. A terminal's end comes from its shell, too.
        if number in self._received and number != signal.SIGHUP:
            self._restore(number)
            signal.raise_signal(number)
        self.request(number)

    def _restore(self, number: int) -> None:
        before = self._before[number]  # None: not Python's own
        signal.signal(number, signal.SIG_DFL if before is None else before)  # pyright: ignore
