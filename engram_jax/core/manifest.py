"""The manifest of a checkpoint: a list of its leaves, and of all its files with their digests.

Checkpoint formats restore a file with a flipped bit without an error. A manifest written last,
after every file it names is on the disk, tells which checkpoints are complete and unchanged:

    content = build(directory, step=100, tree={"w": "float32[2,3]"}, meta={})
    write(directory, content)
    problem = verify(directory)          # None, or one line that describes the damage

`manifest.json` is `{"digest": sha256 of the canonical JSON of content, "content": {...}}`, so that
a damaged manifest is noticed like any other damaged file. A right digest says only that nothing
changed since: what is read is checked against `Content` too, whoever wrote it.

`replace_file` and `sync_directory` are for any file that a crash must not leave half written.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import pathlib
import stat
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import AfterValidator, Field

from engram_jax.config.bounded import (
  POINTER,
  PointerError,
  cut,
  name_mistake_of,
  read_bounded,
  shorten,
)
from engram_jax.errors import StorageError

NAME = "manifest.json"
FORMAT = 1
MAX_BYTES = 16 << 20  # a hundred thousand files fit; nothing larger is read
PARTIAL = ".partial"  # ends the name of a file that is being written
_LIBRARIES = ("engram_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def build(
  directory: pathlib.Path, *, step: int, tree: dict[str, str], meta: dict[str, Any]
) -> dict[str, Any]:
  """Describes the files below `directory`, as a manifest's content, and syncs them to the disk.

  Args:
    directory: a complete checkpoint, no longer being written.
    step: the step it was taken after.
    tree: dtype and shape of each leaf by path, "float32[2,3]".
    meta: JSON values of the caller's.

  Raises OSError if a file cannot be read or synced.
  """
  files = {}
  for path in sorted(directory.rglob("*")):
    if path.is_dir():
      sync_directory(path)
    elif path != directory / NAME:
      files[path.relative_to(directory).as_posix()] = _describe(path, sync=True)
  return {
    "format": FORMAT,
    "step": step,
    "versions": _versions(),
    "meta": meta,
    "tree": tree,
    "files": files,
  }


def write(directory: pathlib.Path, content: dict[str, Any]) -> None:
  """Writes the manifest so that it is either absent or complete, whenever the process dies."""
  text = json.dumps({"digest": _digest(content), "content": content}, indent=1, allow_nan=False)
  replace_file(directory / NAME, text.encode())


class Problem(NamedTuple):
  """The reason why a checkpoint cannot be used.

  Attributes:
    kind: missing: the manifest, or a file it names, is not there. damaged: something is there, and
      is not what was written. unreadable: the system could not read it, or it has the format of
      another version, which says nothing against what is there: it may be readable tomorrow, or
      for somebody else.
    message: one line that names the file.
  """

  kind: Literal["missing", "damaged", "unreadable"]
  message: str


class ManifestError(StorageError):
  """A manifest that cannot be used; `problem` says of which kind the reason is."""

  def __init__(self, problem: Problem):
    super().__init__(problem.message)
    self.problem = problem


def read(directory: pathlib.Path) -> dict[str, Any]:
  """Returns the content of a manifest; ManifestError, a StorageError, if it cannot be used."""
  path = directory / NAME
  try:
    text = read_bounded(path, MAX_BYTES)
  except OSError as error:
    raise ManifestError(_problem_of(error, path, ": the checkpoint was never completed")) from None
  except PointerError as error:
    raise ManifestError(Problem("unreadable", f"{path} {error}")) from None
  except ValueError as error:
    raise _damaged(path, f"it {error}") from None
  try:
    stored = json.loads(text.decode("utf-8"))
    digest, content = stored["digest"], stored["content"]
    actual = _digest(content)
  except (ValueError, TypeError, KeyError, RecursionError):
    raise _damaged(path, "not a manifest") from None
  if digest != actual:
    raise _damaged(path, "its content does not match its own digest")
  version = content.get("format") if isinstance(content, dict) else None
  if type(version) is int and version != FORMAT:
    says = f"{path} has format {shorten(version)}; this version reads {FORMAT}"
    raise ManifestError(Problem("unreadable", says))
  try:
    Content.model_validate(content)
  except pydantic.ValidationError as error:
    first = error.errors(include_url=False)[0]
    where = ".".join(cut(str(part), 100) for part in first["loc"]) or "content"
    raise _damaged(path, f"{where}: {first['msg']} (got {shorten(first['input'])})") from None
  return content


def verify(directory: pathlib.Path) -> str | None:
  """Describes why the checkpoint in `directory` cannot be used, in one line; None if it can.

  Reads every file once. Files the manifest does not name are ignored.
  """
  problem = examine(directory)
  return problem.message if problem else None


def examine(directory: pathlib.Path, content: bool = True) -> Problem | None:
  """Returns the first reason why the checkpoint in `directory` cannot be used, as `verify` does.

  content: compare digests, for which every file is read; False compares sizes alone.
  """
  try:
    files = read(directory)["files"]
  except ManifestError as error:
    return error.problem
  for name, expected in files.items():
    if problem := _difference(directory / name, expected, content):
      return problem
  return None


def replace_file(path: pathlib.Path, content: bytes) -> None:
  """Writes a file aside, syncs it and renames it: whenever the process dies, old or new is there.

  Raises OSError if it cannot be written.
  """
  partial = path.with_name(path.name + PARTIAL)
  with open(partial, "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)
  sync_directory(path.parent)


def sync_directory(path: pathlib.Path) -> None:
  """Makes renames and new names in a directory survive a power failure."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have none
      raise
  finally:
    os.close(descriptor)


