"""Documents from the user's own files: plain text, JSON lines, Parquet and ArrayRecord.

`data.path` is a file or a folder. Of a folder `folders.walk` says which files are read, in the
order of their names. A document's source in evaluations is what its row names
(`data.source_field`), or else its file's name, or the name of the folder directly below `data.path`
that holds it.

What a reader holds at once is bounded by decompress.LINE_BYTES, or by a file that is one document.
"""

import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from engram_jax.config import DataConfig
from engram_jax.config.bounded import HEAD_BYTES, name_mistake, shorten, user_path
from engram_jax.data import decompress, folders
from engram_jax.data.columns import read_array_record, read_parquet
from engram_jax.data.decompress import Line, decode, read_lines
from engram_jax.data.rows import BadRow, Document, Row, SourceNames, attempt, keep_good
from engram_jax.errors import ConfigError, DataError

READER_VERSION = 2  # part of a corpus's identity: raise it when files give other documents
PIECE_CHARACTERS = 8192  # of a single text file: about 2,000 tokens
_MAX_DIGITS = 4300  # of an integer that Python parses


def list_files(cfg: DataConfig) -> list[pathlib.Path]:
  """The files of `cfg.path`, sorted; ConfigError where there are none."""
  return _list(cfg).read


def survey(cfg: DataConfig) -> tuple[str, ...]:
  """Lines that say which files of a folder are read, which are left and why; none for a file."""
  folder = _list(cfg)
  if not _root(cfg).is_dir():
    return ()
  where = f"data.path={shorten(cfg.path, 1000)}"
  return (
    f"{where}: reads {folder.describe_read(cfg.source)}",
    f"{where}: leaves {folder.describe_left()}",
  )


def identify(cfg: DataConfig) -> list[Any]:
  """All that the documents follow from, as JSON values: the settings, each file's size and time."""
  return [READER_VERSION, cfg.source_field, cfg.bad_rows, describe_files(list_files(cfg))]


def describe_files(paths: list[pathlib.Path]) -> list[tuple[str, int, int]]:
  """(path, bytes, time of the last change in nanoseconds) of each file."""
  stats = [(path.resolve(), path.stat()) for path in paths]
  return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def read_files(cfg: DataConfig, log: Callable[[str], None] = lambda _: None) -> Iterator[Document]:
  """Yields every document of the user's files; DataError names the file and line of a bad one.

  log: is told of rows that were skipped (`data.bad_rows`), and of sources that were not told apart.
  """
  names = SourceNames()
  yield from keep_good(_read_rows(cfg, names), cfg.bad_rows, log)
  is_default = cfg.source_field == DataConfig.model_fields["source_field"].default
  for line in names.describe(cfg.source_field, is_default):
    log(line)


def _read_rows(cfg: DataConfig, names: SourceNames) -> Iterator[Row]:
  root, paths = _root(cfg), list_files(cfg)
  is_folder = root.is_dir()
  field, source_field = cfg.text_field, cfg.source_field
  if source_field == field:  # a text is not its own source
    source_field = ""
  for path in paths:
    top = path.relative_to(root).parts[0] if is_folder else path.name
    name = top.split(".")[0] or top
    try:
      if cfg.source == "parquet":
        yield from read_parquet(path, name, field, source_field, names)
      elif cfg.source == "array_record":
        yield from read_array_record(path, name, names)
      elif cfg.source == "jsonl":
        yield from _read_jsonl(path, name, field, source_field, names)
      elif is_folder:
        yield attempt(_text_document, path, name, names)
      else:
        yield from _read_text_file(path, name, names)
    except (DataError, ConfigError):
      raise
    except (*decompress.DECOMPRESS_ERRORS, ValueError) as error:
      raise DataError(f"{path}: cannot be read: {error}") from None


def _list(cfg: DataConfig) -> folders.Folder:
  path = _root(cfg)
  try:
    is_file, is_folder = path.is_file(), path.is_dir()
  except (OSError, ValueError) as error:  # ValueError: a NUL in the name
    problem = getattr(error, "strerror", None) or error
    raise ConfigError(f"data.path={shorten(cfg.path)}: {problem}") from None
  if is_file:
    return folders.Folder([path])
  if not is_folder:
    raise ConfigError(f"data.path={shorten(cfg.path, 1000)}: no such file or folder")
  folder = folders.walk(path, cfg.source)
  if not folder.read:
    others = folders.find_sources(folder)
    hint = f"; some are for --data.source {' or '.join(others)}" if others else ""
    raise ConfigError(
      f"data.path={cfg.path!r} holds no file for data.source={cfg.source!r}: "
      f"{', '.join(folders.SUFFIXES[cfg.source])}; left: {folder.describe_left()}{hint}; a file "
      "that data.path itself names is read whatever its name"
    )
  return folder


