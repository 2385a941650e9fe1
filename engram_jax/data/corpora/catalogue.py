"""The corpora by their names as `data.source`: documents, descriptions and fingerprints."""

import hashlib
import importlib.metadata
import json
import pathlib
import tempfile
from collections.abc import Iterator

from engram_jax.data.corpora import archives
from engram_jax.data.corpora.chinese import CHINESE
from engram_jax.data.corpora.english import ENGLISH, Part, read_gensim
from engram_jax.data.corpora.english_large import ENGLISH_LARGE
from engram_jax.data.corpora.markup import require_wiki_parser
from engram_jax.data.corpora.paragraphs import drop_repeats
from engram_jax.data.download import Log
from engram_jax.data.files import Document
from engram_jax.errors import DataError, StorageError

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

  The text is kept in `cache/texts`, because reading the archives takes minutes and is needed twice:
  for the tokenizer, and to tokenise. Raises ConfigError and DataError where something is missing,
  before anything is downloaded, DataError for an archive that cannot be downloaded or read, and
  StorageError where the kept text is damaged.
  """
  identity = json.dumps(identify_corpus(name, cache, log))
  digest = hashlib.sha256(identity.encode()).hexdigest()[:32]
  kept = cache / "texts" / f"{name}-{digest}.jsonl"
  if kept.is_file():
    log(f"reading {kept}")
    yield from _read_kept(kept)
    return
  kept.parent.mkdir(parents=True, exist_ok=True)
  documents = drop_repeats(_read_archives(name, cache, log), log)
  with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".part-") as part:
    path = pathlib.Path(part) / kept.name
    with open(path, "w", encoding="utf-8") as file:
      for document in documents:
        file.write(json.dumps(document, ensure_ascii=False) + "\n")
        yield document
    path.replace(kept)


def _read_kept(path: pathlib.Path) -> Iterator[Document]:
  try:
    with open(path, encoding="utf-8") as file:
      for line in file:
        source, text = json.loads(line)
        yield Document(source, text)
  except ValueError as error:
    raise StorageError(f"{path}: damaged: {error}; delete it and it is made again") from None


def _read_archives(name: str, cache: pathlib.Path, log: Log) -> Iterator[Document]:
  paths = [archives.fetch(part.archive, cache, log) for part in CORPORA[name]]
  for part, path in zip(CORPORA[name], paths, strict=True):
    log(f"reading {part.source} from {path.name} ...")
    count = 0
    for document in part.read(path):
      count += 1
      yield document
    if not count:
      raise DataError(f"{path}: no document of {part.source} in it. {archives.ALTERNATIVE}")


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
