"""Reads one safetensors file by byte ranges.

A file is eight bytes (the header's length, little-endian), a JSON header that gives each tensor's
dtype, shape and byte range, and the bytes. The `safetensors` library opens such files too, but its
NumPy half has no FP8, and it reads slices of the first axis, not rows by id; tests compare the two
on what both can read.

The file is not trusted: the header's length is bounded before it is read, and every range is
checked against its shape, its neighbours and the file's size before anything is allocated.
"""

import concurrent.futures
import json
import math
import os
import pathlib
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from engram_jax.config.bounded import name_mistake_of
from engram_jax.errors import StorageError

MAX_AXES = 32  # the most of NumPy 1, and more than any model has
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
DTYPE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8}
DTYPE_BITS |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
DTYPE_BITS |= dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
DTYPE_BITS |= dict.fromkeys(("I32", "U32", "F32"), 32) | dict.fromkeys(
  ("I64", "U64", "F64", "C64"), 64
)
NUMPY_DTYPES = {
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "BOOL": np.dtype(bool),
}
NUMPY_DTYPES |= {
  f"{kind}{8 * n}": np.dtype(f"<{kind.lower()}{n}") for kind in "IU" for n in (1, 2, 4, 8)
}
NUMPY_DTYPES |= {f"F{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)}
_ROWS_PER_THREAD_TASK = 256
_THREADS = 32
DTYPE_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


class TensorInfo(NamedTuple):
  """The header's entry of a tensor; `begin` and `end` are byte offsets in the file."""

  dtype: str
  shape: tuple[int, ...]
  begin: int
  end: int

  @property
  def row_bytes(self) -> int:
    """Bytes of one entry of the leading axis."""
    return math.prod(self.shape[1:]) * DTYPE_BITS[self.dtype] // 8


class SafetensorsFile:
  """A file open for reading. Close it, or use it as a context manager.

  Attributes:
    tensors: by name, in the header's order.
    metadata: the header's `__metadata__`.
    bytes_read: so far, header included.

  Raises StorageError, naming the file, where it is missing, truncated or no safetensors file.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self.bytes_read = 0
    try:
      self._descriptor: int | None = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
      raise StorageError(f"{self.path} cannot be opened: {error.strerror}") from None
    try:
      self.size = os.fstat(self._descriptor).st_size
      self.tensors, self.metadata = self._read_header()
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> "SafetensorsFile":
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def close(self) -> None:
    """Closes the file; it may be closed already."""
    if self._descriptor is not None:
      os.close(self._descriptor)
    self._descriptor = None

  def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Reads entries [start, stop) of a tensor's leading axis; all of a tensor if left out.

    Raises ValueError for a range outside the tensor, StorageError for what cannot be read.
    """
    tensor, dtype = self._find(name)
    if not tensor.shape:
      return self._read_at(tensor.begin, (), dtype)
    stop = tensor.shape[0] if stop is None else stop
    if not 0 <= start <= stop <= tensor.shape[0]:
      raise ValueError(f"{name}[{start}:{stop}] is outside its {tensor.shape[0]} entries")
    offset = tensor.begin + start * tensor.row_bytes
    return self._read_at(offset, (stop - start, *tensor.shape[1:]), dtype)

  def read_rows(self, name: str, ids: np.ndarray) -> np.ndarray:
    """Reads entries of the leading axis by id, [*ids.shape, *shape[1:]], each distinct one once.

    Raises ValueError naming an id outside the tensor.
    """
    tensor, dtype = self._find(name)
    distinct, inverse = np.unique(ids, return_inverse=True)
    for i in (distinct[:1], distinct[-1:]):
      if i.size and not 0 <= i[0] < tensor.shape[0]:
        raise ValueError(f"{name} has no row {i[0]}: 0 to {tensor.shape[0] - 1}")
    rows = np.empty((distinct.size, *tensor.shape[1:]), dtype)
    row_bytes = rows.view(np.uint8).reshape(distinct.size, tensor.row_bytes)

    def read_task(start: int) -> None:
      task = slice(start, start + _ROWS_PER_THREAD_TASK)
      for row, i in zip(row_bytes[task], distinct[task].tolist(), strict=True):
        self._fill(row, tensor.begin + i * tensor.row_bytes)

    starts = range(0, distinct.size, _ROWS_PER_THREAD_TASK)
    if len(starts) > 1:  # a disk serves scattered reads faster when many are in flight
      with concurrent.futures.ThreadPoolExecutor(min(_THREADS, len(starts))) as threads:
        list(threads.map(read_task, starts))
    elif starts:
      read_task(0)
    self.bytes_read += row_bytes.size
    return rows[inverse.reshape(np.shape(ids))]

  def _find(self, name: str) -> tuple[TensorInfo, np.dtype]:
    if name not in self.tensors:
      raise StorageError(f"{self.path} holds no tensor {name!r}")
    tensor = self.tensors[name]
    if tensor.dtype not in NUMPY_DTYPES:
      raise ValueError(f"{name} is {tensor.dtype}, which has no NumPy dtype")
    return tensor, NUMPY_DTYPES[tensor.dtype]

  def _read_at(self, offset: int, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    out = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    self._fill(out, offset)
    self.bytes_read += out.size
    return out.view(dtype).reshape(shape)

  def _fill(self, out: np.ndarray, offset: int) -> None:
    """Reads uint8 `out` from the file; a loop, because one call reads at most 2 GiB."""
    assert self._descriptor is not None, "the file is closed"
    buffer, done = out.data, 0
    while done < len(buffer):
      try:
        count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
      except OSError as error:
        raise StorageError(f"{self.path} cannot be read: {error.strerror}") from None
      if count == 0:
        raise StorageError(f"{self.path} ends at byte {offset + done}: it was cut while in use")
      done += count

  def _read_header(self) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    if self.size < 8:
      raise StorageError(f"{self.path} has {self.size} bytes: no safetensors file")
    length = struct.unpack("<Q", self._read_at(0, (8,), np.dtype(np.uint8)).tobytes())[0]
    if length > MAX_HEADER_BYTES:
      if mistake := name_mistake_of(self.path):
        raise StorageError(f"{self.path} {mistake}: no safetensors file")
      raise StorageError(
        f"{self.path} claims a header of {length:,} bytes: at most {MAX_HEADER_BYTES:,}"
      )
    if 8 + length > self.size:
      raise StorageError(
        f"{self.path} is truncated: {self.size:,} bytes, its header alone takes {8 + length:,}"
      )
    text = self._read_at(8, (length,), np.dtype(np.uint8)).tobytes()
    header = parse_object(text, f"{self.path}: the header")
    metadata = header.pop("__metadata__", {})
    is_valid = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not is_valid:
      raise StorageError(f"{self.path}: __metadata__ must be strings by string")
    tensors = {name: self._parse_entry(name, entry, 8 + length) for name, entry in header.items()}
    self._check_ranges(tensors, 8 + length)
    return tensors, metadata

  def _parse_entry(self, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
      raise StorageError(f"{self.path}: {name!r} must have dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
      raise StorageError(
        f"{self.path}: {name!r} has dtype {dtype!r}: none of {', '.join(DTYPE_BITS)}"
      )
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
      raise StorageError(
        f"{self.path}: {name!r} has shape {_short(shape)} and data_offsets {_short(offsets)}: "
        "not lists of whole numbers below 2^63"
      )
    if len(shape) > MAX_AXES:
      raise StorageError(f"{self.path}: {name!r} has {len(shape)} axes: at most {MAX_AXES}")
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
      raise StorageError(
        f"{self.path}: {name!r} is {dtype}{shape}, {bits // 8:,} bytes, but its data_offsets "
        f"{offsets} hold {end - begin:,}"
      )
    return TensorInfo(dtype, tuple(shape), data_start + begin, data_start + end)

  def _check_ranges(self, tensors: dict[str, TensorInfo], data_start: int) -> None:
    """Raises StorageError unless the tensors cover everything after the header, once."""
    end = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
      if tensor.begin != end:
        fault = "overlaps the tensor before it" if tensor.begin < end else "leaves a gap before it"
        raise StorageError(
          f"{self.path}: {name!r} {fault}: it begins at byte {tensor.begin:,}, not {end:,}"
        )
      end = tensor.end
    if end != self.size:
      fault = "is truncated" if end > self.size else "goes on after its last tensor"
      raise StorageError(f"{self.path} {fault}: {self.size:,} bytes, its header says {end:,}")


def _are_sizes(value: Any) -> bool:
  return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _short(value: Any) -> str:
  """The first 200 characters of a value from a file, for a message."""
  text = repr(value)
  return text if len(text) < 200 else f"{text[:200]}..."


def parse_object(text: bytes, where: str) -> dict[str, Any]:
  """Parses a JSON object; StorageError where it is none or a key stands twice.

  where: begins the message.
  """

  def require_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for name, value in pairs:
      if name in parsed:
        raise ValueError(f"key {name!r} stands twice")
      parsed[name] = value
    return parsed

  try:  # decoded here, as json.loads would guess UTF-16
    tree = json.loads(text.decode("utf-8"), object_pairs_hook=require_unique)
  except (ValueError, RecursionError) as error:
    raise StorageError(f"{where} is not JSON: {error}") from None
  if not isinstance(tree, dict):
    raise StorageError(f"{where} is a JSON {type(tree).__name__}, not an object")
  return tree
