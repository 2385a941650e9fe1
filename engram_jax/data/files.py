"""Documents from the user's own files: plain text, JSON lines, Parquet and ArrayRecord.

`data.path` is a file or a folder. In a folder, every file with one of the format's suffixes is
read, in the order of their names. A document's source in evaluations is the name of its file, or of
the folder directly below `data.path` that holds it.

What a reader holds at once is bounded by LINE_BYTES, or by a file that is one document.
"""

import gzip
import itertools
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from engram_jax.config import DataConfig
from engram_jax.config.bounded import read_bounded, shorten, user_path
from engram_jax.errors import ConfigError, DataError

SUFFIXES = {
  "text": (".txt", ".md", ".rst", ".text"),
  "jsonl": (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz"),
  "parquet": (".parquet", ".pq"),
  "array_record": (".array_record", ".arrayrecord"),
}
PIECE_CHARACTERS = 8192  # of a single text file: about 2,000 tokens
ARRAY_RECORD_BATCH = 256
PARQUET_BATCH = 256  # rows
LINE_BYTES = 32 << 20  # of a line of text or JSON, and of a row's text
DOCUMENT_BYTES = 1 << 30  # of a file that is one document
# Text shrinks to a fifth, tables of numbers to a fiftieth; a gzip file of zeros to a thousandth.
GZIP_RATIO, GZIP_START = 250, 256 << 20  # the ratio is looked at from so many bytes on


class Document(NamedTuple):
  """A text and the name of its source."""

  source: str
  text: str


def list_files(cfg: DataConfig) -> list[pathlib.Path]:
  """The files of `cfg.path`, sorted; ConfigError where there are none."""
  path = _root(cfg)
  try:
    is_file, is_folder = path.is_file(), path.is_dir()
  except OSError as error:
    raise ConfigError(f"data.path={shorten(cfg.path)}: {error.strerror}") from None
  if is_file:
    return [path]
  if not is_folder:
    raise ConfigError(f"data.path={shorten(cfg.path, 1000)}: no such file or folder")
  suffixes = SUFFIXES[cfg.source]
  found = sorted(p for p in path.rglob("*") if p.name.lower().endswith(suffixes) and p.is_file())
  if not found:
    raise ConfigError(
      f"data.path={cfg.path!r} holds no file for data.source={cfg.source!r}: {', '.join(suffixes)}"
    )
  return found


def read_files(cfg: DataConfig) -> Iterator[Document]:
  """Yields every document of the user's files; DataError names the file and line of a bad one."""
  root, paths = _root(cfg), list_files(cfg)
  readers = {
    "text": _read_text_folder if root.is_dir() else _read_text_file,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "array_record": _read_array_record,
  }
  for path in paths:
    top = path.relative_to(root).parts[0] if root.is_dir() else path.name
    name = top.split(".")[0] or top
    try:
      yield from readers[cfg.source](path, name, cfg.text_field)
    except (OSError, EOFError, zlib.error) as error:
      raise DataError(f"{path}: cannot be read: {error}") from None


def _root(cfg: DataConfig) -> pathlib.Path:
  assert cfg.path is not None, "the config requires a path for these sources"
  return user_path(cfg.path, "data.path")


def _read_text_folder(path: pathlib.Path, name: str, _field: str) -> Iterator[Document]:
  try:
    raw = read_bounded(path, DOCUMENT_BYTES)
  except ValueError as error:
    raise DataError(f"{path} {error}; as data.path itself a file is cut into pieces") from None
  yield Document(name, _decode(raw, str(path)).replace("\r\n", "\n"))


def _read_text_file(path: pathlib.Path, name: str, _field: str) -> Iterator[Document]:
  """Cuts a single file into pieces, because one document could not be split for validation.

  A piece ends at the first blank line after PIECE_CHARACTERS, or at the first line end after twice
  as many.
  """
  piece, size = [], 0
  for line in _text_lines(path):
    piece.append(line)
    size += len(line)
    if size >= (2 * PIECE_CHARACTERS if line.strip() else PIECE_CHARACTERS):
      yield Document(name, "".join(piece))
      piece, size = [], 0
  yield Document(name, "".join(piece))


def _text_lines(path: pathlib.Path) -> Iterator[str]:
  """Yields what `str.splitlines` makes of a file, with line ends, while the file is read."""
  for number, raw in _lines(path):
    line = _decode(raw, f"{path}:{number}", "utf-8-sig" if number == 1 else "utf-8")
    yield from line.replace("\r\n", "\n").splitlines(keepends=True)


def _read_jsonl(path: pathlib.Path, name: str, field: str) -> Iterator[Document]:
  for number, line in _lines(path):
    if line.strip():
      yield _json_document(line, f"{path}:{number}", name, field)


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  """Yields the lines of a file, unpacked if it ends in .gz, each with its 1-based number."""
  is_packed, unpacked = path.suffix.lower() == ".gz", 0
  with open(path, "rb") as packed, gzip.open(packed) if is_packed else packed as file:
    for number in itertools.count(1):
      line = file.readline(LINE_BYTES + 1)
      if not line:
        return
      if len(line) > LINE_BYTES:
        raise DataError(f"{path}:{number}: a line of more than {LINE_BYTES:,} bytes")
      unpacked += len(line)
      if is_packed and unpacked > max(GZIP_START, GZIP_RATIO * packed.tell()):
        raise DataError(
          f"{path}:{number}: its {packed.tell():,} bytes to here are {unpacked:,} unpacked, more "
          f"than {GZIP_RATIO} times as many: no text; unpack it if it is meant to be read"
        )
      yield number, line


def _json_document(line: bytes, where: str, name: str, field: str) -> Document:
  valid = f"a line is a JSON object with a string {field!r} (data.text_field)"
  try:
    row = json.loads(_decode(line, where))
  except (ValueError, RecursionError) as error:
    raise DataError(f"{where}: not JSON: {error}; {valid}") from None
  if not isinstance(row, dict):
    raise DataError(f"{where}: a JSON {type(row).__name__}; {valid}")
  if field not in row:
    keys = ", ".join(map(shorten, itertools.islice(row, 20))) or "(none)"
    raise DataError(f"{where}: has the keys {keys}; {valid}")
  return _document(row.get("source"), name, row[field], f"{where}: {field!r}")


def _read_parquet(path: pathlib.Path, name: str, field: str) -> Iterator[Document]:
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError:
    raise ConfigError(
      "data.source='parquet' needs pyarrow: pip install 'engram_jax[parquet]'"
    ) from None
  try:
    with pyarrow.parquet.ParquetFile(path) as file:
      present = file.schema_arrow.names
      if field not in present:
        raise DataError(
          f"{path}: no column {field!r} (data.text_field); it has "
          f"{', '.join(map(shorten, present[:20]))}"
        )
      columns = [column for column in (field, "source") if column in present]
      numbers = itertools.count(1)
      for batch in file.iter_batches(PARQUET_BATCH, columns=columns):
        for number, row in zip(numbers, batch.to_pylist(), strict=False):
          yield _document(row.get("source"), name, row[field], f"{path}: row {number}: {field!r}")
  except pyarrow.ArrowException as error:
    raise DataError(f"{path}: not a readable Parquet file: {error}") from None


def _read_array_record(path: pathlib.Path, name: str, _field: str) -> Iterator[Document]:
  # A compiled module without stubs.
  from array_record.python import array_record_module  # ty: ignore[missing-module-member]

  reader = array_record_module.ArrayRecordReader(str(path))
  try:
    total = reader.num_records()  # 0 where the file is no ArrayRecord: closing it raises the error
    for start in range(0, total, ARRAY_RECORD_BATCH):
      numbers = list(range(start, min(start + ARRAY_RECORD_BATCH, total)))
      for number, record in zip(numbers, reader.read(numbers), strict=True):
        yield Document(name, _decode(record, f"{path}: record {number}"))
    reader.close()
  except RuntimeError as error:
    raise DataError(f"{path}: not a readable ArrayRecord file: {error}") from None


def _document(source: Any, name: str, text: Any, where: str) -> Document:
  """The document of a row; its source is the row's field "source" if that is a string, else `name`.

  where: the place of the text, for the message of a DataError.
  """
  if not isinstance(text, str):
    raise DataError(f"{where} is {shorten(text)}, not a string")
  if len(text) > LINE_BYTES:
    raise DataError(f"{where} has {len(text):,} characters: at most {LINE_BYTES:,}")
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise DataError(f"{where} is not valid Unicode: {error}") from None
  return Document(source if isinstance(source, str) and source else name, text)


def _decode(raw: bytes, where: str, encoding: str = "utf-8-sig") -> str:
  try:
    return raw.decode(encoding)
  except UnicodeDecodeError as error:
    raise DataError(f"{where}: not UTF-8: {error}") from None
