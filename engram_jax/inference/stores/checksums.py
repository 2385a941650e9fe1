"""Checksums of a table file's blocks: written with the rows, compared when rows are read.

`VerifiedBlocks` reads all checksums when a file is opened, 4 bytes for each 4 KiB, and holds them
against the SHA-256 in the header. That is a thousandth of the file, in order. Parts that are read
when they are needed would make a first row two reads of the disk instead of one, and take a list of
digests of their own. A block is read and compared the first time that a row in it is wanted.

Local letter: N, rows of one read.
"""

import hashlib
import mmap
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from engram_jax.errors import StorageError
from engram_jax.inference.stores.table_file import BLOCK, TableEntry, TableHeader
from engram_jax.memory.codecs import row_bytes

PIECE = 4 << 20  # bytes read at once where all are read; a multiple of every format's block


class Checksums:
  """CRC-32 of each block of a stream of bytes."""

  def __init__(self, block_bytes: int = BLOCK) -> None:
    self._blocks, self._block_bytes = [], block_bytes
    self._crc = self._size = 0  # of the block that is not complete

  def add(self, data: memoryview) -> None:
    """Adds the next bytes, however many."""
    while len(data):
      part = data[: self._block_bytes - self._size]
      self._crc, self._size = zlib.crc32(part, self._crc), self._size + len(part)
      data = data[len(part) :]
      if self._size == self._block_bytes:
        self._end_block()

  def to_bytes(self) -> bytes:
    """u32 of each block; the last block may be shorter."""
    if self._size:
      self._end_block()
    return np.array(self._blocks, "<u4").tobytes()

  def _end_block(self) -> None:
    self._blocks.append(self._crc)
    self._crc = self._size = 0


class VerifiedBlocks:
  """The blocks of an open table file, and which of them were found as they were written.

  Safe to use from several threads: a block that two want at once is compared twice.
  """

  def __init__(
    self, file: BinaryIO, header: TableHeader, name: str, mapping: mmap.mmap | None = None
  ):
    """Reads the checksums; StorageError, beginning with `name`, if they have changed.

    mapping: of the complete file, for `require`.
    """
    self._file, self._header, self._name = file.fileno(), header, name
    self._row_bytes, self._start = row_bytes(header.kind, header.width), header.data_range[0]
    self._shift = header.block_bytes.bit_length() - 1
    self._mapped = None if mapping is None else np.frombuffer(mapping, np.uint8)
    self._expected = np.empty(header.blocks, "<u4")
    fill(self._file, self._expected.view(np.uint8), header.checksums_offset, name)
    if hashlib.sha256(self._expected.data).hexdigest() != header.checksums_sha256:
      raise StorageError(f"{name} is damaged: its checksums have changed")
    # A byte a block: two threads that set bits of one byte would undo each other's.
    self._is_verified = np.zeros(header.blocks, bool)

  def forget(self) -> None:
    """Makes every block one that is compared when it is next read."""
    self._is_verified[:] = False

  def unmap(self) -> None:
    """Lets go of the mapping."""
    self._mapped = None

  def contain(self, table: TableEntry, ids: list[int]) -> bool:
    """Says whether these few rows of a table lie in blocks that were found unchanged."""
    flags, shift, size = self._is_verified.data, self._shift, self._row_bytes
    start = table.offset - self._start
    for i in ids:
      byte = start + i * size
      if not all(flags[byte >> shift : (byte + size - 1 >> shift) + 1]):
        return False
    return True

  def require(self, table: TableEntry, ids_N: np.ndarray) -> None:
    """Reads and compares the blocks of these rows that never were; StorageError names the rows of
    one that has changed, now and whenever it is asked for again."""
    missing = []
    for blocks_N in self._blocks_of(table, ids_N):
      is_verified_N = np.take(self._is_verified, blocks_N, mode="clip")
      if not is_verified_N.all():
        missing.append(blocks_N[~is_verified_N])
    if not missing:
      return
    blocks = np.unique(np.concatenate(missing))
    for block, data in zip(blocks.tolist(), self._read(blocks), strict=True):
      self._compare(block, data)
      self._is_verified[block] = True

  def require_piece(self, offset: int, data: np.ndarray) -> None:
    """Compares `data`, uint8, read from the file at `offset`, where a block begins; StorageError
    names the rows of a block that has changed."""
    size, view = self._header.block_bytes, data.data
    first = (offset - self._start) // size
    for i, at in enumerate(range(0, len(view), size)):
      self._compare(first + i, view[at : at + size])

  def _compare(self, block: int, data: bytes | memoryview) -> None:
    if zlib.crc32(data) != self._expected[block]:
      rows = self._header.describe_block(block)
      raise StorageError(f"{self._name} is damaged: {rows} have changed")

  def _read(self, blocks: np.ndarray) -> Iterator[bytes | memoryview]:
    """Yields the bytes of each block."""
    size, end = self._header.block_bytes, self._header.data_range[1]
    offsets = self._start + blocks * size
    if size > BLOCK:  # faster in one read than by faults of a page each
      for offset in offsets.tolist():
        yield os.pread(self._file, min(size, end - offset), offset)
      return
    assert self._mapped is not None, "the store is closed"
    for offset in offsets.tolist() if hasattr(os, "posix_fadvise") else ():  # all on their way
      os.posix_fadvise(self._file, offset, size, os.POSIX_FADV_WILLNEED)
    # The disk is waited for here: take lets other threads run, an index of few would not.
    np.take(self._mapped, offsets, mode="clip")
    for offset in offsets.tolist():
      yield self._mapped.data[offset : offset + size]

  def _blocks_of(self, table: TableEntry, ids_N: np.ndarray) -> Iterator[np.ndarray]:
    """Yields blocks, int64 [N] each, that together hold all bytes of the rows."""
    size, block, start = self._row_bytes, self._header.block_bytes, table.offset - self._start
    first_byte_N = ids_N.astype(np.int64)
    first_byte_N *= size
    first_byte_N += start
    first_N = first_byte_N >> self._shift
    yield first_N
    if block % size == 0 and start % size == 0:  # no row straddles two
      return
    first_byte_N += size - 1
    last_N = first_byte_N >> self._shift
    yield last_N
    for i in range(1, (size - 1) // block + 1):  # of rows larger than a block
      yield np.minimum(first_N + i, last_N)


def fill(file: int, out: np.ndarray, offset: int, name: str) -> None:
  """Reads uint8 `out` from an open file at `offset`; StorageError, beginning with `name`, if it
  cannot be read or ends before."""
  view, done = out.data, 0
  while done < len(view):
    try:
      count = os.preadv(file, [view[done:]], offset + done)
    except OSError as error:
      raise StorageError(f"{name} cannot be read: {error.strerror}") from None
    if count == 0:
      raise StorageError(f"{name} is damaged: it ends at byte {offset + done:,}")
    done += count


def verify(file: BinaryIO, header: TableHeader, name: str) -> None:
  """Reads the complete file; StorageError names the first layer and rows that have changed."""
  blocks = VerifiedBlocks(file, header, name)
  start, end = header.data_range
  buffer = np.empty(PIECE, np.uint8)
  for offset in range(start, end, PIECE):
    piece = buffer[: end - offset]
    fill(file.fileno(), piece, offset, name)
    blocks.require_piece(offset, piece)
