"""FileRows: tables in a file on disk, of which a fetch reads only its rows.

The file is mapped with random-access advice (read-ahead would read many rows for each one needed)
and read by threads, so that a fetch has as many requests at the disk as there are threads. Rows are
cached only by the system's page cache; the part of it that this process maps at once is bounded.

A row is decoded after the blocks that hold it were found as they were written, each once
(checksums.py). What changes on the disk afterwards is noticed by the file's size and time alone.
"""

import concurrent.futures
import mmap
import os
import pathlib
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np

from engram_jax.errors import StorageError
from engram_jax.inference.stores import checksums, table_file
from engram_jax.inference.stores.base import RowStore, remaining_seconds
from engram_jax.inference.stores.checksums import PIECE, VerifiedBlocks
from engram_jax.inference.stores.host import HostRows, read_rows
from engram_jax.inference.stores.table_file import TableEntry
from engram_jax.memory.codecs import decode, row_bytes, unpack

THREADS = 32
MAPPED_BYTES = 256 << 20
_MIN_CHUNK, _MAX_CHUNK = 4, 4096  # rows that one thread reads at a time
_INLINE_ROWS = 64  # tried without threads: handing them over takes longer than reading
_SAMPLE_ROWS = 16  # read to find out if the rest is in the page cache
_CACHED_CHUNK = 4096  # rows that one thread reads at a time if so
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # fail rather than wait for the disk (Linux)
_PAGE = 4096


