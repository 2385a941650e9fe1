"""One safetensors file, read by byte ranges.

A file is eight bytes (the header's length, little-endian), a JSON header that gives each tensor's
dtype, shape and byte range, and the bytes. The `safetensors` library opens such files too, but its
NumPy half has no FP8 and it hands out whole slices of the first axis, not rows by id; tests hold
the two equal on what both can read.

Nothing here trusts the file: the header's length is bounded before it is read, and every range is
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

from engram_jax.errors import StorageError

MAX_AXES = 32  # more than any model has, and all NumPy 1 can
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8}
BITS |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
BITS |= dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
BITS |= dict.fromkeys(("I32", "U32", "F32"), 32) | dict.fromkeys(("I64", "U64", "F64", "C64"), 64)
NUMPY = {
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "BOOL": np.dtype(bool),
}
NUMPY |= {f"{kind}{8 * n}": np.dtype(f"<{kind.lower()}{n}") for kind in "IU" for n in (1, 2, 4, 8)}
NUMPY |= {f"F{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)}
_ROWS_AT_ONCE = 256  # that one thread reads in turn
_THREADS = 32
NAMES = {dtype: name for name, dtype in NUMPY.items()}


class Tensor(NamedTuple):
  """What a header says of a tensor; `begin` and `end` are offsets in the file."""

  dtype: str
  shape: tuple[int, ...]
  begin: int
  end: int

  @property
  def row_bytes(self) -> int:
    """Bytes of one entry of the leading axis."""
    return math.prod(self.shape[1:]) * BITS[self.dtype] // 8


class TensorFile:
  """An open file; only what is asked for is read. Close it, or use it as a context manager.

  Attributes:
    tensors: by name, in the header's order.
    metadata: the header's `__metadata__`, strings by string.
    bytes_read: so far, header included.

  Raises StorageError, naming the file, where it is missing, truncated or no safetensors file.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self.bytes_read = 0
    try:
      self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
      raise StorageError(f"{self.path} cannot be opened: {error.strerror}") from None
    try:
      self.size = os.fstat(self._file).st_size
      self.tensors, self.metadata = self._header()
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> "TensorFile":
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def close(self) -> None:
    if self._file is not None:
      os.close(self._file)
    self._file = None

  def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Entries [start, stop) of a tensor's leading axis; all of it, of a scalar too, if left out.

    Raises ValueError for a range outside the tensor, StorageError for what cannot be read.
    """
    tensor, dtype = self._readable(name)
    if not tensor.shape:
      return self._at(tensor.begin, (), dtype)
    stop = tensor.shape[0] if stop is None else stop
    if not 0 <= start <= stop <= tensor.shape[0]:
      raise ValueError(f"{name}[{start}:{stop}] is outside its {tensor.shape[0]} entries")
    offset = tensor.begin + start * tensor.row_bytes
    return self._at(offset, (stop - start, *tensor.shape[1:]), dtype)

  def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
    """Entries of the leading axis by id, [*ids.shape, *shape[1:]]; each distinct id is read once.

    Raises ValueError naming an id outside the tensor.
    """
    tensor, dtype = self._readable(name)
    distinct, inverse = np.unique(ids, return_inverse=True)
    for i in (distinct[:1], distinct[-1:]):
      if i.size and not 0 <= i[0] < tensor.shape[0]:
        raise ValueError(f"{name} has no row {i[0]}: 0 to {tensor.shape[0] - 1}")
    out = np.empty((distinct.size, *tensor.shape[1:]), dtype)
    flat = out.view(np.uint8).reshape(distinct.size, tensor.row_bytes)

    def fill(part: slice) -> None:
      for row, i in zip(flat[part], distinct[part].tolist(), strict=True):
        self._fill(memoryview(row), tensor.begin + i * tensor.row_bytes)

    parts = [slice(at, at + _ROWS_AT_ONCE) for at in range(0, distinct.size, _ROWS_AT_ONCE)]
    if len(parts) > 1:  # a disk serves scattered reads faster when many wait for it
      with concurrent.futures.ThreadPoolExecutor(min(_THREADS, len(parts))) as threads:
        list(threads.map(fill, parts))
    elif parts:
      fill(parts[0])
    self.bytes_read += flat.size
    return out[inverse.reshape(np.shape(ids))]

  def _readable(self, name: str) -> tuple[Tensor, np.dtype]:
    if name not in self.tensors:
      raise StorageError(f"{self.path} holds no tensor {name!r}")
    tensor = self.tensors[name]
    if tensor.dtype not in NUMPY:
      raise ValueError(f"{name} is {tensor.dtype}, which has no NumPy dtype")
    return tensor, NUMPY[tensor.dtype]

  def _at(self, offset: int, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    out = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    self._fill(memoryview(out), offset)
    self.bytes_read += out.size
    return out.view(dtype).reshape(shape)

  def _fill(self, buffer: memoryview, offset: int) -> None:
    """Reads until the buffer is full: one call returns at most 2 GiB."""
    done = 0
    while done < len(buffer):
      try:
        count = os.preadv(self._file, [buffer[done:]], offset + done)
      except OSError as error:
        raise StorageError(f"{self.path} cannot be read: {error.strerror}") from None
      if count == 0:
        raise StorageError(f"{self.path} ends at byte {offset + done}: it was cut while in use")
      done += count

  def _header(self) -> tuple[dict[str, Tensor], dict[str, str]]:
    if self.size < 8:
      raise StorageError(f"{self.path} has {self.size} bytes: no safetensors file")
    length = struct.unpack("<Q", self._at(0, (8,), np.dtype(np.uint8)).tobytes())[0]
    if length > MAX_HEADER_BYTES:
      raise StorageError(
        f"{self.path} claims a header of {length:,} bytes: at most {MAX_HEADER_BYTES:,}"
      )
    if 8 + length > self.size:
      raise StorageError(
        f"{self.path} is truncated: {self.size:,} bytes, its header alone takes {8 + length:,}"
      )
    text = self._at(8, (length,), np.dtype(np.uint8)).tobytes()
    header = parse_object(text, f"{self.path}: the header")
    metadata = header.pop("__metadata__", {})
    strings = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not strings:
      raise StorageError(f"{self.path}: __metadata__ must be strings by string")
    tensors = {name: self._tensor(name, entry, 8 + length) for name, entry in header.items()}
    self._check_ranges(tensors, 8 + length)
    return tensors, metadata

  def _tensor(self, name: str, entry: Any, data: int) -> Tensor:
    def whole(numbers: Any) -> bool:
      return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)

    fields = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or entry.keys() != fields:
      raise StorageError(f"{self.path}: {name!r} must have dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
      raise StorageError(f"{self.path}: {name!r} has dtype {dtype!r}: none of {', '.join(BITS)}")
    if not whole(shape) or not whole(offsets) or len(offsets) != 2:
      raise StorageError(
        f"{self.path}: {name!r} has shape {_short(shape)} and data_offsets {_short(offsets)}: "
        "not lists of whole numbers below 2^63"
      )
    if len(shape) > MAX_AXES:
      raise StorageError(f"{self.path}: {name!r} has {len(shape)} axes: at most {MAX_AXES}")
    begin, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (end - begin):
      raise StorageError(
        f"{self.path}: {name!r} is {dtype}{shape}, {bits // 8:,} bytes, but its data_offsets "
        f"{offsets} hold {end - begin:,}"
      )
    return Tensor(dtype, tuple(shape), data + begin, data + end)

  def _check_ranges(self, tensors: dict[str, Tensor], data: int) -> None:
    """The tensors cover everything after the header, once."""
    end = data
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
      if tensor.begin != end:
        what = "overlaps the tensor before it" if tensor.begin < end else "leaves a gap before it"
        raise StorageError(
          f"{self.path}: {name!r} {what}: it begins at byte {tensor.begin:,}, not {end:,}"
        )
      end = tensor.end
    if end != self.size:
      what = "is truncated" if end > self.size else "goes on after its last tensor"
      raise StorageError(f"{self.path} {what}: {self.size:,} bytes, its header says {end:,}")


def _short(value: Any) -> str:
  """For a message: a file may hold very much of anything."""
  text = repr(value)
  return text if len(text) < 200 else f"{text[:200]}..."


def parse_object(text: bytes, what: str) -> dict[str, Any]:
  """A JSON object whose keys stand once; StorageError saying what is wrong with it otherwise."""

  def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
      seen = set()
      twice = next(name for name, _ in pairs if name in seen or seen.add(name))
      raise ValueError(f"key {twice!r} stands twice")
    return found

  try:
    found = json.loads(text.decode("utf-8"), object_pairs_hook=once)  # else it guesses UTF-16
  except (ValueError, RecursionError) as error:
    raise StorageError(f"{what} is not JSON: {error}") from None
  if not isinstance(found, dict):
    raise StorageError(f"{what} is a JSON {type(found).__name__}, not an object")
  return found
