"""SHA256SUMS: the digest of every other file in a checkpoint folder, as `sha256sum -c` reads it.

    cd out/tiny && sha256sum -c SHA256SUMS

It is the last file that an export writes. Digests are of the bytes that were handed to the system,
not of what came back from the disk.
"""

import hashlib
import pathlib
import re
from collections.abc import Mapping

from engram_jax.config.bounded import POINTER, is_pointer, name_mistake_of
from engram_jax.errors import StorageError

NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\\0]+)")
_MAX_BYTES = 64 << 20


def dump_digests(digests: Mapping[str, str]) -> str:
  """The text of the file, given SHA-256 (hex) by file name."""
  return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def read_digests(folder: pathlib.Path) -> dict[str, str] | None:
  """SHA-256 (hex) by file name, once the folder was found to hold these files and no others; None
  where it has no SHA256SUMS. Hidden files do not count, as none is ever read.

  Raises StorageError where SHA256SUMS is damaged, or naming a file that is missing or was added.
  """
  path = folder / NAME
  if not path.is_file():
    return None
  digests = _parse(path)
  try:
    present = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
  except OSError as error:
    raise StorageError(f"{folder} cannot be read: {error.strerror}") from None
  for name in digests.keys() - present:
    raise StorageError(f"{folder / name} is missing: {NAME} lists it")
  for name in present - digests.keys() - {NAME}:
    raise StorageError(f"{folder / name} was added: {NAME} does not list it")
  return digests


def require_digest(path: pathlib.Path, expected: str) -> int:
  """Reads a file and returns its size; StorageError if its SHA-256 is another than `expected`."""
  try:
    with open(path, "rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
      size = file.tell()
  except OSError as error:
    raise StorageError(f"{path} cannot be read: {error.strerror}") from None
  if digest != expected:
    if name_mistake_of(path) == POINTER:
      raise StorageError(f"{path} {POINTER}")
    raise StorageError(f"{path} has changed: its SHA-256 is not the one in {NAME}")
  return size


def _parse(path: pathlib.Path) -> dict[str, str]:
  digests: dict[str, str] = {}
  try:
    if path.stat().st_size > _MAX_BYTES:
      raise StorageError(f"{path} is damaged: larger than {_MAX_BYTES:,} bytes")
    content = path.read_bytes()
    if is_pointer(content):
      raise StorageError(f"{path} {POINTER}")
    lines = content.decode().removesuffix("\n").split("\n")
  except OSError as error:
    raise StorageError(f"{path} cannot be read: {error.strerror}") from None
  except UnicodeDecodeError:
    raise StorageError(f"{path} is damaged: it is no text") from None
  for i, line in enumerate(lines, 1):
    match = _LINE.fullmatch(line)
    if match is None:
      raise StorageError(f"{path} is damaged: line {i} is no digest and file name")
    digest, name = match.groups()
    if name in digests:
      raise StorageError(f"{path} is damaged: it lists {name} twice")
    digests[name] = digest
  return digests