def _difference(path: pathlib.Path, expected: dict[str, Any], content: bool) -> Problem | None:
  try:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
      return Problem("damaged", f"{path} is no longer a file")
    if status.st_size != expected["bytes"]:
      if name_mistake_of(path) == POINTER:  # which says nothing against the file behind it
        return Problem("unreadable", f"{path} {POINTER}")
      says = f"{path} has {status.st_size} bytes, its manifest says {expected['bytes']}"
      return Problem("damaged", says)
    if content and _describe(path) != expected:
      return Problem("damaged", f"{path} has changed: its sha256 is not the manifest's")
  except OSError as error:
    return _problem_of(error, path)
  return None


# A path that leads nowhere, whoever asks and whenever; any other error is of reading.
_ABSENT = (errno.ENOENT, errno.ENOTDIR)
_UNFIT = (errno.ELOOP, errno.ENAMETOOLONG)


def _problem_of(error: OSError, path: pathlib.Path, consequence: str = "") -> Problem:
  if error.errno in _ABSENT:
    return Problem("missing", f"{path} is missing{consequence}")
  kind = "damaged" if error.errno in _UNFIT else "unreadable"
  return Problem(kind, f"{path} cannot be read: {error.strerror or error}")


def _damaged(path: pathlib.Path, reason: str) -> ManifestError:
  return ManifestError(Problem("damaged", f"{path} is damaged: {reason}"))


def _require_inside(name: str) -> str:
  """Refuses the name of a file that would lie outside the checkpoint's folder, or nowhere."""
  parts = name.split("/")
  is_inside = {"", ".", ".."}.isdisjoint(parts)
  if not is_inside or not name.isprintable() or max(map(len, parts)) > 255 or len(name) > 1024:
    raise ValueError("not the name of a file inside the folder")
  return name


Size = Annotated[int, Field(ge=0, lt=2**63)]
FileName = Annotated[str, AfterValidator(_require_inside)]
Signature = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*\[([0-9]{1,19}(,[0-9]{1,19})*)?\]$")]


class _Strict(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(strict=True)


class FileEntry(_Strict):
  """The size of a file and the digest of what it holds."""

  bytes: Size
  sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Content(_Strict):
  """The content of a manifest, as `build` makes it; `meta` is the caller's, and any JSON values."""

  format: Size
  step: Size
  versions: dict[str, str]
  meta: dict[str, Any]
  tree: dict[str, Signature]
  files: dict[FileName, FileEntry]


def _describe(path: pathlib.Path, sync: bool = False) -> dict[str, Any]:
  with open(path, "rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if sync:
      os.fsync(file.fileno())
    return {"bytes": file.tell(), "sha256": digest}


def _versions() -> dict[str, str]:
  versions = {}
  for name in _LIBRARIES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from a source tree
      versions[name] = importlib.metadata.version(name)
  return versions


def _digest(content: Any) -> str:
  canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
  return hashlib.sha256(canonical.encode()).hexdigest()
