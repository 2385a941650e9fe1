"""The format of a table file: header, packed rows of each layer, checksums.

    0        magic "ENGRAMTB", version u32, bytes of the header u32, SHA-256 of the header
    48       the header: JSON, see TableHeader
    offset   rows of each layer, packed (memory/codecs.py), one table after the other; each starts
             at a multiple of 4,096, and zeros fill the gaps
    ...      checksums: CRC-32 (u32) of each 4,096 bytes from the first table's start to here

Numbers are little-endian. The header's SHA-256 covers all it says and the SHA-256 of the checksums,
which cover the rows: whoever reads the header and the checksums can tell of any block whether it is
the one that was written (checksums.py).

Format 1, which is read but no longer written, differs in its blocks of a MiB, and its header does
not say `block_bytes`. A table's first block there may begin with the end of the table before it.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, Self

import pydantic

from engram_jax.config.bounded import HEAD_BYTES, name_mistake
from engram_jax.errors import ConfigError, StorageError
from engram_jax.memory.codecs import KINDS, row_bytes
from engram_jax.memory.hash_layout import HashLayout

MAGIC, VERSION = b"ENGRAMTB", 2
PREFIX = struct.Struct("<8sII32s")
MAX_HEADER = 1 << 20  # a layout of a hundred layers fits; nothing larger is read
ALIGN = 4096
BLOCK = 4096  # bytes behind one checksum: what the system reads for a row anyway
BLOCK_BYTES = {1: 1 << 20, VERSION: BLOCK}  # by format
_UNKNOWN = "0" * 64  # stands for a digest while the file is written


class _StrictModel(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)


class TableEntry(_StrictModel):
  """The position of one layer's rows in the file."""

  layer: int
  rows: int = pydantic.Field(gt=0)
  offset: int = pydantic.Field(ge=0)
  bytes: int = pydantic.Field(gt=0)

  @property
  def end(self) -> int:
    """Offset of the first byte after the rows."""
    return self.offset + self.bytes


