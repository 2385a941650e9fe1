"""Documents from the two formats that libraries read: Parquet and ArrayRecord.

Both libraries raise whatever their C++ throws at them, so everything that is not our own is caught
here, and named with the file and the row to which it was read.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from engram_jax.config.bounded import cut, name_mistake_of, shorten
from engram_jax.data import decompress
from engram_jax.data.rows import BadRow, Document, Row, SourceNames, attempt
from engram_jax.errors import ConfigError, DataError

ARRAY_RECORD_BATCH = 256
PARQUET_BATCH = 256  # rows
_MESSAGE = 400  # characters of a library's


def read_parquet(
  path: pathlib.Path, name: str, field: str, source_field: str, names: SourceNames
) -> Iterator[Row]:
  """Yields the rows of a Parquet file; DataError where it cannot be read."""
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError:
    raise ConfigError(
      "data.source='parquet' needs pyarrow: pip install 'engram_jax[parquet]'"
    ) from None
  number = 0
  try:
    with pyarrow.parquet.ParquetFile(path) as file:
      columns = _columns(path, file.schema_arrow, field, source_field)
      for batch in file.iter_batches(PARQUET_BATCH, columns=columns):
        texts = _texts(batch.column(field))
        sources = _sources(batch, source_field)
        for text, source in zip(texts, sources, strict=True):
          number += 1
          where = f"{path}: row {number}"
          yield attempt(_document, text, source, where, name, field, names)
  except (DataError, ConfigError):
    raise
  except Exception as error:  # see above
    raise _unreadable(path, "Parquet", f"after row {number}" if number else "", error) from None


def _columns(path: pathlib.Path, schema: Any, field: str, source_field: str) -> list[str]:
  """The columns to read; DataError where the text's is missing, or is no text."""
  present = schema.names
  if field not in present:
    shown = ", ".join(map(shorten, present[:20])) or "(none)"
    raise DataError(f"{path}: no column {field!r} (data.text_field); it has {shown}")
  wanted = [name for name in (field, source_field) if name and name in present]
  for name in wanted:
    if present.count(name) > 1:
      raise DataError(
        f"{path}: {present.count(name)} columns are called {name!r}: rename all but one"
      )
  kind = _value_type(schema.field(field).type)
  if not _is_text(kind):
    raise DataError(
      f"{path}: row 1: {field!r} (data.text_field) is a column of {cut(str(kind), _MESSAGE)}, not "
      "of strings"
    )
  return wanted


def _value_type(kind: Any) -> Any:
  """The type of a column's values, which a dictionary may hold."""
  import pyarrow

  while pyarrow.types.is_dictionary(kind) or isinstance(kind, pyarrow.BaseExtensionType):
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind.storage_type
  return kind


def _is_text(kind: Any) -> bool:
  """Says whether values are texts: strings, or bytes, as some writers mark no strings; or null."""
  import pyarrow

  kinds = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
  return any(getattr(pyarrow.types, f"is_{name}")(kind) for name in kinds)


def _texts(column: Any) -> list[bytes | None]:
  """The values of a text's column as bytes: as strings, one bad value would take all with it."""
  import pyarrow

  column = _plain(column)
  if pyarrow.types.is_null(column.type):
    return [None] * len(column)
  is_view = pyarrow.types.is_string_view(column.type)
  kind = pyarrow.binary_view() if is_view else pyarrow.large_binary()
  is_bytes = pyarrow.types.is_binary_view(column.type)
  return (column if is_bytes else column.cast(kind)).to_pylist()


def _plain(column: Any) -> Any:
  """A column without the dictionaries and names of types around its values."""
  import pyarrow

  while True:
    if pyarrow.types.is_dictionary(column.type):
      column = column.dictionary_decode()
    elif isinstance(column.type, pyarrow.BaseExtensionType):
      column = column.storage
    else:
      return column


def _sources(batch: Any, field: str) -> list[Any]:
  """The source that each row names; None for a column that holds neither texts nor integers."""
  import pyarrow

  if not field or field not in batch.schema.names:
    return [None] * len(batch)
  column = _plain(batch.column(field))
  if _is_text(column.type):
    return [x if x is None else x.decode("utf-8", "backslashreplace") for x in _texts(column)]
  return column.to_pylist() if pyarrow.types.is_integer(column.type) else [None] * len(batch)


def _document(
  text: bytes | None, source: Any, where: str, name: str, field: str, names: SourceNames
) -> Document:
  if text is None:
    raise BadRow(f"{field!r} null", where, f"{field!r} is null, not a string")
  if len(text) > decompress.LINE_BYTES:
    problem = f"{field!r} has {len(text):,} bytes: at most {decompress.LINE_BYTES:,}"
    raise BadRow("too long", where, problem)
  decoded = decompress.decode(text, f"{where}: {field!r}", "utf-8")
  return Document(names.of(source, name), decoded)


def read_array_record(path: pathlib.Path, name: str, names: SourceNames) -> Iterator[Row]:
  """Yields the records of an ArrayRecord file; DataError where it cannot be read."""
  # A compiled module without stubs.
  from array_record.python import array_record_module  # ty: ignore[missing-module-member]

  number = -1
  try:
    reader = array_record_module.ArrayRecordReader(str(path))
    total = reader.num_records()  # 0 where the file is no ArrayRecord: closing it raises the error
    for start in range(0, total, ARRAY_RECORD_BATCH):
      numbers = list(range(start, min(start + ARRAY_RECORD_BATCH, total)))
      for number, record in zip(numbers, reader.read(numbers), strict=True):
        yield attempt(_record, record, f"{path}: record {number}", name, names)
    reader.close()
  except (DataError, ConfigError):
    raise
  except Exception as error:  # see above
    place = f"after record {number}" if number >= 0 else ""
    raise _unreadable(path, "ArrayRecord", place, error) from None


def _record(record: bytes, where: str, name: str, names: SourceNames) -> Document:
  if len(record) > decompress.LINE_BYTES:
    problem = f"has {len(record):,} bytes: at most {decompress.LINE_BYTES:,}"
    raise BadRow("too long", where, problem)
  return Document(names.of(None, name), decompress.decode(record, where))


def _unreadable(path: pathlib.Path, kind: str, place: str, error: Exception) -> DataError:
  mistake = name_mistake_of(path)
  if mistake and f"a {kind} file" not in mistake:
    return DataError(f"{path}: not a readable {kind} file: it {mistake}")
  problem = cut(str(error), _MESSAGE) or type(error).__name__
  return DataError(f"{path}: not a readable {kind} file{place and f' {place}'}: {problem}")
