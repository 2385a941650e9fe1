"""The corpora by their names as `data.source`: documents, descriptions and fingerprints."""

import importlib.metadata
import pathlib
from collections.abc import Iterator

from engram_jax.data.corpora import archives
from engram_jax.data.corpora.chinese import CHINESE
from engram_jax.data.corpora.english import ENGLISH, Part, read_gensim
from engram_jax.data.corpora.english_large import ENGLISH_LARGE
from engram_jax.data.corpora.markup import require_wiki_parser
from engram_jax.data.corpora.paragraphs import drop_repeats
from engram_jax.data.download import Log
from engram_jax.data.files import Document
from engram_jax.errors import DataError

CORPORA: dict[str, tuple[Part, ...]] = {
  "english": ENGLISH,
  "english_large": ENGLISH_LARGE,
  "chinese": CHINESE,
}
READERS_VERSION = 1  # part of each fingerprint: raise it when a reader gives another text


def require_packages(name: str) -> None:
  """Raises ConfigError where a Python package is missing that reads this corpus."""
  if any(part.read is read_gensim for part in CORPORA[name]):
    require_wiki_parser()


def read_corpus(name: str, cache: pathlib.Path, log: Log) -> Iterator[Document]:
  """Yields a corpus's documents, no paragraph twice; downloads what is not in the cache.

  Raises ConfigError and DataError where something is missing, before anything is downloaded, and
  DataError for an archive that cannot be downloaded or read.
  """
  require_packages(name)
  archives.require_tools((part.archive for part in CORPORA[name]), cache)
  paths = [archives.fetch(part.archive, cache, log) for part in CORPORA[name]]

  def documents() -> Iterator[Document]:
    for part, path in zip(CORPORA[name], paths, strict=True):
      log(f"reading {part.source} from {path.name} ...")
      count = 0
      for document in part.read(path):
        count += 1
        yield document
      if not count:
        raise DataError(f"{path}: no document of {part.source} in it. {archives.ALTERNATIVE}")

  yield from drop_repeats(documents(), log)


def describe_corpus(name: str) -> str:
  """Describes each part in a few words: its origin, licence and archive."""
  return "; ".join(
    f"{part.what}, {part.licence} ({archives.label(part.archive)})" for part in CORPORA[name]
  )


def identify_corpus(name: str, cache: pathlib.Path, log: Log) -> list:
  """All that a corpus's text depends on, as JSON: archives by SHA-256, and versions of readers.

  Debian packages are downloaded for it if they are not in the cache, as no checksum of theirs is
  known before.
  """
  require_packages(name)
  parts = [part.archive for part in CORPORA[name]]
  archives.require_tools(parts, cache)
  needs_parser = any(part.read is read_gensim for part in CORPORA[name])
  parser = importlib.metadata.version("mwparserfromhell") if needs_parser else None
  found = [archives.identity(archive, cache, log) for archive in parts]
  return [READERS_VERSION, parser, found]
