"""Writes scalars as TensorBoard events immediately, so that a full disk is noticed at once.

tensorboardX is imported with the first scalar; training also works without it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging


class EventsFile:
    """A new events file in `directory`, opened with its first scalar.

    tensorboardX's own `SummaryWriter` writes in a thread, whose errors are lost.

    Args:
      directory: directory for TensorBoard.
      start_step: step from which events in earlier files of this directory are superseded.
    """

    def __init__(self, directory: Path, start_step: int):
        self._directory = directory
        self._start_step = start_step
        self._writer: Any = None
        self._is_missing = False

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of one step; without tensorboardX, logs once that it is missing.

        Raises:
          OSError: the scalars could not be written.
        """
        if self._writer is None and not self._is_missing:
            self._writer = self._open()
        if self._writer is None:
            return
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore
        from tensorboardX.summary import scalar

        for name, value in scalars.items():
            summary = scalar(name, value)
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> Any:
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
        except ModuleNotFoundError:
            self._is_missing = True
            logging.warning("tensorboardX is not installed: metrics.jsonl alone is written")
            return None
        self._directory.mkdir(exist_ok=True)
        writer = EventsWriter(str(self._directory / "events"))
        if self._start_step:
            begun = SessionLog(status=SessionLog.START)
            writer.write_event(
                Event(wall_time=time.time(), step=self._start_step + 1, session_log=begun)
            )
        return writer
