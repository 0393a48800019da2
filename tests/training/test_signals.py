"""Asking a run to stop: by signals, by an event from another thread, by who stops reading."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading

import pytest

from dfs_jax import output
from dfs_jax.output import CLOSED_PIPE_STATUS, say, show
from dfs_jax.training import loop
from dfs_jax.training.checkpoint import has_steps
from dfs_jax.training.loop import train
from dfs_jax.training.progress import Progress
from dfs_jax.training.signals import StopSignals
from dfs_jax.types import UserError
from tests.support.helpers import tiny_config

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CONFIG = tiny_config(epochs=1, **{"model.name": "tests.support.helpers:TinyNetwork"})  # 6 steps


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", CAUGHT)
def test_a_signal_is_a_request(number):
    before = [signal.getsignal(n) for n in CAUGHT]
    with StopSignals() as signals:
        assert signals.stop_after(1) is None
        send(number)
        assert signals.stop_after(2) == number
        assert signals.stop_after(3) == number
    assert [signal.getsignal(n) for n in CAUGHT] == before


def test_a_terminal_that_ends_asks_more_than_once():
    """The kernel and the shell send SIGHUP each; and the session manager SIGTERM too."""
    with StopSignals() as signals:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            send(number)
        assert signals.stop_after(1) == signal.SIGHUP


def test_ctrl_c_twice_ends_at_once():
    with StopSignals():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            send(signal.SIGHUP)
            assert signals.stop_after(1) is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def in_thread(function, *args, **kwargs):
    """Returns what a function returns, called in another thread; raises what it raises."""
    found, failed = [], []

    def call():
        try:
            found.append(function(*args, **kwargs))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    for error in failed:
        raise error
    return found[0]


def test_train_in_another_thread(tmp_path, monkeypatch):
    """It is stopped by its event, excludes a second one meanwhile, and goes on to the end."""
    stop, refused = threading.Event(), []
    original = loop.training_step

    def stopping_at_step_2(experiment, takes, **when):
        inner = original(experiment, takes, **when)

        def step(state, *batch):
            if int(state.step) == 1:
                with contextlib.suppress(UserError):
                    train(CONFIG, tmp_path)
                    refused.append("not refused")
                stop.set()
            return inner(state, *batch)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_step", stopping_at_step_2)
        result = in_thread(train, CONFIG, tmp_path, stop=stop)
    assert (result.step, result.stopped_by, refused) == (2, signal.SIGINT, [])
    result = in_thread(train, CONFIG, str(tmp_path) + "/")  # a path may be a text
    assert (result.step, result.stopped_by) == (6, None)
    assert not (tmp_path / ".lock").exists()


class Stream:
    """A stream that fails as one whose other end is gone."""

    def __init__(self, number):
        self._number = number

    def write(self, text):
        raise OSError(self._number, os.strerror(self._number))

    def flush(self):
        pass

    def isatty(self):
        return False

    def fileno(self):
        raise OSError(errno.EBADF, "closed")


@pytest.mark.parametrize(
    ("number", "ends_with"),
    [
        (errno.EPIPE, SystemExit),  # | head
        (errno.EIO, None),  # a lost SSH line
        (errno.ENOSPC, UserError),
    ],
)
def test_lines_that_cannot_be_shown(monkeypatch, number, ends_with):
    monkeypatch.setattr(output.sys, "stdout", Stream(number))
    if ends_with is None:
        say("line")
        return
    with pytest.raises(ends_with) as ended:
        say("line")
    if ends_with is SystemExit:
        assert ended.value.code == CLOSED_PIPE_STATUS == 141


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_progress_that_cannot_be_shown_stops_no_step(number):
    """Only a reader that went away asks the run to stop, after the step."""
    asked = []
    progress = Progress(None, lambda: asked.append("stop"), Stream(number))  # pyright: ignore
    progress._say("line")
    assert asked == (["stop"] if number == errno.EPIPE else [])
    assert isinstance(show(Stream(number), lambda: Stream(number).write("")), OSError)  # pyright: ignore


@pytest.mark.slow
@pytest.mark.parametrize("number", CAUGHT)
def test_a_terminal_that_is_gone_loses_no_step(tmp_path, monkeypatch, number):
    """The signal comes, nothing can be shown any more, and the run is saved."""
    original = loop.training_step

    def losing_at_step_2(experiment, takes, **when):
        inner = original(experiment, takes, **when)

        def step(state, *batch):
            if int(state.step) == 1:
                monkeypatch.setattr(output.sys, "stdout", Stream(errno.EIO))
                send(number)
            return inner(state, *batch)

        return step

    monkeypatch.setattr(loop, "training_step", losing_at_step_2)
    result = train(CONFIG, tmp_path)
    assert (result.step, result.stopped_by) == (2, number)
    assert has_steps(tmp_path)
