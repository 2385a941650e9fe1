"""No paragraph twice in a corpus, and short entries grouped into documents.

A paragraph is a block of lines between blank lines, in every source; readers put a blank line
between the entries of a dictionary, and none inside a poem. Two are equal if their words are:
indentation and line ends do not count.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator

from engram_jax.data.download import Log
from engram_jax.data.files import PIECE_CHARACTERS, Document

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
# A title over a line of one sign, as in reStructuredText: it has no meaning without what follows.
_HEADING = re.compile(r"(?:([^\w\s])\1{2,}\n)?[^\n]+\n([^\w\s])\2{2,}")


def split_paragraphs(text: str) -> list[str]:
  """The blocks of a text between blank lines, those without a word left out."""
  return [block for block in _BLANK_LINES.split(text) if block.strip()]


def drop_repeats(documents: Iterable[Document], log: Log) -> Iterator[Document]:
  """Yields documents without the paragraphs that came before, in the same document or an earlier.

  A heading goes with the paragraph under it. A document in which nothing is repeated stays as it
  is, to the letter; one that has nothing left is not yielded.
  """
  seen: set[bytes] = set()
  total = repeated = 0
  for source, text in documents:
    kept, headings, before = [], [], repeated
    for block in split_paragraphs(text):
      if _HEADING.fullmatch(block.strip()):
        headings.append(block)
        continue
      total += 1
      # That two of a million different ones have the same 8 bytes has a chance of 3e-8.
      key = hashlib.blake2b(" ".join(block.split()).encode(), digest_size=8).digest()
      if key in seen:
        repeated += 1
      else:
        seen.add(key)
        kept += [*headings, block]
      headings = []
    if kept:
      yield Document(source, text if repeated == before else "\n\n".join(kept))
  log(f"{total:,} paragraphs, of which {repeated:,} repeat an earlier one and are dropped")


def group(entries: Iterable[str]) -> Iterator[str]:
  """Yields texts of consecutive entries, each of PIECE_CHARACTERS or a little more.

  Entries are a few words long: a document of each would be mostly its end.
  """
  piece, size = [], 0
  for entry in entries:
    piece.append(entry)
    size += len(entry)
    if size >= PIECE_CHARACTERS:
      yield "\n\n".join(piece)
      piece, size = [], 0
  if piece:
    yield "\n\n".join(piece)
