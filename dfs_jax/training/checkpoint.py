"""Verified checkpoints: the best and the latest ones, with a checksum of every leaf."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from dfs_jax.files import replacing, what_helps
from dfs_jax.paths import local_path
from dfs_jax.training.processes import by_writer
from dfs_jax.training.sharding import gathered
from dfs_jax.training.structure import Structure, difference, saved_structure, structure_of
from dfs_jax.types import PyTree, UserError

DIRECTORY = "checkpoints"
DAMAGED_DIRECTORY = "damaged_checkpoints"
MANIFEST = "files.json"
LATEST_TO_KEEP = 2
OVERHEAD_BYTES = 2**20  # names, shapes and block rounding of some hundred small files
NEVER_BEST = -math.inf


class DamagedCheckpoint(Exception):
    """A checkpoint whose files cannot be read or hold other values than were saved."""


class Checkpoints:
    """The checkpoints of one run, in `DIR/checkpoints`.

    The two latest and the best by score are kept. Each holds the state and a checksum of every
    leaf; a checkpoint exists only once it has been written completely.

    Args:
      workdir: directory of the run.
      read_only: whether to never write, delete or set aside anything (for evaluation).
    """

    def __init__(self, workdir: Path, *, read_only: bool = False):
        self._directory = local_path(workdir, "workdir").resolve() / DIRECTORY
        self._read_only = read_only
        if read_only and not self._directory.is_dir():
            raise UserError(f"there are no checkpoints in {workdir}: train there first")
        self._manager = self._open()
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None

    def save(self, state: PyTree, step: int, score: float | None) -> None:
        """Writes the state after `step` steps; returns when it is safely on disk.

        Args:
          score: quantity that the best checkpoint maximises; None or non-finite is never best.

        Raises:
          UserError: it could not be written (a full disk); earlier checkpoints are unchanged.
        """
        self.start_saving(state, step, score)
        self.wait()

    def start_saving(self, state: PyTree, step: int, score: float | None) -> None:
        """Starts to write the state, as `save` does, in a separate thread.

        With several processes it writes at once, as they must communicate in the same order.

        Args:
          state: arrays that must not be donated before `wait`.

        Raises:
          UserError: this state or the one before could not be written.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        score = score if score is not None and math.isfinite(score) else NEVER_BEST
        by_writer(self._check_space, sum(leaf.nbytes for leaf in jax.tree.leaves(state)), step)
        if jax.process_count() > 1:
            self._write(state, step, score)
        else:
            self._writing = self._thread.submit(self._write, state, step, score)

    def wait(self) -> None:
        """Waits until the last state is safely on disk; raises UserError if it cannot be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, state: PyTree, step: int, score: float) -> None:
        document = {"checksums": leaf_checksums(state)}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), document=ocp.args.JsonSave(document)
                ),
                metrics={"score": score},
            )
            self._manager.wait_until_finished()
            by_writer(_write_manifest, self._directory / str(step), errors=(OSError,))
        except Exception as error:  # orbax and tensorstore raise many types
            raise UserError(
                f"the checkpoint of step {step} could not be written to {self._directory} "
                f"({first_line(error)}); {self._describe_last_good(step)}: {what_helps(error)}"
            ) from error

    def restore_latest(self, target: PyTree) -> tuple[PyTree, int] | None:
        """Returns the newest undamaged state and its step; None if none was ever saved.

        Damaged checkpoints are logged, and the one before is used; once an undamaged one is found,
        they are moved to `DIR/damaged_checkpoints`.

        Args:
          target: pytree of `jax.ShapeDtypeStruct` with shardings, with the state's structure.

        Raises:
          UserError: all checkpoints are damaged, or the newest undamaged one is of another network
            or optimizer (nothing is moved then).
        """
        self.wait()
        steps = by_writer(self._steps_newest_first)
        for i, step in enumerate(steps):
            try:
                state = self._restore(step, target)
            except DamagedCheckpoint as error:
                logging.error("%s; using the one before it", error)
                continue
            for damaged in steps[:i]:
                self._set_aside(damaged)
            return state, step
        if steps:
            raise UserError(
                f"every checkpoint in {self._directory.parent} is damaged (steps {steps}): "
                f"start again in another --workdir"
            )
        if has_steps(self._directory.parent):
            aside = self._directory.parent / DAMAGED_DIRECTORY
            raise UserError(
                f"every checkpoint of this run was set aside as damaged: delete {aside} to train "
                f"from the start, or move what is whole back to {self._directory}"
            )
        return None

    def restore(self, which: str, target: PyTree) -> tuple[PyTree, int]:
        """Returns the state and step of the checkpoint `"best"`, `"latest"` or of a given step.

        Raises:
          UserError: the checkpoint does not exist, is damaged, or is of another network.
        """
        self.wait()
        step = self._step_of(which)
        try:
            return self._restore(step, target), step
        except DamagedCheckpoint as error:
            others = [s for s in self._manager.all_steps() if s != step]
            raise UserError(f"{error}; others here: {others or 'none'}") from error

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Returns the step with the highest score, the latest of equals; None if there is none."""
        self.wait()
        return max(self._manager.all_steps(), key=lambda s: (self._score(s), s), default=None)

    def latest_step(self) -> int | None:
        """Returns the newest step; None if there is none."""
        self.wait()
        return max(self._manager.all_steps(), default=None)

    def close(self) -> None:
        """Waits until everything is on disk and closes the files."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        best = BestN(get_metric_fn=_score_of, n=1)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(LATEST_TO_KEEP), best]),
            best_fn=_score_of,
            cleanup_tmp_directories=not self._read_only,
            create=not self._read_only,
            enable_async_checkpointing=False,
        )
        try:
            return ocp.CheckpointManager(
                self._directory,
                options=options,
                item_names=("state", "document"),
            )
        except OSError as error:
            raise UserError(f"cannot write to {self._directory}: {first_line(error)}") from error

    def _restore(self, step: int, target: PyTree) -> PyTree:
        directory = self._directory / str(step)
        by_writer(_check_files, directory, errors=(DamagedCheckpoint,))
        self._check_structure(step, target)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(target), document=ocp.args.JsonRestore()
        )
        try:
            restored: Any = self._manager.restore(step, args=items)
            state, expected = restored.state, restored.document["checksums"]
        except Exception as error:  # truncated files raise many types
            if (directory / MANIFEST).is_file():  # the files are unchanged since they were written
                raise UserError(
                    f"{directory} does not fit this run ({first_line(error)}): restore the code "
                    f"and the packages that wrote it, or name another --workdir"
                ) from error
            damage = f"the checkpoint of step {step} is damaged ({first_line(error)})"
            if jax.process_count() > 1:  # other processes may have read it, and would wait
                raise UserError(
                    f"{damage}; move {directory} away and start the same "
                    f"command again, to go on from the one before it"
                ) from error
            raise DamagedCheckpoint(damage) from error
        found = leaf_checksums(state)
        wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        if wrong:
            raise DamagedCheckpoint(
                f"the checkpoint of step {step} is damaged "
                f"(checksums differ: {', '.join(wrong[:3])})"
            )
        return state

    def _check_structure(self, step: int, target: PyTree) -> None:
        """Raises UserError unless the checkpoint holds arrays of the target's shapes and types."""
        directory = self._directory / str(step)
        saved = by_writer(_saved_structure, directory, errors=(DamagedCheckpoint,))
        mismatch = difference(saved, structure_of(target))
        if mismatch is not None:
            raise UserError(
                f"{directory} is a checkpoint of another network, optimizer or method: {mismatch}; "
                f"restore the code and the data that it was trained with, or name another --workdir"
            )

    def _check_space(self, state_bytes: int, step: int) -> None:
        """Raises UserError before writing to a full disk, where libraries print many tracebacks."""
        needed = state_bytes + OVERHEAD_BYTES
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise UserError(
                f"the checkpoint of step {step} needs {needed / 2**20:.1f} MiB and the disk of "
                f"{self._directory} has {free / 2**20:.1f} MiB left; "
                f"{self._describe_last_good(step)}: make room and start the same command again"
            )

    def _set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint away, so that its step can be saved again."""
        self._manager.close()
        by_writer(_move_away, self._directory / str(step))
        self._manager = self._open()

    def _steps_newest_first(self) -> list[int]:
        return sorted(self._manager.all_steps(), reverse=True)

    def _step_of(self, which: str) -> int:
        steps: list[int] = by_writer(self._steps_newest_first)[::-1]
        named: dict[str, Callable[[], int | None]] = {
            "best": self.best_step,
            "latest": self.latest_step,
        }
        step = named[which]() if which in named else int(which) if which.isdigit() else None
        if step not in steps:
            raise UserError(
                f"there is no checkpoint {which!r} in {self._directory}: "
                f"choose best, latest or one of {steps or 'none'}"
            )
        return step

    def _score(self, step: int) -> float:
        metrics = self._manager.metrics(step)
        return NEVER_BEST if metrics is None else _score_of(metrics)

    def _describe_last_good(self, failed_step: int) -> str:
        steps = [s for s in self._manager.all_steps() if s != failed_step]
        if not steps:
            return "no checkpoint exists yet"
        return f"the last good one is step {max(steps)}"


def has_steps(workdir: Path) -> bool:
    """Returns whether a run has saved any checkpoint in `workdir`, damaged or not."""
    directories = (workdir / DIRECTORY, workdir / DAMAGED_DIRECTORY)
    return any(path.name.isdigit() for directory in directories for path in directory.glob("*"))


def latest_saved_step(workdir: Path) -> int:
    """Returns the newest step that a run has saved in `workdir`, damaged or not; 0 for none."""
    steps = (int(p.name) for p in (workdir / DIRECTORY).glob("*") if p.name.isdigit())
    return max(steps, default=0)


def leaf_checksums(state: PyTree) -> dict[str, int]:
    """Returns the CRC-32 of every leaf's bytes, by its path in the tree."""
    # Leaf by leaf, so that of arrays split over processes only one is whole at a time.
    return {
        jax.tree_util.keystr(path): zlib.crc32(np.ascontiguousarray(gathered(leaf)).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def file_checksums(directory: Path) -> dict[str, int]:
    """Returns the CRC-32 of every file below `directory` except the manifest, by its path there."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {
        path.relative_to(directory).as_posix(): zlib.crc32(path.read_bytes())
        for path in files
        if path.name != MANIFEST
    }


def _move_away(checkpoint: Path) -> None:
    destination = checkpoint.parent.parent / DAMAGED_DIRECTORY / checkpoint.name
    shutil.rmtree(destination, ignore_errors=True)
    destination.parent.mkdir(exist_ok=True)
    shutil.move(checkpoint, destination)


def _saved_structure(directory: Path) -> Structure:
    try:
        return saved_structure(directory / "state")
    except Exception as error:  # damaged files raise many types
        raise DamagedCheckpoint(
            f"the checkpoint of step {directory.name} is damaged ({first_line(error)})"
        ) from error


def _write_manifest(directory: Path) -> None:
    """Writes the checksums of a finished checkpoint's files; an interrupted one has none."""
    text = json.dumps(file_checksums(directory))
    with replacing(directory / MANIFEST) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _check_files(directory: Path) -> None:
    """Raises DamagedCheckpoint if files changed, since libraries print tracebacks on reading them.

    The checksums of the leaves are decisive; a checkpoint without a manifest has them too.
    """
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return
    try:
        expected = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError:
        expected = {MANIFEST: None}
    found = file_checksums(directory)
    wrong = [name for name in sorted(expected | found) if expected.get(name) != found.get(name)]
    if wrong:
        raise DamagedCheckpoint(
            f"the checkpoint of step {directory.name} is damaged "
            f"({len(wrong)} of its files changed, {wrong[0]} among them)"
        )


def first_line(error: BaseException) -> str:
    """Returns an exception's message, shortened to its first line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def _score_of(metrics: Mapping[str, float]) -> float:
    return metrics["score"]
