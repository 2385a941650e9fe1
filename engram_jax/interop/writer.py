"""Writes a checkpoint folder as a stream: nothing larger than one slice is held in memory.

The folder appears under its name when it is complete, and never before: files are written into a
hidden folder beside it and synced, and that folder is renamed. The `safetensors` library can write
only arrays in memory; here it opens every file, as a check, before the folder gets its name.

Local letter: n, entries of one slice.
"""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import secrets
import shutil
import struct
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors

from engram_jax.core.manifest import sync_directory
from engram_jax.errors import ConfigError, StorageError
from engram_jax.interop.folder import INDEX
from engram_jax.interop.safetensors import DTYPE_BITS, MAX_HEADER_BYTES, NUMPY_DTYPES

SHARD_BYTES = 5_000_000_000
SLICE_BYTES = 64 << 20


class StreamedTensor(NamedTuple):
  """A tensor to write.

  Attributes:
    dtype: as safetensors name it.
    slices: yields the tensor's entries in order, arrays [n, *shape[1:]] of its NumPy dtype.
  """

  dtype: str
  shape: tuple[int, ...]
  slices: Callable[[], Iterable[np.ndarray]]

  @property
  def nbytes(self) -> int:
    """Bytes of the tensor in its file."""
    return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Generator[pathlib.Path]:
  """A hidden folder that becomes `path` when the `with` ends, and is removed where it fails.

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


def dump_json(value: Any) -> str:
  """The JSON text of a value, indented, for a file of a checkpoint folder."""
  return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_text(path: pathlib.Path, text: str) -> str:
  """Writes a text file and syncs it; returns its SHA-256 (hex)."""
  data = text.encode()
  with open(path, "wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
  return hashlib.sha256(data).hexdigest()


def write_tensors(
  folder: pathlib.Path,
  tensors: Mapping[str, StreamedTensor],
  shard_bytes: int = SHARD_BYTES,
  on_bytes_written: Callable[[int], object] = lambda count: None,
) -> dict[str, str]:
  """Writes tensors, in order, to `model-0000i-of-0000k.safetensors` files and their index; returns
  the SHA-256 (hex) of each file by its name.

  Args:
    folder: an existing folder, from `new_folder`.
    tensors: by name.
    shard_bytes: a file takes tensors up to so many; a larger tensor has a file for itself.
    on_bytes_written: called with the bytes of each slice.

  Raises StorageError where the disk has no room for them, ValueError where a tensor's slices have
  another shape or dtype than its own.
  """
  if shard_bytes < 1:
    raise ConfigError(f"shard_bytes={shard_bytes} must be positive")
  total = sum(tensor.nbytes for tensor in tensors.values())
  free = shutil.disk_usage(folder).free
  if total > free:
    raise StorageError(f"{folder.parent} has {free:,} bytes free: {total:,} do not fit")
  shards = _shards(tensors, shard_bytes)
  file_of, digests = {}, {}
  for i, names in enumerate(shards, 1):
    file = f"model-{i:05}-of-{len(shards):05}.safetensors"
    in_file = {name: tensors[name] for name in names}
    digests[file] = _write_file(folder / file, in_file, on_bytes_written)
    file_of |= dict.fromkeys(names, file)
  index = dump_json({"metadata": {"total_size": total}, "weight_map": file_of})
  return digests | {INDEX: write_text(folder / INDEX, index)}


def _shards(tensors: Mapping[str, StreamedTensor], limit: int) -> list[list[str]]:
  shards: list[list[str]] = []
  room = 0
  for name, tensor in tensors.items():
    if not shards or tensor.nbytes > room:
      shards.append([])
      room = limit
    shards[-1].append(name)
    room -= tensor.nbytes
  return shards


def _write_file(
  path: pathlib.Path,
  tensors: Mapping[str, StreamedTensor],
  on_bytes_written: Callable[[int], object],
) -> str:
  """Writes and syncs one file; returns its SHA-256 (hex)."""
  header: dict[str, Any] = {"__metadata__": {"format": "np"}}
  end = 0
  for name, tensor in tensors.items():
    offsets = [end, end + tensor.nbytes]
    header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    end = offsets[1]
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
  assert len(text) <= MAX_HEADER_BYTES, f"a header of {len(text):,} bytes"
  digest = hashlib.sha256()
  with open(path, "wb") as file:

    def write(data: bytes | memoryview) -> None:
      file.write(data)
      digest.update(data)

    write(struct.pack("<Q", len(text)) + text)
    for name, tensor in tensors.items():
      _write_slices(write, name, tensor, on_bytes_written)
    file.flush()
    os.fsync(file.fileno())
  with safetensors.safe_open(path, "np") as opened:
    assert set(opened.keys()) == set(tensors), f"{path} holds other tensors than were written"
  return digest.hexdigest()


def _write_slices(
  write: Callable[[memoryview], object],
  name: str,
  tensor: StreamedTensor,
  on_bytes_written: Callable[[int], object],
) -> None:
  done = 0
  for array in tensor.slices():
    if array.dtype != NUMPY_DTYPES[tensor.dtype] or array.shape[1:] != tensor.shape[1:]:
      raise ValueError(f"{name}: a slice {array.dtype}{list(array.shape)} of {tensor[:2]}")
    write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    done += array.nbytes
    on_bytes_written(array.nbytes)
  if done != tensor.nbytes:
    raise ValueError(f"{name}: {done:,} bytes in slices, {tensor.nbytes:,} in {tensor[:2]}")


def sliced_tensor(
  dtype: str, shape: tuple[int, ...], read: Callable[..., np.ndarray]
) -> StreamedTensor:
  """A tensor that is written slice by slice, each `read(start, stop)`; a scalar is `read()`."""
  row_bytes = math.prod(shape[1:]) * DTYPE_BITS[dtype] // 8

  def slices() -> Iterator[np.ndarray]:
    if not shape:
      yield read()
      return
    for start, stop in slice_ranges(shape[0], row_bytes):
      yield read(start, stop)

  return StreamedTensor(dtype, shape, slices)


def slice_ranges(
  count: int, entry_bytes: int, max_bytes: int = SLICE_BYTES
) -> Iterator[tuple[int, int]]:
  """Yields ranges [start, stop) over `count` entries, each of at most `max_bytes` or one entry."""
  step = max(1, max_bytes // max(1, entry_bytes))
  for start in range(0, count, step):
    yield start, min(count, start + step)