def _root(cfg: DataConfig) -> pathlib.Path:
  assert cfg.path is not None, "the config requires a path for these sources"
  return user_path(cfg.path, "data.path")


# --- plain text ---------------------------------------------------------------------------------


def _text_document(path: pathlib.Path, name: str, names: SourceNames) -> Document:
  text = decode(decompress.read_document(path), str(path)).replace("\r\n", "\n")
  return Document(names.of(None, name), text)


def _read_text_file(path: pathlib.Path, name: str, names: SourceNames) -> Iterator[Row]:
  """Cuts a single file into pieces, because one document could not be split for validation.

  A piece ends at the first blank line after PIECE_CHARACTERS, or at the first line end after twice
  as many.
  """
  source, piece, size = names.of(None, name), [], 0
  for line in _text_lines(path):
    if isinstance(line, BadRow):
      yield line
      continue
    piece.append(line)
    size += len(line)
    if size >= (2 * PIECE_CHARACTERS if line.strip() else PIECE_CHARACTERS):
      yield Document(source, "".join(piece))
      piece, size = [], 0
  yield Document(source, "".join(piece))


def _text_lines(path: pathlib.Path) -> Iterator[str | BadRow]:
  """Yields what `str.splitlines` makes of a file, with line ends, while the file is read."""
  for line in read_lines(path):
    try:
      if isinstance(line, BadRow):
        raise line
      text = decode(line.content, line.where, "utf-8-sig" if line.number == 1 else "utf-8")
    except BadRow as error:
      yield error
    else:
      yield from text.replace("\r\n", "\n").splitlines(keepends=True)


# --- JSON lines ---------------------------------------------------------------------------------


def _read_jsonl(
  path: pathlib.Path, name: str, field: str, source_field: str, names: SourceNames
) -> Iterator[Row]:
  for line in read_lines(path):
    if isinstance(line, BadRow):
      yield line
    elif line.content.strip():
      yield attempt(_json_document, line, name, field, source_field, names)


def _json_document(
  line: Line, name: str, field: str, source_field: str, names: SourceNames
) -> Document:
  where, valid = line.where, f"a line is a JSON object with a string {field!r} (data.text_field)"
  row = _parse_json(line, valid)
  if not isinstance(row, dict):
    hint = _LINES_OF_ARRAY if isinstance(row, list) else ""
    raise BadRow("no object", where, f"a JSON {_JSON_NAMES[type(row)]}; {valid}{hint}")
  if field not in row:
    keys = ", ".join(map(shorten, itertools.islice(row, 20))) or "(none)"
    raise BadRow(f"without {field!r}", where, f"has the keys {keys}; {valid}")
  text = row[field]
  if not isinstance(text, str):
    raise BadRow(f"{field!r} no string", where, f"{field!r} is {shorten(text)}, not a string")
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise BadRow("no Unicode", where, f"{field!r} is not valid Unicode: {error}") from None
  return Document(names.of(row.get(source_field) if source_field else None, name), text)


_JSON_NAMES = {
  list: "list",
  str: "string",
  int: "number",
  float: "number",
  bool: "true or false",
  type(None): "null",
}


def _parse_json(line: Line, valid: str) -> Any:
  text = decode(line.content, line.where)
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    problem = f"not JSON: {error}{_name_cause(line)}"
  except (ValueError, RecursionError):  # an integer of more digits than Python parses, or nesting
    try:
      return json.loads(text, parse_int=_parse_integer)
    except (ValueError, RecursionError) as error:
      problem = f"not JSON: {error}"
  raise BadRow("not JSON", line.where, f"{problem}; {valid}")


def _name_cause(line: Line) -> str:
  """The kind of file that a line of no JSON shows, for a message; empty where it shows nothing."""
  start = line.content.strip()
  mistake = name_mistake(start[:HEAD_BYTES]) if line.number == 1 else None
  if mistake:
    return f"; it {mistake}"
  if b"\0" in start:
    return "; it holds NUL bytes, as UTF-16 does and a file that was not written to its end"
  if line.number == 1 and start in (b"{", b"["):
    return f"; the file seems to be one value over several lines{_LINES_OF_ARRAY}"
  return ""


_LINES_OF_ARRAY = ": `jq -c '.[]'` makes lines of a list"


def _parse_integer(digits: str) -> int | float:
  """An integer of any length; one of thousands of digits is nobody's text and nobody's source."""
  return int(digits) if len(digits) <= _MAX_DIGITS else math.inf
