"""The format of a table file: header, packed rows of each layer, checksums.

    0        magic "ENGRAMTB", version u32, bytes of the header u32, SHA-256 of the header
    48       the header: JSON, see TableHeader
    offset   rows of each layer, packed (memory/codecs.py), one table after the other; each starts
             at a multiple of 4,096, and zeros fill the gaps
    ...      checksums: CRC-32 (u32) of each MiB from the first table's start to here

Numbers are little-endian. Opening reads the header alone, whose SHA-256 covers all it says and the
SHA-256 of the checksums; `verify` reads everything.
"""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, Self

import numpy as np
import pydantic

from engram_jax.errors import ConfigError, StorageError
from engram_jax.memory.codecs import KINDS, row_bytes
from engram_jax.memory.hash_layout import HashLayout

MAGIC, VERSION = b"ENGRAMTB", 1
PREFIX = struct.Struct("<8sII32s")
MAX_HEADER = 1 << 20  # a layout of a hundred layers fits; nothing larger is read
ALIGN = 4096
BLOCK = 1 << 20  # bytes behind one checksum
_UNKNOWN = "0" * 64  # stands for a digest while the file is written


class _Part(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)


class Table(_Part):
  """One layer's rows."""

  layer: int
  rows: int = pydantic.Field(gt=0)
  offset: int = pydantic.Field(ge=0)
  bytes: int = pydantic.Field(gt=0)

  @property
  def end(self) -> int:
    return self.offset + self.bytes


