"""A file that grows by whole pieces: lines of metrics, events of TensorBoard."""

import contextlib
import os
import pathlib


class AppendedFile:
  """A file opened for appending; a piece is in it whole or, where the system refuses, not at all.

  Attributes:
    size: bytes of the whole pieces, and of what was there before.
    is_failing: the last piece could not be written.
  """

  def __init__(self, path: pathlib.Path):
    """Opens or makes the file; raises OSError."""
    self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    self.size = os.fstat(self._descriptor).st_size
    self.is_failing = False

  def append(self, piece: bytes) -> None:
    """Writes a piece; raises OSError where the file is left without it."""
    try:
      if self.is_failing:  # a part of the last piece, if it could not be cut off then
        os.ftruncate(self._descriptor, self.size)
      if os.write(self._descriptor, piece) < len(piece):
        raise OSError("no room for all of it")
    except OSError:
      self.is_failing = True
      with contextlib.suppress(OSError):  # the next piece tries again
        os.ftruncate(self._descriptor, self.size)
      raise
    self.is_failing = False
    self.size += len(piece)

  def close(self) -> None:
    """Closes the file; nothing is left to be written."""
    os.close(self._descriptor)