class FileRows(RowStore):
  """The rows of a table file, verified and decoded as they are fetched.

  A fetch of a row in a damaged block raises StorageError, however often it is tried, and names the
  file, the layer and the rows.

  The file must not change while it is open: a fetch that finds another size or modification time
  raises StorageError, whatever it has read. (A file truncated during a read ends the process, as
  the system does with all mapped files.)
  """

  level = "file"

  def __init__(
    self,
    path: str | os.PathLike,
    *,
    dtype: np.typing.DTypeLike = np.float32,
    threads: int = THREADS,
    mapped_bytes: int = MAPPED_BYTES,
    verify: bool = True,
  ):
    """Opens a file that `write_table_file` wrote and reads its header and its checksums.

    Args:
      dtype: of fetched rows, float32 or bfloat16.
      threads: reads that may wait for the disk at once.
      mapped_bytes: about how many bytes of the file's pages this process keeps mapped; a fetch may
        be larger.
      verify: compare each block's checksum when a row in it is first read. False trusts the file,
        and does not read its checksums.

    Raises StorageError for a file that is missing, damaged or no table file; ValueError for numbers
    below 1.
    """
    if threads < 1 or mapped_bytes < 1:
      raise ValueError(f"threads={threads} and mapped_bytes={mapped_bytes} must be at least 1")
    self.path = pathlib.Path(path)
    try:
      self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (held until close)
    except OSError as error:
      raise StorageError(f"{self.path} cannot be opened: {error.strerror}") from None
    try:
      self.header, layout = table_file.read_header(self._file, str(self.path))
      super().__init__(layout, self.header.token_map_digest, self.header.width, dtype)
      self._tables, self._blocks = self._map(), None
      if verify:
        name = str(self.path)
        self._blocks = VerifiedBlocks(self._file, self.header, name, self._mapping)
    except BaseException:
      self._file.close()
      raise
    self._opened_stat = self._stat()
    self._row_pages = 1 + row_bytes(self.header.kind, self.width) // _PAGE
    self._mapped_pages, self._lock, self._pages = mapped_bytes // _PAGE, threading.Lock(), 0
    self._pool = concurrent.futures.ThreadPoolExecutor(threads, "rows-file")
    self._threads = threads

  def verify(self) -> None:
    """Reads the complete file and compares its checksums; StorageError names changed rows."""
    with open(self.path, "rb") as file:
      header, _ = table_file.read_header(file, str(self.path))
      checksums.verify(file, header, str(self.path))

  def in_memory(self) -> HostRows:
    """Copies all rows, still encoded, to host memory; with `verify`, once all were compared."""
    self._require_open()
    start, end = self.header.data_range
    data = np.empty(end - start, np.uint8)
    pieces = ((start + i, data[i : i + PIECE]) for i in range(0, len(data), PIECE))
    self._wait([self._pool.submit(self._load_piece, *piece) for piece in pieces], None)
    self._require_unchanged()
    packed = [
      data[table.offset - start : table.end - start].reshape(table.rows, -1)
      for table in self.header.tables
    ]
    kind, width = self.header.kind, self.width
    return HostRows(
      packed, self.layout, self.token_map_digest, kind=kind, width=width, dtype=self.dtype
    )

  def _load_piece(self, offset: int, out: np.ndarray) -> None:
    checksums.fill(self._file.fileno(), out, offset, str(self.path))
    if self._blocks:
      self._blocks.require_piece(offset, out)

  def drop_page_cache(self) -> None:
    """Asks the system to drop the file's pages, so that the next reads come from the disk, and are
    verified again."""
    self._require_open()
    self._unmap_pages()
    if self._blocks:
      self._blocks.forget()
    os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

  def close(self) -> None:
    """Waits for reads in flight, ends the threads and closes the file."""
    if self._file.closed:
      return
    super().close()
    self._pool.shutdown(cancel_futures=True)
    self._tables = ()
    if self._blocks:
      self._blocks.unmap()
    del self._mapping  # unmapped with the last view of it: an exception may hold one
    self._file.close()

  def _map(self) -> tuple[np.ndarray, ...]:
    """Each layer's packed rows, uint8 [R, row_bytes], as views of the mapped file."""
    self._mapping = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
    self._mapping.madvise(mmap.MADV_RANDOM)
    return tuple(
      np.frombuffer(self._mapping, np.uint8, table.bytes, table.offset).reshape(table.rows, -1)
      for table in self.header.tables
    )

  def _unmap_pages(self) -> None:
    """Unmaps all pages; the system may keep them in its page cache."""
    self._mapping.madvise(mmap.MADV_DONTNEED)

  def _stat(self) -> tuple[int, int]:
    stat = os.fstat(self._file.fileno())
    return stat.st_size, stat.st_mtime_ns

  def _require_unchanged(self) -> None:
    if self._stat() != self._opened_stat:
      raise StorageError(f"{self.path} has changed since it was opened: open it again")

  def _read(
    self, ids_by_layer: Sequence[np.ndarray], outs: Sequence[np.ndarray], until: float | None
  ) -> None:
    remaining_seconds(until)
    self._require_unchanged()
    begin, rows = time.perf_counter(), sum(map(len, ids_by_layer))
    if not _NOWAIT or rows > _INLINE_ROWS or not self._read_cached(ids_by_layer, outs):
      chunks = list(self._chunks(ids_by_layer, outs))
      self._wait([self._pool.submit(self._read_chunk, *chunk) for chunk in chunks], until)
    self._require_unchanged()
    size = rows * row_bytes(self.header.kind, self.width)
    self.telemetry.add(hits=rows, bytes=size, seconds=time.perf_counter() - begin)

  def _read_cached(self, ids_by_layer: Sequence[np.ndarray], outs: Sequence[np.ndarray]) -> bool:
    """Reads the rows in this thread if all are verified and in the page cache; returns False if
    not."""
    size, file = row_bytes(self.header.kind, self.width), self._file.fileno()
    for table, ids, out in zip(self.header.tables, ids_by_layer, outs, strict=True):
      numbers = ids.tolist()
      if self._blocks and not self._blocks.contain(table, numbers):
        return False
      packed = np.empty((len(ids), size), np.uint8)
      try:
        for row, i in zip(packed, numbers, strict=True):
          if os.preadv(file, [row.data], table.offset + i * size, _NOWAIT) != size:
            return False
      except OSError:  # not in memory, or no RWF_NOWAIT on this file system
        return False
      out[:] = decode(*unpack(packed, self.header.kind, self.width), self.header.kind)
    return True

  def _chunks(
    self, ids_by_layer: Sequence[np.ndarray], outs: Sequence[np.ndarray]
  ) -> Iterator[tuple[TableEntry, np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (entry, table, ids, out) for one thread each, all of about the same size."""
    total = sum(map(len, ids_by_layer))
    size = min(max(-(-total // self._threads), _MIN_CHUNK), _MAX_CHUNK)
    if self._seem_cached(ids_by_layer):  # no reads to overlap
      size = max(size, _CACHED_CHUNK)
    entries = self.header.tables
    for entry, table, ids, out in zip(entries, self._tables, ids_by_layer, outs, strict=True):
      for start in range(0, len(ids), size):
        yield entry, table, ids[start : start + size], out[start : start + size]

  def _seem_cached(self, ids_by_layer: Sequence[np.ndarray]) -> bool:
    """Returns True if a sample of the rows is in the page cache."""
    sample = [ids[:: max(1, len(ids) // _SAMPLE_ROWS)] for ids in ids_by_layer]
    outs = [np.empty((len(ids), self.width), self.dtype) for ids in sample]
    return bool(_NOWAIT) and self._read_cached(sample, outs)

  def _read_chunk(
    self, entry: TableEntry, table: np.ndarray, ids: np.ndarray, out: np.ndarray
  ) -> None:
    if self._blocks:
      self._blocks.require(entry, ids)
    read_rows(table, ids, out, self.header.kind)
    self._count_mapped(len(ids))

  def _wait(self, reads: list[concurrent.futures.Future], until: float | None) -> None:
    """Waits for all reads; cancels the rest when one fails or the deadline passes."""
    late = reads
    try:
      _, late = concurrent.futures.wait(
        reads, timeout=remaining_seconds(until), return_when=concurrent.futures.FIRST_EXCEPTION
      )
      for read in reads:
        if read not in late:
          read.result()
    except OSError as error:
      raise StorageError(f"{self.path} cannot be read: {error.strerror}") from None
    finally:
      for read in late:
        read.cancel()
    if late:
      raise StorageError(
        f"{self.path}: {len(late)} of {len(reads)} reads were late: the deadline has passed"
      )

  def _count_mapped(self, rows: int) -> None:
    """Unmaps all pages when many are mapped: mapped pages count as memory of this process."""
    with self._lock:
      self._pages += rows * self._row_pages
      full = self._pages > self._mapped_pages
      if full:
        self._pages = 0
    if full:
      self._unmap_pages()
