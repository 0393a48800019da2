"""Lock that allows one training run at a time in a directory, and that expires with its owner.

The lock is a file that names its owner, read and written under a brief `flock`. A lock held by
`flock` itself would survive in the processes that decode images, and on some file systems it is
valid on one machine only. An owner is alive if its process is, on the same machine, or by its
heartbeat, the file's modification time, on another one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dfs_jax.output import say
from dfs_jax.paths import make_directory, reason, shown
from dfs_jax.training.processes import by_writer
from dfs_jax.types import UserError

FILE = ".lock"
BEAT = 10.0  # seconds between heartbeats
SILENT = 45.0  # seconds without a heartbeat after which an owner on another machine is dead
_LONG_AGO = 3600.0  # seconds; more than clocks of two machines differ
_SETTLE = 0.5  # seconds after which simultaneous writers without flock see who wrote last


class Owner(NamedTuple):
    """The process that trains in a directory.

    Attributes:
      token: unique name of this lock.
      machine: scope of process numbers: a boot of a machine, or a container.
      host: name of the machine.
      pid: process number.
      started: start time by the machine's clock ticks; distinguishes later processes of that pid.
      since: local time at which it took the lock.
    """

    token: str
    machine: str
    host: str
    pid: int
    started: str
    since: str


class WorkdirLock:
    """Exclusive right to train in a directory.

    Args:
      workdir: directory of the run, created if missing.
    """

    def __init__(self, workdir: Path):
        self._workdir, self._path = workdir, workdir / FILE
        self._owner: Owner | None = None
        self._released = threading.Event()

    def take(self) -> None:
        """Takes the lock; may wait to see whether an owner on another machine is alive.

        Raises:
          UserError: another process trains there, or the directory cannot be written.
        """
        make_directory(self._workdir, "workdir")
        try:
            self._owner = self._take()
        except OSError as error:
            where = shown(self._workdir)
            raise UserError(f"workdir {where} cannot be written: {reason(error)}") from error
        threading.Thread(target=self._beat, name="workdir lock", daemon=True).start()

    def check(self) -> None:
        """Raises UserError if another process has taken the lock over from this one."""
        other = _read(self._path)[0] if self._owner is not None else None
        if other is not None and other != self._owner:
            raise UserError(
                f"{shown(self._workdir)} was taken over by process {other.pid} on {other.host} at "
                f"{other.since}, while this process gave no sign of life: it writes nothing more"
            )

    def release(self) -> None:
        """Releases the lock, if this process holds it."""
        self._released.set()
        if self._owner is None or self._owner.pid != os.getpid():
            return
        with contextlib.suppress(OSError), self._exclusive(create=False):
            if _read(self._path)[0] == self._owner:
                self._path.unlink()
        self._owner = None

    def _take(self) -> Owner:
        mine, dead = _this_process(), None
        while (found := self._write(mine, dead)) is not None:
            owner, beat = found
            if owner.machine == mine.machine:
                raise self._refusal(owner)
            dead = self._listen(owner, beat)
        return mine

    def _write(
        self, mine: Owner, dead: tuple[Owner | None, int] | None
    ) -> tuple[Owner, int] | None:
        """Writes this process into the lock unless it has a living owner, which is returned.

        Args:
          mine: this process.
          dead: owner, with its last heartbeat, that was found dead.

        Returns:
          The living owner and its heartbeat; None if this process holds the lock now.
        """
        with self._exclusive() as is_exclusive:
            owner, beat = _read(self._path)
            if owner is not None and (owner, beat) != dead and not _is_dead(owner, beat):
                return owner, beat
            self._path.write_text(json.dumps(mine._asdict()), encoding="utf-8")
        if not is_exclusive:
            time.sleep(_SETTLE)
            owner, beat = _read(self._path)
            if owner is not None and owner != mine:
                return owner, beat
        return None

    def _listen(self, owner: Owner, beat: int) -> tuple[Owner | None, int]:
        """Waits for a heartbeat of an owner on another machine; returns the content without one."""
        say(
            f"{shown(self._workdir)} was last trained in by process {owner.pid} on {owner.host}: "
            f"waiting up to {SILENT:.0f} s to see whether it is alive"
        )
        deadline = time.monotonic() + SILENT
        while time.monotonic() < deadline:
            time.sleep(min(1.0, SILENT / 10))
            now = _read(self._path)
            if now != (owner, beat):
                if now[0] is None:
                    break
                raise self._refusal(now[0])
        return _read(self._path)

    def _refusal(self, owner: Owner) -> UserError:
        if owner.machine == _machine() and owner.pid == os.getpid():
            who, stop = "this process itself", "wait for it"
        else:
            who = f"process {owner.pid} on {owner.host}"
            stop = f"wait for it, end it (kill {owner.pid} there)"
        return UserError(
            f"{who} has been training in {shown(self._workdir)} since {owner.since}: {stop} or "
            f"name another workdir"
        )

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError):
                if _read(self._path)[0] == self._owner:
                    os.utime(self._path)

    @contextlib.contextmanager
    def _exclusive(self, *, create: bool = True) -> Iterator[bool]:
        """Excludes other processes from the lock file; yields False if the file system cannot."""
        flags = os.O_RDWR | (os.O_CREAT if create else 0)
        while True:
            file = os.open(self._path, flags, 0o666)
            try:
                is_exclusive = _flock(file)
                if _is_at(file, self._path):  # or its last owner has just removed it
                    yield is_exclusive
                    return
            finally:
                os.close(file)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[WorkdirLock]:
    """Holds the lock of a run's directory, in the process that writes.

    Raises:
      UserError: another process trains there, or the directory cannot be written.
    """
    lock = WorkdirLock(workdir)
    by_writer(lock.take)
    try:
        yield lock
    finally:
        lock.release()


def _is_at(file: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def _flock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # some network file systems do not support it
        return False
    return True


def _read(path: Path) -> tuple[Owner | None, int]:
    """Returns the owner and heartbeat of a lock; None if it names no owner or is incomplete."""
    try:
        with path.open(encoding="utf-8") as file:  # opening makes NFS ask its server
            beat = os.fstat(file.fileno()).st_mtime_ns
            owner = Owner(**json.load(file))
    except (OSError, ValueError, TypeError):
        return None, 0
    return (owner if isinstance(owner.pid, int) and owner.pid > 0 else None), beat


def _this_process() -> Owner:
    return Owner(
        token=secrets.token_hex(8),
        machine=_machine(),
        host=socket.gethostname(),
        pid=os.getpid(),
        started=_status(os.getpid())[1],
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def _machine() -> str:
    """Returns an identifier of the scope in which process numbers are unique."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_dead(owner: Owner, beat: int) -> bool:
    if owner.machine != _machine():
        return time.time() - beat / 1e9 > _LONG_AGO
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # a process of another user
        pass
    state, started = _status(owner.pid)
    is_another = "" not in (started, owner.started) and started != owner.started
    return is_another or state in ("Z", "X")


def _status(pid: int) -> tuple[str, str]:
    """Returns a process's state, a letter, and its start time; "" if the system does not tell.

    A process that has ended but that its parent has not reaped has the state Z.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    after_name = fields.rpartition(")")[2].split()  # a name may hold spaces and brackets
    return after_name[0], after_name[19]
