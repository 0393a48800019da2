"""A run of several processes: the writer, values that all agree on, and a common end.

JAX connects the processes, computes over all their devices, and forwards a notice of preemption.
This module adds what a user sees: output of one process, and one sentence when a process is lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from absl import logging
from jax._src import distributed  # the only access to JAX's key-value store; Orbax uses it too

from dfs_jax.guard import INTERRUPTED_STATUS, USAGE_STATUS, fail
from dfs_jax.launch import Launch
from dfs_jax.output import show, silence
from dfs_jax.types import UserError

CRASH_STATUS, LOST_STATUS = 1, 3
# Seconds: time limit for connecting at the start, and JAX's heartbeat timeout.
JOIN, HEARTBEAT = 300, 60
# Seconds between checks of the other processes, and silent checks after which one is lost.
POLL, SILENT_POLLS = 2, 15
# Seconds that an ending process waits for the others to receive the reason.
HEARING = 5
_LONG = 24 * 3600
_STOP, _HEARD, _ALIVE, _END = (f"dfs_jax/{name}" for name in ("stop", "heard", "alive", "end"))
_LOST = re.compile("gloo|nccl|coordination service", re.IGNORECASE)  # in messages of JAX's runtime
_CONTINUE = "the same command, started on all processes, continues after the last checkpoint"
# Numbers calls of `by_writer`, which all processes make in the same order.
_questions = itertools.count()


def is_writer() -> bool:
    """Returns whether this process is the one that writes logs, metrics and reports."""
    return jax.process_index() == 0


def by_writer(
    function: Callable[..., Any], *args: Any, errors: tuple[type[Exception], ...] = (UserError,)
) -> Any:
    """Returns the result of a function that only the writer calls; all processes must call this.

    Args:
      function: function whose result can be represented in JSON.
      *args: arguments of the function.
      errors: exceptions that the function may raise, which all processes then raise.
    """
    if jax.process_count() == 1:
        return function(*args)
    client, key = _client(), f"dfs_jax/answers/{next(_questions)}"
    if not is_writer():
        kind, answer = json.loads(client.blocking_key_value_get(key, 1000 * _LONG))
        if kind is not None:
            raise errors[kind](answer)
        return answer
    try:
        answer = function(*args)
    except errors as error:
        kind = next(i for i, known in enumerate(errors) if isinstance(error, known))
        client.key_value_set(key, json.dumps([kind, str(error)]))
        raise
    client.key_value_set(key, json.dumps([None, answer]))
    return answer


@contextlib.contextmanager
def joined(launch: Launch | None) -> Iterator[None]:
    """Runs the body as one of several processes, all of which end together.

    A failure in any process ends it at once, and then the others, each with one sentence. Only the
    writer has standard output.

    Args:
      launch: addresses by which the processes connect; None for a single process.

    Raises:
      UserError: the processes could not connect.
    """
    if launch is None:
        yield
        return
    _connect(launch)
    watch = _Watch()
    try:
        if not is_writer():
            silence(sys.stdout)
        yield
        watch.finish()
    except BaseException as error:
        watch.explain(error)


class _Watch:
    """Ends this process, with one sentence, when another one fails or is lost.

    A thread waits for a message from the others in JAX's key-value store, which process 0 holds; if
    the store does not respond, process 0 is lost. Process 0 checks that the others are alive.
    """

    def __init__(self):
        state = distributed.global_state
        self._client, self._index = _client(), state.process_id
        self._count = state.num_processes
        self._beats = itertools.count()
        self._seen: dict[int, tuple[str, int]] = dict.fromkeys(range(1, self._count), ("", 0))
        self._leaving = threading.Lock()
        self._at_abort = _call_at_abort(self._abort)  # kept: C code calls it
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits until all processes have finished, and disconnects."""
        self._client.wait_at_barrier(_END, 1000 * _LONG)
        if not self._index:
            self._client.key_value_set(_STOP, "")
        self._thread.join()
        jax.distributed.shutdown()
        _call_at_abort(None)

    def explain(self, error: BaseException) -> NoReturn:
        """Ends all processes because of an exception in this one, with the reason."""
        said = [str(cause) for cause in _causes(error) if not isinstance(cause, UserError)]
        losses = [text for text in said if _LOST.search(text)]
        if losses:
            time.sleep(POLL)  # the thread may receive the reason
            lost = f"another process of this run was lost ({_first_line(losses[0])}); {_CONTINUE}"
            self._leave(LOST_STATUS, lost, tell=lost)
        if isinstance(error, UserError):
            self._leave(USAGE_STATUS, str(error), tell=f"process {self._index} stopped: {error}")
        if isinstance(error, KeyboardInterrupt | SystemExit):
            status = INTERRUPTED_STATUS if isinstance(error, KeyboardInterrupt) else error.code
            tell = f"process {self._index} was ended; {_CONTINUE}"
            self._leave(status if isinstance(status, int) else CRASH_STATUS, "ended", tell=tell)
        traceback.print_exception(error)
        what = _first_line(f"{type(error).__name__} {error}")
        tell = f"process {self._index} stopped: {what}; {_CONTINUE}"
        self._leave(CRASH_STATUS, what, tell=tell)

    def _run(self) -> None:
        while True:
            try:
                word = self._hear()
                if word is None:
                    self._beat()
            except Exception:  # JAX's runtime raises several kinds when the store is gone
                self._leave(LOST_STATUS, f"process 0 of this run has died; {_CONTINUE}")
            if word is not None:
                break
        if word:
            self._leave(LOST_STATUS, word, heard=True)

    def _abort(self, number: int) -> None:
        """Replaces the abort by which JAX's runtime ends a process that lost another one."""
        del number
        self._leave(
            LOST_STATUS,
            f"JAX ended this process, as it does when another one of the run has died (its own "
            f"words stand above); {_CONTINUE}",
        )

    def _hear(self) -> str | None:
        """Waits for a message for `POLL` seconds; "" means that the run has finished."""
        try:
            return self._client.blocking_key_value_get(_STOP, 1000 * POLL)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise

    def _beat(self) -> None:
        """Reports that this process is alive; in process 0, checks the others."""
        if self._index:
            beat = str(next(self._beats))
            self._client.key_value_set(f"{_ALIVE}/{self._index}", beat, allow_overwrite=True)
            return
        beats = dict(self._client.key_value_dir_get(_ALIVE))
        for i, (before, silent) in self._seen.items():
            now = beats.get(f"{_ALIVE}/{i}", "")
            self._seen[i] = (now, silent + 1 if now == before else 0)
            if self._seen[i][1] >= SILENT_POLLS:
                seconds = POLL * SILENT_POLLS
                lost = f"process {i} of this run has not answered for {seconds} s; {_CONTINUE}"
                self._leave(LOST_STATUS, lost, tell=lost)

    def _leave(
        self, status: int, message: str, *, tell: str | None = None, heard: bool = False
    ) -> NoReturn:
        """Ends this process at once, since Python's normal exit would wait for lost processes.

        Args:
          status: exit status.
          message: message to the user of this process.
          tell: message to the users of the other processes, if there is one.
          heard: whether the message came from another process.
        """
        self._leaving.acquire()
        fail(message)
        for stream in (sys.stdout, sys.stderr):
            show(stream, stream.flush)
        for child in multiprocessing.active_children():
            child.terminate()
        # The store may be lost, or its threads stopped at `abort`: do not depend on an answer.
        threading.Timer(HEARING, os._exit, (status,)).start()
        with contextlib.suppress(Exception):
            if tell is not None:
                self._client.key_value_set(_STOP, tell)
        with contextlib.suppress(Exception):
            if tell is not None or heard:
                self._wait_until_heard()
        os._exit(status)

    def _wait_until_heard(self) -> None:
        """Keeps process 0, which holds the store, until the others have received the reason."""
        heard = self._client.key_value_increment(_HEARD, 1)
        while not self._index and heard < self._count:
            time.sleep(0.1)  # the last answer is still being sent when it has been counted
            heard = self._client.key_value_increment(_HEARD, 0)


