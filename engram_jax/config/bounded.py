"""Files and values from outside, bounded before they are read or shown."""

import os
import pathlib
import stat
from typing import Any, BinaryIO

from engram_jax.errors import ConfigError

SHOWN_CHARACTERS = 100  # of a value, in a message
POINTER = "is a git-lfs pointer: the file itself was not fetched; `git lfs pull` fetches it"
HEAD_BYTES = 1025  # of a file, enough to see what it is, and that it is larger than a pointer
_POINTER_START = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER_BYTES = 1024  # git-lfs's own limit
_STARTS = {
  b"\x1f\x8b": "gzip data",
  b"\x28\xb5\x2f\xfd": "Zstandard data",
  b"\xfd7zXZ\0": "xz data",
  b"BZh": "bzip2 data",
  b"PK\x03\x04": "a zip archive",
  b"PAR1": "a Parquet file",
  b"ARROW1": "an Arrow file",
  b"SQLite format 3\0": "an SQLite database",
  b"\xff\xfe\0\0": "UTF-32 text",
  b"\xff\xfe": "UTF-16 text",
  b"\xfe\xff": "UTF-16 text",
}
_PAGE_STARTS = (b"<!doctype html", b"<html")
_KINDS = {
  stat.S_IFDIR: "a folder",
  stat.S_IFIFO: "a pipe",
  stat.S_IFCHR: "a device",
  stat.S_IFBLK: "a device",
  stat.S_IFSOCK: "a socket",
}


class PointerError(ValueError):
  """A git-lfs pointer where a file was expected."""

  def __init__(self):
    super().__init__(POINTER)


def open_regular(path: pathlib.Path) -> BinaryIO:
  """Opens a regular file for reading, and never waits for a writer.

  Raises OSError where it cannot be read, ValueError saying what it is where it is no regular file.
  """
  # Without O_NONBLOCK, opening a pipe waits until somebody writes to it.
  descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
  if kind != stat.S_IFREG:
    os.close(descriptor)
    raise ValueError(f"is {_KINDS.get(kind, 'something else')}, not a file")
  return open(descriptor, "rb")


def read_bounded(path: pathlib.Path, limit: int) -> bytes:
  """Returns the content of a regular file of at most `limit` bytes.

  Raises as `open_regular` does, ValueError for a larger file, PointerError for a git-lfs pointer.
  """
  with open_regular(path) as file:
    # The size of a file that grows, or of one in /proc, says nothing: one byte more is asked for.
    size = max(os.fstat(file.fileno()).st_size, 0)
    content = file.read(limit + 1) if size <= limit else b""
  if max(size, len(content)) > limit:
    raise ValueError(f"has {max(size, len(content)):,} bytes: at most {limit:,}")
  if is_pointer(content):
    raise PointerError()
  return content


def is_pointer(head: bytes) -> bool:
  """Returns True for the content of a git-lfs pointer, which stands for a file not fetched."""
  return head.startswith(_POINTER_START) and len(head) <= _MAX_POINTER_BYTES


def name_mistake(head: bytes) -> str | None:
  """Says what a file is whose first bytes are not those expected; None where they tell nothing."""
  if is_pointer(head):
    return POINTER
  if head.lstrip().lower().startswith(_PAGE_STARTS):
    return "is an HTML page, as a server sends in place of a file that it has not"
  kind = next((kind for start, kind in _STARTS.items() if head.startswith(start)), None)
  return f"is {kind} by its first bytes" if kind else None


def name_mistake_of(path: pathlib.Path) -> str | None:
  """`name_mistake` of a file on disk; None also where it cannot be read."""
  try:
    with open_regular(path) as file:
      return name_mistake(file.read(HEAD_BYTES))
  except (OSError, ValueError):
    return None


def user_path(text: str, field: str) -> pathlib.Path:
  """The path that a config's field names, with `~` expanded; ConfigError where that is nobody's."""
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError as error:
    raise ConfigError(f"{field}={shorten(text)}: {error}") from None


def shorten(value: Any, limit: int = SHOWN_CHARACTERS) -> str:
  """Returns the repr of a value that came from outside, cut after `limit` characters."""
  try:
    return cut(repr(value), limit)
  except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists
    return f"a {type(value).__name__} too long to show"


def cut(text: str, limit: int) -> str:
  """Returns a text in one line, cut after `limit` characters."""
  line = " ".join(text[: 4 * limit].split())
  return line if len(line) <= limit and len(text) <= 4 * limit else f"{line[:limit]}..."