class TableHeader(_Part):
  """What the JSON holds. Multipliers of the hash are strings: they exceed 2^53."""

  kind: str
  width: int = pydantic.Field(gt=0)
  tables: list[Table] = pydantic.Field(min_length=1)
  hash_layout: dict[str, Any]
  token_map_digest: str
  checksums_offset: int
  checksums_sha256: str = pydantic.Field(pattern="^[0-9a-f]{64}$")
  file_bytes: int
  source: dict[str, Any]

  @classmethod
  def plan(
    cls,
    layout: HashLayout,
    token_map_digest: str,
    kind: str,
    width: int,
    source: dict[str, Any] | None = None,
  ) -> Self:
    """The header of a file that is about to be written; its checksums are still unknown.

    source: JSON values that say where the rows come from; nothing depends on them.
    """
    header = cls(
      kind=kind,
      width=width,
      tables=[Table(layer=x, rows=layout.rows[x], offset=0, bytes=1) for x in layout.layers],
      hash_layout=layout.describe(),
      token_map_digest=token_map_digest,
      checksums_offset=0,
      checksums_sha256=_UNKNOWN,
      file_bytes=0,
      source=source or {},
    )
    room = 128 * (len(header.tables) + 1)  # its numbers have more digits in the end
    at, tables = _aligned(len(header.to_bytes()) + room), []
    for table in header.tables:
      size = table.rows * row_bytes(kind, width)
      tables.append(table.model_copy(update={"offset": at, "bytes": size}))
      at = _aligned(at + size)
    end = at + 4 * -(-(at - tables[0].offset) // BLOCK)
    sizes = {"tables": tables, "checksums_offset": at, "file_bytes": end}
    return header.model_copy(update=sizes)

  @property
  def data(self) -> tuple[int, int]:
    """Where the checked bytes begin and end."""
    return self.tables[0].offset, self.checksums_offset

  def layout(self) -> HashLayout:
    """The hash layout, its constants rebuilt; ValueError where they differ from the stored ones."""
    described = self.hash_layout
    # Before any prime is searched: a header of a few bytes must not ask for a billion of them.
    counts = [len(heads) for orders in described["primes"].values() for heads in orders]
    orders = (described["max_ngram"] - 1) * len(described["layers"])
    if not 0 < len(counts) == orders or set(counts) != {described["heads"]}:
      raise ValueError("its primes are not one for each layer, order and head")
    return HashLayout.from_description(described)

  def to_bytes(self) -> bytes:
    """The file's first bytes: prefix and JSON."""
    text = json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER:
      raise ConfigError(f"a header of {len(text):,} bytes is too large: at most {MAX_HEADER:,}")
    return PREFIX.pack(MAGIC, VERSION, len(text), hashlib.sha256(text).digest()) + text


class Checksums:
  """CRC-32 of each BLOCK of a stream of bytes."""

  def __init__(self) -> None:
    self._done: list[int] = []
    self._crc = self._filled = 0

  def add(self, data: memoryview) -> None:
    """The next bytes, however many."""
    while len(data):
      some = data[: BLOCK - self._filled]
      self._crc, self._filled = zlib.crc32(some, self._crc), self._filled + len(some)
      data = data[len(some) :]
      if self._filled == BLOCK:
        self._end()

  def to_bytes(self) -> bytes:
    """u32 of each block; the last may be shorter."""
    if self._filled:
      self._end()
    return np.array(self._done, "<u4").tobytes()

  def _end(self) -> None:
    self._done.append(self._crc)
    self._crc = self._filled = 0


def read_header(file: BinaryIO, name: str) -> tuple[TableHeader, HashLayout]:
  """The header of an open file and its hash layout; the tables are not read.

  Raises StorageError, in one line that begins with `name`, for whatever no writer of ours left.
  """
  size = os.fstat(file.fileno()).st_size
  try:
    header = TableHeader.model_validate_json(_header_text(file, size))
    layout = header.layout()
    _require_consistent(header, layout)
  except _Damaged as error:
    raise StorageError(f"{name} {error}") from None
  except OSError as error:
    raise StorageError(f"{name} cannot be read: {error.strerror}") from None
  except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
    problem = " ".join(str(error).split())
    raise StorageError(f"{name} is damaged: its header makes no sense: {problem}") from None
  if header.file_bytes != size:
    raise StorageError(
      f"{name} is damaged: it has {size:,} bytes, its header says {header.file_bytes:,}"
    )
  return header, layout


def verify(file: BinaryIO, header: TableHeader, name: str) -> None:
  """Reads the whole file; StorageError naming the first layer and rows that have changed."""
  start, end = header.data
  expected = _read(file, end, header.file_bytes - end, name)
  if hashlib.sha256(expected).hexdigest() != header.checksums_sha256:
    raise StorageError(f"{name} is damaged: its checksums have changed")
  checksums = np.frombuffer(expected, "<u4")
  for at, checksum in zip(range(start, end, BLOCK), checksums, strict=True):
    if zlib.crc32(_read(file, at, min(BLOCK, end - at), name)) != checksum:
      raise StorageError(f"{name} is damaged: {_where(header, at)} have changed")


class _Damaged(Exception):
  """Why a file is none of ours."""


def _header_text(file: BinaryIO, size: int) -> bytes:
  if size < PREFIX.size:
    raise _Damaged(f"is no table file: it has {size} bytes")
  file.seek(0)
  magic, version, length, digest = PREFIX.unpack(file.read(PREFIX.size))
  if magic != MAGIC:
    raise _Damaged(f"is no table file: it begins with {magic!r}, not {MAGIC!r}")
  if version != VERSION:
    raise _Damaged(f"has format {version}; this version reads {VERSION}")
  if not 0 < length <= min(MAX_HEADER, size - PREFIX.size):
    raise _Damaged(f"is damaged: it announces a header of {length:,} bytes")
  text = file.read(length)
  if hashlib.sha256(text).digest() != digest:
    raise _Damaged("is damaged: its header does not match its own digest")
  return text


def _require_consistent(header: TableHeader, layout: HashLayout) -> None:
  if header.kind not in KINDS:
    raise ValueError(f"no row encoding {header.kind!r}")
  found = [(table.layer, table.rows) for table in header.tables]
  wanted = [(layer, layout.rows[layer]) for layer in layout.layers]
  if found != wanted:
    raise ValueError(f"tables {found} where the hash layout has {wanted} (layer, rows)")
  at = len(header.to_bytes())
  for table in header.tables:
    if table.offset % ALIGN or table.offset < at:
      raise ValueError(f"layer {table.layer} starts at byte {table.offset}")
    if table.bytes != table.rows * row_bytes(header.kind, header.width):
      raise ValueError(f"layer {table.layer} has {table.bytes} bytes for {table.rows} rows")
    at = table.end
  start, end = header.data
  if end != _aligned(at) or header.file_bytes != end + 4 * -(-(end - start) // BLOCK):
    raise ValueError(f"checksums lie at {end}, and the file ends at {header.file_bytes}")


def _where(header: TableHeader, at: int) -> str:
  """The rows that share the block of checked bytes at this offset, in words."""
  size, end = row_bytes(header.kind, header.width), at + BLOCK
  touched = [t for t in header.tables if t.offset < end and t.end > at]
  parts = [
    f"layer {t.layer} rows {max(0, at - t.offset) // size} to "
    f"{min(t.rows, -(-(min(end, t.end) - t.offset) // size)) - 1}"
    for t in touched
  ]
  return " or ".join(parts) if parts else "bytes between tables"


def _read(file: BinaryIO, at: int, size: int, name: str) -> bytes:
  try:
    file.seek(at)
    data = file.read(size)
  except OSError as error:
    raise StorageError(f"{name} cannot be read: {error.strerror}") from None
  if len(data) != size:
    raise StorageError(f"{name} is damaged: it ends at byte {at + len(data):,}")
  return data


def _aligned(offset: int) -> int:
  return -(-offset // ALIGN) * ALIGN


def gaps(header: TableHeader) -> Iterator[tuple[Table, int]]:
  """Each table and the zeros that follow it."""
  starts = [table.offset for table in header.tables[1:]] + [header.checksums_offset]
  for table, start in zip(header.tables, starts, strict=True):
    yield table, start - table.end
