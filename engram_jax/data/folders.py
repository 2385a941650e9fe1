"""Which files of a folder are read as data, which are left, and why.

A folder is walked as other readers of folders walk theirs (Spark, pyarrow, Hugging Face datasets):
links to folders are followed, names that begin with a dot or an underscore are nobody's data, nor
are the files that tools keep beside data. A file that is named outright is not looked at here.
"""

import collections
import dataclasses
import os
import pathlib

from engram_jax.config.bounded import cut
from engram_jax.errors import ConfigError, DataError

SUFFIXES = {
  "text": (".txt", ".md", ".rst", ".text"),
  "jsonl": (".jsonl", ".json", ".ndjson"),
  "parquet": (".parquet", ".pq"),
  "array_record": (".array_record", ".arrayrecord"),
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".zstd", ".lz4", ".br")
COMPRESSED_SOURCES = ("text", "jsonl")  # the other formats pack their own blocks
# What tools write beside data, under these names whatever the data is.
BESIDE_DATA = frozenset(
  (
    # of tokenizers and models
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "config.json"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("model.safetensors.index.json", "pytorch_model.bin.index.json", "trainer_state.json"),
    # of data sets
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"),
    *("metadata.json", "dataset-metadata.json", "croissant.json", "datapackage.json"),
    *("schema.json", "manifest.json"),
    # of programs
    *("package.json", "package-lock.json"),
  )
)
# Folders that systems keep on disks of theirs.
_SYSTEM_FOLDERS = ("lost+found", "@eadir", "$recycle.bin", "system volume information")
_SHOWN = 3  # names of those left, for each reason
_SHOWN_NAME = 80  # characters

HIDDEN = "hidden (a name that begins with . or _)"
BESIDE = "not data by name"
OTHER = "of other kinds"
LINKED_TWICE = "read already under another name"
SPECIAL = "no regular file"


@dataclasses.dataclass(frozen=True)
class Folder:
  """The files of a folder that are read, sorted, and how many were left for each reason.

  left: by reason, the first few names, relative to the folder. counts: by reason, of all.
  """

  read: list[pathlib.Path]
  left: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

  def leave(self, reason: str, name: str) -> None:
    """Notes a file, or a folder with all in it, that is not read."""
    self.counts[reason] += 1
    names = self.left.setdefault(reason, [])
    if len(names) < _SHOWN:
      names.append(name)

  def describe_left(self) -> str:
    """Number of files left for each reason, with their first names; "none" where there are none."""
    return ", ".join(self._describe(reason) for reason in sorted(self.left)) or "none"

  def _describe(self, reason: str) -> str:
    names = [cut(name, _SHOWN_NAME) for name in self.left[reason]]
    more = ", ..." if self.counts[reason] > len(names) else ""
    return f"{self.counts[reason]:,} {reason}: {', '.join(names)}{more}"

  def describe_read(self, source: str) -> str:
    """Number of files of each suffix that are read."""
    suffixes = collections.Counter(_suffix(path.name, source) for path in self.read)
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in suffixes.most_common())
    return f"{len(self.read):,} file{'s' * (len(self.read) != 1)} ({kinds})"


def walk(root: pathlib.Path, source: str) -> Folder:
  """Lists the folder `root` for a `data.source`.

  Raises ConfigError for a folder that links to one that holds it and for a link to nothing,
  DataError for a folder that cannot be listed.
  """
  folder = Folder([])
  seen: set[tuple[int, int]] = set()
  # A stack of our own, as folders may be nested more deeply than calls; with each folder those
  # that it is in.
  stack: list[tuple[pathlib.Path, tuple[tuple[int, int], ...]]] = [(root, ())]
  while stack:
    path, above = stack.pop()
    try:
      status = path.stat()
      entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
      raise DataError(f"{path}: the folder cannot be listed: {error.strerror}") from None
    identity = status.st_dev, status.st_ino
    if identity in above:
      raise ConfigError(
        f"data.path={str(root)!r}: {path} leads back to a folder that holds it, a loop of links: "
        "remove the link"
      )
    if identity in seen:  # its documents would all be repetitions, which are dropped
      folder.leave(LINKED_TWICE, _relative(path, root))
      continue
    seen.add(identity)
    below = [e for e in entries if not _leave_or_read(e, folder, root, source)]
    stack += [(path / entry.name, (*above, identity)) for entry in reversed(below)]
  folder.read.sort()
  return folder


def _leave_or_read(entry: os.DirEntry, folder: Folder, root: pathlib.Path, source: str) -> bool:
  """Notes an entry as read or left; False for a folder that is to be walked."""
  path = pathlib.Path(entry.path)
  name, lower = _relative(path, root), entry.name.lower()
  is_folder = _is_folder(entry)
  if entry.name.startswith((".", "_")):
    folder.leave(HIDDEN, name + "/" * is_folder)
  elif is_folder:
    if lower not in _SYSTEM_FOLDERS:
      return False
    folder.leave(BESIDE, f"{name}/")
  elif lower in BESIDE_DATA:
    folder.leave(BESIDE, name)
  elif _leads_nowhere(entry) and (_suffix(lower, source) or not path.suffix):
    raise ConfigError(
      f"data.path={str(root)!r}: {path} is a link to {os.readlink(path)!r}, where nothing is: mend "
      "or remove it"
    )
  elif not _suffix(lower, source):
    folder.leave(OTHER, name)
  elif not entry.is_file():
    folder.leave(SPECIAL, name)
  else:
    folder.read.append(path)
  return True


def _relative(path: pathlib.Path, root: pathlib.Path) -> str:
  return path.relative_to(root).as_posix()


def _is_folder(entry: os.DirEntry) -> bool:
  try:
    return entry.is_dir()
  except OSError:  # a link to itself
    return False


def _leads_nowhere(entry: os.DirEntry) -> bool:
  return entry.is_symlink() and not os.path.exists(entry.path)


def _suffix(name: str, source: str) -> str:
  """The suffix by which a file belongs to a source, with the compression's; empty if none."""
  name = name.lower()
  compressions = ("", *COMPRESSIONS) if source in COMPRESSED_SOURCES else ("",)
  suffixes = (suffix + kind for suffix in SUFFIXES[source] for kind in compressions)
  return next((suffix for suffix in suffixes if name.endswith(suffix)), "")


def find_sources(folder: Folder) -> list[str]:
  """The other sources that files of a folder would belong to by their first names left."""
  names = folder.left.get(OTHER, [])
  return [source for source in SUFFIXES if any(_suffix(name, source) for name in names)]
