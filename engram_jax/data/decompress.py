"""Lines of plain and packed files, with bounds on what is held and on what a small file may hold.

gzip, bzip2 and xz are Python's own; Zstandard, LZ4 and Brotli come with pyarrow.
"""

import bz2
import contextlib
import gzip
import io
import itertools
import lzma
import os
import pathlib
import zlib
from collections.abc import Generator, Iterator
from typing import Any, BinaryIO, NamedTuple, Protocol

from engram_jax.config.bounded import HEAD_BYTES, POINTER, is_pointer, name_mistake, open_regular
from engram_jax.data.folders import COMPRESSIONS
from engram_jax.data.rows import BadRow
from engram_jax.errors import ConfigError, DataError

LINE_BYTES = 32 << 20  # of a line of text or JSON, and of a row's text
DOCUMENT_BYTES = 1 << 30  # of a file that is one document
# Text shrinks to a fifth, tables of numbers to a fiftieth; a gzip file of zeros to a thousandth.
COMPRESSION_RATIO, RATIO_START = 250, 256 << 20  # the ratio is looked at from so many bytes on
_PYARROW_CODECS = {".zst": "zstd", ".zstd": "zstd", ".lz4": "lz4", ".br": "brotli"}
_XZ_BYTES = 256 << 20  # of memory: the most that `xz -9` needs is 65 MiB
_BLOCK = 64 << 10
DECOMPRESS_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what damaged files raise


class Line(NamedTuple):
  """A line with its end, and its place, "FILE:NUMBER"."""

  number: int
  where: str
  content: bytes


class _Decompressor(Protocol):
  eof: bool
  needs_input: bool
  unused_data: bytes

  def decompress(self, data: bytes, max_length: int = ...) -> bytes: ...


class _Decompressed(io.RawIOBase):
  """The content of a bzip2 or xz file, of one or more streams, in bounded memory."""

  def __init__(self, packed: BinaryIO, kind: str):
    self._packed, self._kind = packed, kind
    self._stream: _Decompressor = self._new()
    self._rest, self._is_inside = b"", False

  def _new(self) -> Any:
    return (
      bz2.BZ2Decompressor() if self._kind == ".bz2" else lzma.LZMADecompressor(memlimit=_XZ_BYTES)
    )

  def readable(self) -> bool:
    """Always: it is for reading."""
    return True

  def readinto(self, buffer: Any) -> int:
    """Fills a buffer with what comes next; 0 at the end."""
    while True:
      if self._stream.eof:
        rest = self._stream.unused_data or self._packed.read(_BLOCK)
        self._rest = rest.lstrip(b"\0") if self._kind != ".bz2" else rest  # xz pads with zeros
        self._stream, self._is_inside = self._new(), False
      if self._stream.needs_input and not self._rest:
        self._rest = self._packed.read(_BLOCK)
        if not self._rest:
          if self._is_inside:
            raise EOFError("it ends inside its packed data")
          return 0
      self._is_inside = True
      content = self._stream.decompress(self._rest, len(buffer))
      self._rest = b""
      if content:
        buffer[: len(content)] = content
        return len(content)


@contextlib.contextmanager
def open_decompressed(path: pathlib.Path) -> Generator[tuple[BinaryIO, BinaryIO]]:
  """Opens a file and, if its name says that it is packed, what it unpacks to: (file, unpacked).

  Raises DataError for a git-lfs pointer and a packed file without a byte, ConfigError where pyarrow
  is needed and not there; reading raises DECOMPRESS_ERRORS for what is damaged.
  """
  kind = compression(path)
  with open_regular(path) as file:
    head = file.read(HEAD_BYTES)
    if is_pointer(head):
      raise DataError(f"{path} {POINTER}")
    if kind and not head:
      raise DataError(f"{path} has no bytes: nothing was packed")
    file.seek(0)
    with _decompressor(file, kind, path) as unpacked:
      yield file, unpacked


def compression(path: pathlib.Path) -> str:
  """The suffix that says how a file is packed; empty for a plain one."""
  suffix = path.suffix.lower()
  return suffix if suffix in COMPRESSIONS else ""


def _decompressor(file: BinaryIO, kind: str, path: pathlib.Path) -> Any:
  if kind == ".gz":
    return gzip.open(file)
  if kind in (".bz2", ".xz", ".lzma"):
    return io.BufferedReader(_Decompressed(file, kind), _BLOCK)
  if kind:
    try:
      import pyarrow
    except ImportError:
      raise ConfigError(
        f"{path} needs pyarrow to be unpacked: pip install 'engram_jax[parquet]', or unpack it"
      ) from None
    # ty: it has the methods that are needed.
    stream: Any = pyarrow.CompressedInputStream(file, _PYARROW_CODECS[kind])
    return io.BufferedReader(stream, _BLOCK)
  return contextlib.nullcontext(file)


def read_lines(path: pathlib.Path) -> Iterator[Line | BadRow]:
  """Yields the lines of a file, unpacked by its name, while it is read.

  A line of more than LINE_BYTES is a BadRow, and passed over if it is not raised.

  Raises DataError for a packed file that unpacks to far more than text does, and what
  `open_decompressed` and reading raise.
  """
  with open_decompressed(path) as (packed, file):
    unpacked = 0
    for number in itertools.count(1):
      where = f"{path}:{number}"
      line = file.readline(LINE_BYTES + 1)
      if not line:
        return
      unpacked += len(line)
      _check_ratio(packed, file, unpacked, where)
      if len(line) <= LINE_BYTES:
        yield Line(number, where, line)
        continue
      yield BadRow("too long", where, f"a line of more than {LINE_BYTES:,} bytes")
      while line and not line.endswith(b"\n"):
        line = file.readline(_BLOCK)
        unpacked += len(line)
        _check_ratio(packed, file, unpacked, where)


def read_document(path: pathlib.Path) -> bytes:
  """The content of a file, unpacked by its name; BadRow for more than DOCUMENT_BYTES.

  Raises as `read_lines` does.
  """
  with open_decompressed(path) as (packed, file):
    parts, size = [], 0
    while part := file.read(min(1 << 20, DOCUMENT_BYTES + 1 - size)):
      parts.append(part)
      size += len(part)
      _check_ratio(packed, file, size, str(path))
    if size > DOCUMENT_BYTES:
      size = max(size, 0 if compression(path) else os.fstat(packed.fileno()).st_size)
      problem = (
        f"has {size:,} bytes{' or more' * bool(compression(path))}: at most {DOCUMENT_BYTES:,}"
      )
      advice = "as data.path itself a file is cut into pieces"
      raise BadRow("too long", str(path), f"{problem}; {advice}")
  return b"".join(parts)


def _check_ratio(packed: BinaryIO, file: BinaryIO, unpacked: int, where: str) -> None:
  if file is not packed and unpacked > max(RATIO_START, COMPRESSION_RATIO * packed.tell()):
    raise DataError(
      f"{where}: its {packed.tell():,} bytes to here are {unpacked:,} unpacked, more "
      f"than {COMPRESSION_RATIO} times as many: no text; unpack it if it is meant to be read"
    )


def decode(raw: bytes, where: str, encoding: str = "utf-8-sig") -> str:
  """The text of bytes that should be UTF-8; BadRow naming their place where they are not."""
  try:
    return raw.decode(encoding)
  except UnicodeDecodeError as error:
    mistake = name_mistake(raw[:HEAD_BYTES])
    hint = f"; it {mistake}" if mistake else ""
    raise BadRow("not UTF-8", where, f"not UTF-8: {error}{hint}") from None
