"""Documents of rows, the names of their sources, and what becomes of a row that is none.

A reader yields a `Document` or a `BadRow` for each row; `data.bad_rows` decides whether a bad row
ends the reading or is counted and skipped. A file that cannot be read ends it in any case.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

from engram_jax.config.bounded import cut
from engram_jax.errors import DataError

MAX_SOURCES = 256  # names; documents of any further ones count as OTHER_SOURCE
MAX_NAME = 80  # characters of one
OTHER_SOURCE = "other"


class Document(NamedTuple):
  """A text and the name of its source."""

  source: str
  text: str


class BadRow(DataError):
  """A row that is no document; `kind` says in two or three words what is wrong with it."""

  def __init__(self, kind: str, where: str, problem: str):
    super().__init__(f"{where}: {problem}")
    self.kind, self.where = kind, where


Row = Document | BadRow


def attempt(make: Callable[..., Document], *args: Any) -> Row:
  """The document that a function makes of a row, or the BadRow that it raises."""
  try:
    return make(*args)
  except BadRow as error:
    return error


def keep_good(
  rows: Iterable[Row], policy: Literal["error", "skip"], log: Callable[[str], None]
) -> Iterator[Document]:
  """Yields the documents of rows; a bad row is raised, or skipped and counted.

  log: is told at the end how many were skipped, of which kinds, and where the first of each is.

  Raises BadRow, and DataError where every row was skipped.
  """
  good, counts, first = 0, dict[str, int](), dict[str, BadRow]()
  for row in rows:
    if isinstance(row, Document):
      good += 1
      yield row
      continue
    if policy == "error":
      row.add_note("--data.bad_rows skip leaves such rows out, and counts them")
      raise row
    counts[row.kind] = counts.get(row.kind, 0) + 1
    first.setdefault(row.kind, row)
  if not counts:
    return
  bad = sum(counts.values())
  kinds = ", ".join(f"{counts[kind]:,} {kind} (first: {row.where})" for kind, row in first.items())
  says = f"data.bad_rows=skip: skipped {bad:,} of {good + bad:,} rows: {kinds}"
  if not good:
    raise DataError(f"{says}; no row is left. The first: {next(iter(first.values()))}")
  log(says)


class SourceNames:
  """The names of sources, bounded in number and in length.

  Attributes:
    others: documents whose source had another name than the first MAX_SOURCES.
    found: documents that named their source themselves.
  """

  def __init__(self):
    self.others = self.found = 0
    self._names: set[str] = set()

  def of(self, stated: Any, default: str) -> str:
    """The name for a document: what its row states, a text or a whole number, else `default`."""
    name = ""
    if isinstance(stated, str):
      name = _clean(stated)
    elif type(stated) is int and abs(stated) < 2**64:
      name = str(stated)
    self.found += bool(name)
    name = name or _clean(default) or "file"
    if name not in self._names:
      if len(self._names) >= MAX_SOURCES:
        self.others += 1
        return OTHER_SOURCE
      self._names.add(name)
    return name

  def describe(self, field: str, is_default: bool) -> Iterator[str]:
    """Yields lines on what is worth saying of them when all documents were read.

    field: `data.source_field`. is_default: nobody asked for that field by name.
    """
    if self.others:
      yield (
        f"data.source_field={field!r}: there are more than {MAX_SOURCES} sources, and "
        f"{self.others:,} documents of the later ones count as {OTHER_SOURCE!r}"
      )
    if field and not is_default and not self.found:
      yield f"data.source_field={field!r}: no row names its source there: they have their files'"


def _clean(name: str) -> str:
  """A name in one line, without what cannot be encoded or shown, cut after MAX_NAME characters."""
  shown = name[: 8 * MAX_NAME].encode("utf-8", "backslashreplace").decode()
  return cut("".join(c if c.isprintable() else " " for c in shown), MAX_NAME)
