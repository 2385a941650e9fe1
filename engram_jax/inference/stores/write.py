"""Writing a table file: streaming, under another name until it is complete."""

import contextlib
import hashlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Generator, Iterable
from typing import Any, BinaryIO

import numpy as np

from engram_jax.core.manifest import sync_directory
from engram_jax.errors import ConfigError, StorageError
from engram_jax.inference.stores.checksums import Checksums
from engram_jax.inference.stores.host import pack_blocks
from engram_jax.inference.stores.table_file import TableHeader, gaps
from engram_jax.memory.hash_layout import HashLayout


def write_table_file(
  path: str | os.PathLike,
  blocks: Callable[[int], Iterable[np.ndarray]],
  layout: HashLayout,
  token_map_digest: str,
  *,
  kind: str,
  width: int,
  source: dict[str, Any] | None = None,
) -> TableHeader:
  """Writes the tables of a layout; `path` exists when it is complete and on the disk, not before.

  Args:
    blocks: returns the rows of a layer's id in order, in blocks [n, C] of any float type and any n
      that add up to `layout.rows[layer]` rows. One is held at a time.
    kind: the row encoding, see memory/codecs.py.
    source: JSON values that say where the rows come from.

  Raises:
    ConfigError: `path` exists: nothing is overwritten.
    StorageError: a row is not finite, or the file cannot be written, for want of room or otherwise.
  """
  path = pathlib.Path(path)
  header = TableHeader.plan(layout, token_map_digest, kind, width, source)
  require_new(path, header.file_bytes)
  with _open_partial(path) as file:
    checksums = _write_rows(file, header, blocks)
    digest = hashlib.sha256(checksums).hexdigest()
    header = header.model_copy(update={"checksums_sha256": digest})
    file.write(checksums)
    file.seek(0)
    file.write(header.to_bytes())
  return header


def require_new(path: pathlib.Path, size: int = 0) -> None:
  """Raises ConfigError if the name is taken, StorageError if `size` bytes do not fit beside it."""
  if path.exists():
    raise ConfigError(f"{path} exists and is not overwritten: choose another name or remove it")
  try:
    free = shutil.disk_usage(path.parent).free
  except OSError as error:
    raise StorageError(f"{path.parent} cannot be written: {error.strerror}") from None
  if free < size:
    raise StorageError(f"{path} takes {size:,} bytes, but {path.parent} has {free:,} free")


def _write_rows(
  file: BinaryIO, header: TableHeader, blocks: Callable[[int], Iterable[np.ndarray]]
) -> bytes:
  """Writes all tables and returns the checksums of the bytes written."""
  checksums = Checksums(header.block_bytes)
  file.seek(header.tables[0].offset)
  for table, gap in gaps(header):
    for packed in pack_blocks(table.layer, blocks(table.layer), table.rows, header.kind):
      file.write(packed.data)
      checksums.add(packed.reshape(-1).data)
    file.write(bytes(gap))
    checksums.add(memoryview(bytes(gap)))
  return checksums.to_bytes()


@contextlib.contextmanager
def _open_partial(path: pathlib.Path) -> Generator[BinaryIO]:
  """Opens a new file beside `path`, renamed to it if the body succeeds and removed if it fails."""
  partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
  try:
    with open(partial, "xb") as file:
      try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        require_new(path)  # another process may have been faster
        os.rename(partial, path)
      except BaseException:
        os.unlink(partial)
        raise
    sync_directory(path.parent)
  except OSError as error:
    raise StorageError(f"{path} cannot be written: {error.strerror or error}") from None
