"""The manifest of a checkpoint: a list of its leaves, and of all its files with their digests.

Checkpoint formats restore a file with a flipped bit without an error. A manifest written last,
after every file it names is on the disk, tells which checkpoints are complete and unchanged:

    content = build(directory, step=100, tree={"w": "float32[2,3]"}, meta={})
    write(directory, content)
    problem = verify(directory)          # None, or one line that describes the damage

`manifest.json` is `{"digest": sha256 of the canonical JSON of content, "content": {...}}`, so that
a damaged manifest is noticed like any other damaged file.

`replace_file` and `sync_directory` are for any file that a crash must not leave half written.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import pathlib
from typing import Any

from engram_jax.errors import StorageError

NAME = "manifest.json"
FORMAT = 1
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


def read(directory: pathlib.Path) -> dict[str, Any]:
  """Returns the content of a manifest; StorageError that describes the damage if there is any."""
  path = directory / NAME
  try:
    stored = json.loads(path.read_bytes())
    digest, content = stored["digest"], stored["content"]
  except FileNotFoundError:
    raise StorageError(f"{path} is missing: the checkpoint was never completed") from None
  except OSError as error:
    raise StorageError(f"{path} cannot be read: {error.strerror}") from None
  except (ValueError, TypeError, KeyError):
    raise StorageError(f"{path} is damaged: not a manifest") from None
  if digest != _digest(content):
    raise StorageError(f"{path} is damaged: its content does not match its own digest")
  if content["format"] != FORMAT:
    raise StorageError(f"{path} has format {content['format']}; this version reads {FORMAT}")
  return content


def verify(directory: pathlib.Path) -> str | None:
  """Describes the damage to the checkpoint in `directory`, in one line; None if there is none.

  Reads every file once. Files the manifest does not name are ignored.
  """
  try:
    content = read(directory)
  except StorageError as error:
    return str(error)
  for name, expected in content["files"].items():
    problem = _difference(directory / name, expected)
    if problem:
      return f"{directory / name} {problem}"
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


def _difference(path: pathlib.Path, expected: dict[str, Any]) -> str | None:
  try:
    size = path.stat().st_size
    if size != expected["bytes"]:
      return f"has {size} bytes, its manifest says {expected['bytes']}"
    if _describe(path) != expected:
      return "has changed: its sha256 is not the manifest's"
  except FileNotFoundError:
    return "is missing"
  except OSError as error:
    return f"cannot be read: {error.strerror}"
  return None


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
