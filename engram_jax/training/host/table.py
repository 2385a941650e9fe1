"""One table's records in host memory, or in a sparse file that memory never holds whole."""

import concurrent.futures
import json
import mmap
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from engram_jax.errors import ConfigError, StorageError
from engram_jax.training.host.records import WRITTEN, Records

FORMAT = 1
HEADER = 4096  # bytes before the first record
MAGIC = b"engram_jax rows\n"
BLOCK = 1024  # records read at once when a whole table is passed over
_MAPPED = 256 << 20  # bytes that may be mapped at a time: what counts as this process's memory
_READERS = 16  # threads: a disk answers many reads in the time of one
_TOGETHER = 1024  # records a thread reads, at least


class HostTable:
  """Records [R_padded] by row id: `take`, `put`, and `written` for all that differ from zeros."""

  def __init__(self, records: Records):
    """In memory. Pages that nothing was written to take no room."""
    self.records = records
    self._array = np.zeros(records.padded, records.dtype)

  def take(self, ids_U: np.ndarray) -> np.ndarray:
    """Records [U], a copy; ids in [0, R_padded)."""
    return np.take(self._array, ids_U)

  def put(self, ids_U: np.ndarray, records_U: np.ndarray) -> None:
    """Replaces the records of distinct ids."""
    self._array[ids_U] = records_U

  def whole(self) -> np.ndarray:
    """All records, no copy."""
    return self._array

  def close(self) -> None:
    """Nothing to do: memory goes with the object."""


class FileTable:
  """The same in a sparse file: HEADER bytes, then the records, mapped a few pages at a time.

  The file is scratch for one run of the program: it starts empty, and checkpoints hold copies.
  """

  def __init__(self, records: Records, path: pathlib.Path, meaning: dict[str, Any]):
    """Makes the file, in place of one that a killed process left behind.

    Args:
      path: of the file; its folder exists.
      meaning: JSON values that say whose rows these are.

    Raises:
      ConfigError: there is a file already, of other rows.
      StorageError: it cannot be written.
    """
    self.records, self.path = records, path
    header = _header(records, meaning)
    if path.exists():
      _require_same(path, header)
    self._size = HEADER + records.padded * records.dtype.itemsize
    try:
      _make_sparse(path, header, self._size)
      self._file = open(path, "r+b")  # noqa: SIM115 (closed by close())
      self._map = mmap.mmap(self._file.fileno(), self._size)
      self._map.madvise(mmap.MADV_RANDOM)
    except (OSError, ValueError, OverflowError) as error:
      raise StorageError(f"{path} cannot be made with {self._size:,} bytes: {error}") from error
    self._array = np.frombuffer(self._map, records.dtype, records.padded, HEADER)
    self._pool = concurrent.futures.ThreadPoolExecutor(_READERS, "read-rows")
    self._mapped = 0

  def take(self, ids_U: np.ndarray) -> np.ndarray:
    """Records [U], a copy; ids in [0, R_padded). StorageError if the file is not whole any more."""
    self._require_whole()
    out_U = np.empty(len(ids_U), self.records.dtype)
    parts = max(1, min(_READERS, len(ids_U) // _TOGETHER))

    def read(part: int) -> None:
      some = slice(part * len(ids_U) // parts, (part + 1) * len(ids_U) // parts)
      np.take(self._array, ids_U[some], out=out_U[some], mode="clip")  # "raise" would copy twice

    list(self._pool.map(read, range(parts)))
    self._let_go(len(ids_U))
    return out_U

  def put(self, ids_U: np.ndarray, records_U: np.ndarray) -> None:
    """Replaces the records of distinct ids; StorageError where the disk has no room for them."""
    self._require_whole()
    # A full disk does not fail a write to mapped memory: it kills the process.
    needed = len(ids_U) * 2 * max(mmap.PAGESIZE, self.records.dtype.itemsize)
    disk = os.statvfs(self.path)
    if disk.f_bavail * disk.f_frsize < needed:
      raise StorageError(f"{self.path}: the disk has no room for {needed:,} more bytes")
    self._array[ids_U] = records_U
    self._let_go(len(ids_U))

  def written(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, records) of all written rows in rising order, a few at a time, holes passed over."""
    size, first = self.records.dtype.itemsize, 0
    while (first := self._next_data(first)) is not None:
      count = min(BLOCK, self.records.padded - first)
      content = os.pread(self._file.fileno(), count * size, HEADER + first * size)
      block = np.frombuffer(content, self.records.dtype)
      at = np.flatnonzero(block[WRITTEN])
      if at.size:
        yield (first + at).astype(np.int32), block[at]
      first += count

  def close(self) -> None:
    """Removes the file: what is to stay is in checkpoints."""
    self._pool.shutdown()
    del self._array
    self._map.close()
    self._file.close()
    self.path.unlink(missing_ok=True)

  def _next_data(self, first: int) -> int | None:
    """The first record at or after `first` that is not in a hole; None past the last."""
    if first >= self.records.padded:
      return None
    size = self.records.dtype.itemsize
    try:
      data = os.lseek(self._file.fileno(), HEADER + first * size, os.SEEK_DATA)
    except OSError:  # ENXIO: only a hole follows
      return None
    return max(first, (data - HEADER) // size)

  def _require_whole(self) -> None:
    size = os.fstat(self._file.fileno()).st_size
    if size != self._size:
      raise StorageError(f"{self.path} has {size:,} bytes, not {self._size:,}: it was changed")

  def _let_go(self, records: int) -> None:
    """Unmaps pages, which stay in the system's cache, once many were touched."""
    self._mapped += records * max(mmap.PAGESIZE, self.records.dtype.itemsize)
    if self._mapped > _MAPPED:
      self._map.madvise(mmap.MADV_DONTNEED)
      self._mapped = 0


def _header(records: Records, meaning: dict[str, Any]) -> dict[str, Any]:
  fields = [[name, list(shape), dtype.name] for name, shape, dtype in records.leaves]
  return {"format": FORMAT, "rows": records.rows, "record": fields} | meaning


def _make_sparse(path: pathlib.Path, header: dict[str, Any], size: int) -> None:
  partial = path.with_name(path.name + ".partial")
  content = MAGIC + json.dumps(header).encode() + b"\n"
  assert len(content) <= HEADER, header
  with open(partial, "wb") as file:
    file.write(content)
    file.truncate(size)
  os.replace(partial, path)


def _require_same(path: pathlib.Path, header: dict[str, Any]) -> None:
  """Refuses to replace what this run did not make."""
  with open(path, "rb") as file:
    content = file.read(HEADER)
  remove = "remove it, or choose another --run.name"
  if not content.startswith(MAGIC):
    raise ConfigError(f"{path} is no file of table rows; {remove}")
  try:
    found = json.loads(content.removeprefix(MAGIC).split(b"\n")[0])
  except ValueError:
    raise ConfigError(f"{path} is damaged: its header cannot be read; {remove}") from None
  for key, value in header.items():
    if found.get(key) != value:
      raise ConfigError(f"{path} holds other rows: {key} {found.get(key)}, not {value}; {remove}")
