"""The digest of a split's token files, kept beside them with the files' sizes and times.

So the files of a large corpus are read once, when they are made, and again only where one of them
looks as if it had changed.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from typing import Any

from engram_jax.config.bounded import read_bounded
from engram_jax.errors import StorageError

NAME = "digest.json"
FILES = ("tokens.npy", "offsets.npy", "sources.npy")


def split_digest(folder: pathlib.Path) -> str:
  """SHA-256 (hex) over every byte of the files of a split.

  Raises StorageError where they are not what they were when their digest was first taken.
  """
  path = folder / NAME
  try:
    files = {name: _stat(folder / name) for name in FILES}
    known = _read(path)
    if known and known["files"] == files:
      return known["sha256"]
    actual = _digest(folder)
  except OSError as error:
    raise StorageError(f"{folder} cannot be read: {error}") from None
  if known and known["sha256"] != actual:
    raise StorageError(
      f"{folder}: a damaged token file: its tokens have changed since they were written: SHA-256 "
      f"{known['sha256']} then, {actual} now; delete {folder.parent} and it is made again"
    )
  with contextlib.suppress(OSError):  # a cache that is not ours to write: taken again next time
    partial = path.with_name(f"{NAME}.{os.getpid()}.partial")
    partial.write_text(json.dumps({"sha256": actual, "files": files}))
    os.replace(partial, path)
  return actual


def _stat(path: pathlib.Path) -> list[int]:
  status = path.stat()
  return [status.st_size, status.st_mtime_ns]


def _read(path: pathlib.Path) -> dict[str, Any] | None:
  try:
    content = json.loads(read_bounded(path, 1 << 16))
    is_known = isinstance(content["sha256"], str) and isinstance(content["files"], dict)
  except FileNotFoundError:
    return None
  except (ValueError, TypeError, KeyError):
    is_known = False
  if not is_known:
    raise StorageError(f"{path} is damaged; delete {path.parent.parent} and it is made again")
  return content


def _digest(folder: pathlib.Path) -> str:
  hasher = hashlib.sha256()
  for name in FILES:
    with open(folder / name, "rb") as file:
      hasher.update(hashlib.file_digest(file, "sha256").digest())
  return hasher.hexdigest()
