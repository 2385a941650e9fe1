"""Event files for TensorBoard, written in the caller's thread.

tensorboardX's SummaryWriter writes in a thread of its own. Where that thread ends, as on a full
disk, its queue of ten events fills up and the next one waits for ever: the training loop with it.
So only its protocol buffers and summaries are used; each event is appended whole, as the TFRecord
that TensorBoard reads: length (u64), its checksum (u32), the event, its checksum (u32).
"""

import itertools
import os
import pathlib
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

from engram_jax.core.appended_file import AppendedFile

_NUMBERS = itertools.count()  # of the files of this process: their names hold seconds alone


class EventFile:
  """The event file of one start of a run; its methods raise OSError where it cannot be written.

  Attributes:
    folder: that TensorBoard reads.
    is_failing: the last attempt to write failed.
  """

  def __init__(self, folder: pathlib.Path, purge_step: int):
    """Makes no file yet: the first event does.

    purge_step: TensorBoard forgets the events of earlier files from this step on.
    """
    from tensorboardX import record_writer, summary  # half a second, and only if wanted
    from tensorboardX.proto import event_pb2

    self.folder, self._purge_step = folder, purge_step
    self._summary, self._checksum = summary, record_writer.masked_crc32c
    self._events: Any = event_pb2  # made when it is imported, so nothing is known of its names
    self._file: AppendedFile | None = None
    suffix = f"{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
    self._path = folder / f"events.out.tfevents.{suffix}"
    self.is_failing = False

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Adds a number to the curve of each name."""
    self._add(step, [self._summary.scalar(name, value) for name, value in values.items()])

  def text(self, step: int, name: str, text: str) -> None:
    """Adds a text."""
    self._add(step, [self._summary.text(name, text)])

  def close(self) -> None:
    """Closes the file."""
    if self._file is not None:
      self._file.close()
      self._file = None

  def _add(self, step: int, summaries: list[Any]) -> None:
    try:
      if self._file is None:
        self._file = self._open()
      for summary in summaries:
        self._file.append(self._record(step=step, summary=summary))
    except OSError:
      self.is_failing = True
      raise
    self.is_failing = False

  def _open(self) -> AppendedFile:
    self.folder.mkdir(exist_ok=True)
    session = self._events.SessionLog(status=self._events.SessionLog.START)
    start = self._record(file_version="brain.Event:2")
    start += self._record(step=self._purge_step, session_log=session)
    file = AppendedFile(self._path)
    try:
      file.append(start)
    except OSError:
      file.close()
      raise
    return file

  def _record(self, **content: Any) -> bytes:
    event = self._events.Event(wall_time=time.time(), **content).SerializeToString()
    length = struct.pack("<Q", len(event))
    return b"".join(
      (
        length,
        struct.pack("<I", self._checksum(length)),
        event,
        struct.pack("<I", self._checksum(event)),
      )
    )
