"""One table's records in host memory, or in a sparse file that memory never holds whole.

Local letter: U, records that are read or written.
"""

import concurrent.futures
import errno
import mmap
import os
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np

from engram_jax.errors import StorageError
from engram_jax.tables.row_schema import WRITTEN, RowSchema

AT_ONCE = 1 << 14  # records read at once, at most, when a whole table is passed over
_FROM_FILE = 1024  # the same of a file: what follows a hole may be another
_MAPPED = 256 << 20  # bytes that may be mapped at a time: what counts as this process's memory
_READERS = 16  # threads: a disk answers many reads in the time of one
_TOGETHER = 1024  # records a thread reads, at least


class HostTable:
  """Records [R_padded] by row id: `take`, `put`, and `written` for all that differ from zeros."""

  def __init__(self, schema: RowSchema):
    """Makes an empty table in memory. Pages that nothing was written to take no room."""
    self.schema = schema
    self._array = np.zeros(schema.padded, schema.dtype)
    self._written = np.zeros(schema.padded, bool)  # so that empty pages need not be looked at

  def take(self, ids_U: np.ndarray) -> np.ndarray:
    """Records [U], a copy; ids in [0, R_padded)."""
    return np.take(self._array, ids_U)

  def put(self, ids_U: np.ndarray, records_U: np.ndarray) -> None:
    """Replaces the records of distinct ids."""
    self._array[ids_U] = records_U
    self._written[ids_U] = records_U[WRITTEN] != 0

  def written(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, records) of all written rows in rising order, copies, up to AT_ONCE."""
    for first in range(0, self.schema.padded, AT_ONCE):
      at = np.flatnonzero(self._written[first : first + AT_ONCE])
      if at.size:
        ids = (first + at).astype(np.int32)
        yield ids, self._array[ids]

  def close(self) -> None:
    """Does nothing: memory goes with the object."""


class FileTable:
  """The records of `HostTable` in a sparse file, mapped a few pages at a time.

  The file is scratch for one run of the program: it starts empty and has no name, so the system
  takes it back however the process ends. Checkpoints hold copies.
  """

  def __init__(self, folder: pathlib.Path, schema: RowSchema):
    """Makes the file on the disk of `folder`; StorageError where it cannot be made."""
    self.schema, self._folder = schema, folder
    self._size = max(1, schema.padded) * schema.dtype.itemsize
    try:
      self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by close())
      self._file.truncate(self._size)
      self._map = mmap.mmap(self._file.fileno(), self._size)
      self._map.madvise(mmap.MADV_RANDOM)
    except (OSError, ValueError, OverflowError) as error:
      raise StorageError(
        f"{folder}: no file of {self._size:,} bytes can be made there: {error}"
      ) from error
    self._array = np.frombuffer(self._map, schema.dtype, schema.padded)
    self._pool = concurrent.futures.ThreadPoolExecutor(_READERS, "read-rows")
    self._mapped = 0

  def take(self, ids_U: np.ndarray) -> np.ndarray:
    """Records [U], a copy; ids in [0, R_padded)."""
    out_U = np.empty(len(ids_U), self.schema.dtype)
    parts = max(1, min(_READERS, len(ids_U) // _TOGETHER))

    def read(part: int) -> None:
      some = slice(part * len(ids_U) // parts, (part + 1) * len(ids_U) // parts)
      np.take(self._array, ids_U[some], out=out_U[some], mode="clip")  # "raise" would copy twice

    list(self._pool.map(read, range(parts)))
    self._unmap_pages(len(ids_U))
    return out_U

  def put(self, ids_U: np.ndarray, records_U: np.ndarray) -> None:
    """Replaces the records of distinct ids; StorageError where the disk has no room for them."""
    # A full disk does not fail a write to mapped memory: it kills the process.
    needed = len(ids_U) * 2 * max(mmap.PAGESIZE, self.schema.dtype.itemsize)
    disk = os.fstatvfs(self._file.fileno())
    if disk.f_bavail * disk.f_frsize < needed:
      raise StorageError(f"{self._folder}: the disk has no room for {needed:,} more bytes")
    self._array[ids_U] = records_U
    self._unmap_pages(len(ids_U))

  def written(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, records) of all written rows in rising order, a few at a time, holes passed over.

    Raises StorageError for what cannot be read.
    """
    size, first = self.schema.dtype.itemsize, 0
    while (first := self._next_data(first)) is not None:
      count = min(_FROM_FILE, self.schema.padded - first)
      content = os.pread(self._file.fileno(), count * size, first * size)
      block = np.frombuffer(content, self.schema.dtype)
      at = np.flatnonzero(block[WRITTEN])
      if at.size:
        yield (first + at).astype(np.int32), block[at]
      first += count

  def stat(self) -> os.stat_result:
    """The file's size, and the blocks it takes on the disk."""
    return os.fstat(self._file.fileno())

  def close(self) -> None:
    """Gives the file back: what is to stay is in checkpoints."""
    self._pool.shutdown()
    del self._array
    self._map.close()
    self._file.close()

  def _next_data(self, first: int) -> int | None:
    """The first record at or after `first` that is not in a hole; None past the last."""
    if first >= self.schema.padded:
      return None
    size = self.schema.dtype.itemsize
    try:
      data = os.lseek(self._file.fileno(), first * size, os.SEEK_DATA)
    except OSError as error:
      if error.errno == errno.ENXIO:  # only a hole follows
        return None
      raise StorageError(f"{self._folder}: rows cannot be read: {error}") from error
    return max(first, data // size)

  def _unmap_pages(self, records: int) -> None:
    """Unmaps pages, which stay in the system's cache, once many were touched."""
    self._mapped += records * max(mmap.PAGESIZE, self.schema.dtype.itemsize)
    if self._mapped > _MAPPED:
      self._map.madvise(mmap.MADV_DONTNEED)
      self._mapped = 0


Table = HostTable | FileTable