class TableHeader(_StrictModel):
  """The JSON of the header. Multipliers of the hash are strings: they exceed 2^53."""

  kind: str
  width: int = pydantic.Field(gt=0)
  tables: list[TableEntry] = pydantic.Field(min_length=1)
  hash_layout: dict[str, Any]
  token_map_digest: str
  checksums_offset: int
  checksums_sha256: str = pydantic.Field(pattern="^[0-9a-f]{64}$")
  file_bytes: int
  source: dict[str, Any]
  block_bytes: int = BLOCK_BYTES[1]

  @classmethod
  def plan(
    cls,
    layout: HashLayout,
    token_map_digest: str,
    kind: str,
    width: int,
    source: dict[str, Any] | None = None,
    version: int = VERSION,
  ) -> Self:
    """The header of a file that is about to be written; its checksums are still unknown.

    source: JSON values that say where the rows come from; nothing depends on them.
    """
    header = cls(
      kind=kind,
      width=width,
      tables=[TableEntry(layer=x, rows=layout.rows[x], offset=0, bytes=1) for x in layout.layers],
      hash_layout=layout.describe(),
      token_map_digest=token_map_digest,
      checksums_offset=0,
      checksums_sha256=_UNKNOWN,
      file_bytes=0,
      source=source or {},
      block_bytes=BLOCK_BYTES[version],
    )
    margin = 128 * (len(header.tables) + 1)  # its numbers have more digits in the end
    offset, tables = _aligned(len(header.to_bytes()) + margin), []
    for table in header.tables:
      size = table.rows * row_bytes(kind, width)
      tables.append(table.model_copy(update={"offset": offset, "bytes": size}))
      offset = _aligned(offset + size)
    header = header.model_copy(update={"tables": tables, "checksums_offset": offset})
    return header.model_copy(update={"file_bytes": offset + 4 * header.blocks})

  @property
  def data_range(self) -> tuple[int, int]:
    """Offsets of the first checksummed byte and of the one after the last."""
    return self.tables[0].offset, self.checksums_offset

  @property
  def version(self) -> int:
    """The file's format."""
    return 1 if self.block_bytes == BLOCK_BYTES[1] else VERSION

  @property
  def blocks(self) -> int:
    """The number of blocks, each with a checksum; the last one may be shorter."""
    start, end = self.data_range
    return -(-(end - start) // self.block_bytes)

  def describe_block(self, block: int) -> str:
    """Names the rows that lie in a block, wholly or in part."""
    start, end = self.data_range
    offset, size = start + block * self.block_bytes, row_bytes(self.kind, self.width)
    end = min(end, offset + self.block_bytes)
    parts = [
      f"layer {t.layer} rows {max(0, offset - t.offset) // size} to "
      f"{min(t.rows, -(-(min(end, t.end) - t.offset) // size)) - 1}"
      for t in self.tables
      if t.offset < end and t.end > offset
    ]
    return " or ".join(parts) if parts else "bytes between tables"

  def layout(self) -> HashLayout:
    """The hash layout, its constants rebuilt; ValueError where they differ from the stored ones."""
    description = self.hash_layout
    # Before any prime is searched: a header of a few bytes must not ask for a billion of them.
    counts = [len(heads) for orders in description["primes"].values() for heads in orders]
    orders = (description["max_ngram"] - 1) * len(description["layers"])
    if not 0 < len(counts) == orders or set(counts) != {description["heads"]}:
      raise ValueError("its primes are not one for each layer, order and head")
    return HashLayout.from_description(description)

  def to_bytes(self) -> bytes:
    """The file's first bytes: prefix and JSON."""
    # Only format 1 has the default, and leaves it out.
    fields = self.model_dump(exclude_defaults=True)
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER:
      raise ConfigError(f"a header of {len(text):,} bytes is too large: at most {MAX_HEADER:,}")
    return PREFIX.pack(MAGIC, self.version, len(text), hashlib.sha256(text).digest()) + text


def read_header(file: BinaryIO, name: str) -> tuple[TableHeader, HashLayout]:
  """Reads the header of an open file and its hash layout, but not the tables.

  Raises StorageError, in one line that begins with `name`, for anything that `write_table_file` did
  not write.
  """
  size = os.fstat(file.fileno()).st_size
  try:
    version, text = _header_text(file, size)
    header = TableHeader.model_validate_json(text)
    if header.block_bytes != BLOCK_BYTES[version]:
      raise ValueError(f"blocks of {header.block_bytes:,} bytes in format {version}")
    layout = header.layout()
    _require_consistent(header, layout)
    gap = header.tables[0].offset - file.tell()
    if gap > MAX_HEADER or any(file.read(gap)):
      raise ValueError(f"{gap:,} bytes between it and the first table are not a few zeros")
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


class _Damaged(Exception):
  """The reason why a file is not a valid table file."""


def _header_text(file: BinaryIO, size: int) -> tuple[int, bytes]:
  """The file's format and the JSON of its header."""
  if size < PREFIX.size:
    raise _Damaged(f"is no table file: it has {size} bytes")
  file.seek(0)
  head = file.read(HEAD_BYTES)
  magic, version, length, digest = PREFIX.unpack(head[: PREFIX.size])
  if magic != MAGIC:
    if mistake := name_mistake(head):
      raise _Damaged(f"{mistake}: no table file")
    raise _Damaged(f"is no table file: it begins with {magic!r}, not {MAGIC!r}")
  if version not in BLOCK_BYTES:
    raise _Damaged(
      f"has format {version}; this version reads {' and '.join(map(str, BLOCK_BYTES))}"
    )
  if not 0 < length <= min(MAX_HEADER, size - PREFIX.size):
    raise _Damaged(f"is damaged: it announces a header of {length:,} bytes")
  file.seek(PREFIX.size)
  text = file.read(length)
  if hashlib.sha256(text).digest() != digest:
    raise _Damaged("is damaged: its header does not match its own digest")
  return version, text


def _require_consistent(header: TableHeader, layout: HashLayout) -> None:
  if header.kind not in KINDS:
    raise ValueError(f"no row encoding {header.kind!r}")
  actual = [(table.layer, table.rows) for table in header.tables]
  expected = [(layer, layout.rows[layer]) for layer in layout.layers]
  if actual != expected:
    raise ValueError(f"tables {actual} where the hash layout has {expected} (layer, rows)")
  offset = len(header.to_bytes())
  for table in header.tables:
    if table.offset % ALIGN or table.offset < offset:
      raise ValueError(f"layer {table.layer} starts at byte {table.offset}")
    if table.bytes != table.rows * row_bytes(header.kind, header.width):
      raise ValueError(f"layer {table.layer} has {table.bytes} bytes for {table.rows} rows")
    offset = table.end
  end = header.checksums_offset
  if end != _aligned(offset) or header.file_bytes != end + 4 * header.blocks:
    raise ValueError(f"checksums lie at {end}, and the file ends at {header.file_bytes}")


def _aligned(offset: int) -> int:
  return -(-offset // ALIGN) * ALIGN


def gaps(header: TableHeader) -> Iterator[tuple[TableEntry, int]]:
  """Yields each table and the number of zeros that follow it."""
  starts = [table.offset for table in header.tables[1:]] + [header.checksums_offset]
  for table, start in zip(header.tables, starts, strict=True):
    yield table, start - table.end
