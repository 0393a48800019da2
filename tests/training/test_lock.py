"""Two processes, one directory: the second is refused, and the dead do not count."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dfs_jax.training import lock
from dfs_jax.training.lock import FILE, Owner, WorkdirLock, locked
from dfs_jax.types import UserError


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "SILENT", 0.4)
    monkeypatch.setattr(lock, "_SETTLE", 0.05)


@pytest.fixture
def other():
    """Another process of this machine."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def leave_lock(workdir, *, age=0.0, **changes):
    """Writes a lock as its owner left it: this process, but for the changes."""
    owner = lock._this_process()._replace(**changes)
    (workdir / FILE).write_text(json.dumps(owner._asdict()))
    os.utime(workdir / FILE, times=(time.time() - age,) * 2)
    return owner


def of_process(pid):
    return {"pid": pid, "started": lock._status(pid)[1]}


def test_a_process_at_work_refuses_others_in_one_sentence(tmp_path, other):
    owner = leave_lock(tmp_path, **of_process(other.pid))
    with pytest.raises(UserError, match=f"process {other.pid} on {owner.host} has been") as error:
        WorkdirLock(tmp_path).take()
    assert owner.since in str(error.value)
    assert f"kill {other.pid}" in str(error.value)
    assert "\n" not in str(error.value)
    os.kill(other.pid, signal.SIGSTOP)  # Ctrl-Z: it may go on
    with pytest.raises(UserError, match="has been training"):
        WorkdirLock(tmp_path).take()


@pytest.mark.parametrize("is_reaped", [False, True])
def test_a_killed_process_does_not_count(tmp_path, other, is_reaped):
    leave_lock(tmp_path, **of_process(other.pid))
    other.kill()
    if is_reaped:
        other.communicate()
    else:
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # its parent has not heard of it
    with locked(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


def test_a_later_process_of_the_same_number_does_not_count(tmp_path, other):
    leave_lock(tmp_path, pid=other.pid, started="1")
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "\0\0\0"])
def test_half_a_lock_is_none(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with locked(tmp_path):
        pass
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("age", [0.0, 7200.0])
def test_a_machine_that_is_silent_is_dead(tmp_path, capsys, age):
    leave_lock(tmp_path, machine="elsewhere", host="node7", age=age)
    with locked(tmp_path):
        assert lock._read(tmp_path / FILE)[0].machine == lock._machine()
    assert ("on node7: waiting" in capsys.readouterr().out) == (not age)


@pytest.mark.parametrize("skew", [-600.0, 600.0])
def test_a_machine_whose_heart_beats_refuses_others_whatever_its_clock(tmp_path, skew):
    leave_lock(tmp_path, machine="elsewhere", host="node7", age=skew)
    ended = threading.Event()

    def beat():
        beats = 0
        while not ended.wait(0.05):
            beats += 1
            os.utime(tmp_path / FILE, times=(time.time() - skew + beats,) * 2)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="on node7 has been training"):
            WorkdirLock(tmp_path).take()
    finally:
        ended.set()
        thread.join()


def test_the_heart_beats_while_the_lock_is_held(tmp_path):
    with locked(tmp_path):
        os.utime(tmp_path / FILE, times=(0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / FILE).stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - (tmp_path / FILE).stat().st_mtime < 60


def test_threads_of_one_process_exclude_each_other(tmp_path):
    """All start at once: exactly one of them gets the lock."""
    barrier, kept, taken, refused = threading.Barrier(7), threading.Barrier(7), [], []

    def take():
        mine = WorkdirLock(tmp_path)
        barrier.wait()
        try:
            mine.take()
            taken.append(mine)
        except UserError as error:
            refused.append(str(error))
        kept.wait()

    threads = [threading.Thread(target=take) for _ in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    assert len(refused) == 6
    assert all("this process itself has been training" in text for text in refused)
    taken[0].release()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt, SystemExit])
def test_the_lock_is_given_back_however_the_run_ends(tmp_path, error):
    with contextlib.suppress(error), locked(tmp_path / "new"):
        assert (tmp_path / "new" / FILE).exists()
        raise error
    assert list((tmp_path / "new").iterdir()) == []


def test_who_was_taken_for_dead_writes_nothing_more(tmp_path, other):
    """A machine that stood still for a while comes back."""
    with locked(tmp_path) as held:
        held.check()
        theirs = leave_lock(tmp_path, token="theirs", **of_process(other.pid))
        with pytest.raises(UserError, match=f"taken over by process {other.pid}"):
            held.check()
    assert lock._read(tmp_path / FILE)[0] == theirs  # and keeps its hands off their lock


def test_a_lock_that_somebody_deletes_is_no_reason_to_stop(tmp_path):
    with locked(tmp_path) as held:
        (tmp_path / FILE).unlink()
        held.check()


def test_file_systems_without_flock(tmp_path, monkeypatch, other):
    def flock(file, mode):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with locked(tmp_path), pytest.raises(UserError, match="this process itself"):
        WorkdirLock(tmp_path).take()
    theirs = Owner("theirs", lock._machine(), "host", other.pid, lock._status(other.pid)[1], "now")

    def both_write(seconds):
        (tmp_path / FILE).write_text(json.dumps(theirs._asdict()))

    monkeypatch.setattr(lock.time, "sleep", both_write)  # who wrote last has it
    with pytest.raises(UserError, match=f"process {other.pid} on host"):
        WorkdirLock(tmp_path).take()


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / FILE).mkdir()
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        WorkdirLock(tmp_path).take()
