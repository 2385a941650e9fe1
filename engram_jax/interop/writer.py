"""Writing a checkpoint folder as a stream: nothing larger than one slice is ever held.

The folder appears under its own name when it is complete, and never before: files are written into
a hidden folder beside it, synced, and that one is renamed. The `safetensors` library writes only
what is in memory; here it opens every file before the folder gets its name.
"""

import contextlib
import json
import math
import os
import pathlib
import secrets
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors

from engram_jax.core.manifest import sync_directory
from engram_jax.errors import ConfigError, StorageError
from engram_jax.interop.folder import INDEX
from engram_jax.interop.safetensors import BITS, MAX_HEADER_BYTES, NUMPY

SHARD_BYTES = 5_000_000_000
SLICE_BYTES = 64 << 20


class Source(NamedTuple):
  """A tensor to write: `slices` yields its entries in order, in arrays of its NumPy dtype."""

  dtype: str
  shape: tuple[int, ...]
  slices: Callable[[], Iterable[np.ndarray]]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * BITS[self.dtype] // 8


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A hidden folder that becomes `path` when the block ends, and vanishes where it fails.

  Raises ConfigError where `path` exists, StorageError where it cannot be written.
  """
  path = pathlib.Path(path)
  if os.path.lexists(path):
    raise ConfigError(f"{path} exists already and is never overwritten: choose another folder")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part-{secrets.token_hex(4)}")
    part.mkdir()
  except OSError as error:
    raise StorageError(f"{path} cannot be written: {error.strerror}") from None
  try:
    yield part
    sync_directory(part)
    part.rename(path)
    sync_directory(path.parent)
  except OSError as error:
    raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error
  finally:
    shutil.rmtree(part, ignore_errors=True)


def dumps(value: Any) -> str:
  """JSON as this project writes it into such folders."""
  return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_text(path: pathlib.Path, text: str) -> None:
  """A text file, synced."""
  with open(path, "w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def write_tensors(
  folder: pathlib.Path,
  tensors: Mapping[str, Source],
  shard_bytes: int = SHARD_BYTES,
  written: Callable[[int], object] = lambda count: None,
) -> None:
  """`model-0000i-of-0000n.safetensors` and their index, in the given order of tensors.

  A file takes tensors up to `shard_bytes` of data; a tensor that is larger has one for itself.
  `written` is told how many bytes each slice had.

  Raises StorageError where there is no room for them, ValueError where a source yields another
  shape or dtype than it said.
  """
  if shard_bytes < 1:
    raise ConfigError(f"shard_bytes={shard_bytes} must be positive")
  total, free = sum(source.nbytes for source in tensors.values()), shutil.disk_usage(folder).free
  if total > free:
    raise StorageError(f"{folder.parent} has {free:,} bytes free: {total:,} do not fit")
  shards = _shards(tensors, shard_bytes)
  file_of = {}
  for i, names in enumerate(shards, 1):
    file = f"model-{i:05}-of-{len(shards):05}.safetensors"
    _write_file(folder / file, {name: tensors[name] for name in names}, written)
    file_of |= dict.fromkeys(names, file)
  write_text(folder / INDEX, dumps({"metadata": {"total_size": total}, "weight_map": file_of}))


def _shards(tensors: Mapping[str, Source], limit: int) -> list[list[str]]:
  shards: list[list[str]] = []
  room = 0
  for name, source in tensors.items():
    if not shards or source.nbytes > room:
      shards.append([])
      room = limit
    shards[-1].append(name)
    room -= source.nbytes
  return shards


def _write_file(
  path: pathlib.Path, tensors: Mapping[str, Source], written: Callable[[int], object]
) -> None:
  header, end = {"__metadata__": {"format": "np"}}, 0
  for name, source in tensors.items():
    offsets = [end, end + source.nbytes]
    header[name] = {"dtype": source.dtype, "shape": list(source.shape), "data_offsets": offsets}
    end = offsets[1]
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
  assert len(text) <= MAX_HEADER_BYTES, f"a header of {len(text):,} bytes"
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for name, source in tensors.items():
      _write_slices(file, name, source, written)
    file.flush()
    os.fsync(file.fileno())
  with safetensors.safe_open(path, "np") as opened:  # its header is what others will read
    assert set(opened.keys()) == set(tensors), f"{path} is not what was to be written"


def _write_slices(
  file: BinaryIO, name: str, source: Source, written: Callable[[int], object]
) -> None:
  done = 0
  for array in source.slices():
    if array.dtype != NUMPY[source.dtype] or array.shape[1:] != source.shape[1:]:
      raise ValueError(f"{name}: a slice {array.dtype}{list(array.shape)} of {source[:2]}")
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    done += array.nbytes
    written(array.nbytes)
  if done != source.nbytes:
    raise ValueError(f"{name}: {done:,} bytes in slices, {source.nbytes:,} in {source[:2]}")


def ranges(rows: int, row_bytes: int, most: int = SLICE_BYTES) -> Iterator[tuple[int, int]]:
  """[start, stop) over `rows`, of at most `most` bytes each (one row at least)."""
  step = max(1, most // max(1, row_bytes))
  for start in range(0, rows, step):
    yield start, min(rows, start + step)