def _call_at_abort(function: Callable[[int], None] | None) -> Any:
    """Makes `abort`, which JAX's runtime calls in its own thread, call the function first.

    Python's own handlers would run later, and in another thread. None restores the default.
    """
    handler = None if function is None else ctypes.CFUNCTYPE(None, ctypes.c_int)(function)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)
    return handler


def _connect(launch: Launch) -> None:
    logging.get_absl_logger().addFilter(_is_no_preemption)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = "" if launch.coordinator is None else f" through {launch.coordinator}"
    failed = (
        f"the processes of this run did not find each other{where}: start all of them within "
        f"{JOIN} s, with the same --coordinator and --num_processes"
    )
    handler = _call_at_abort(lambda _: os._exit(fail(failed)))
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.num_processes,
            launch.process_id,
            initialization_timeout=JOIN,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except Exception as error:  # JAX's runtime raises several kinds
        reason = _first_line(f"{type(error).__name__} {error}")
        raise UserError(f"{failed} ({reason})") from error
    finally:
        _call_at_abort(None)
        del handler


def _is_no_preemption(record: Any) -> bool:
    """Filters Orbax's message about a preemption, which the writer reports itself."""
    return "preemption sync point" not in record.getMessage()


def _client() -> Any:
    return distributed.global_state.client


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
