"""Rows of a table in fewer bytes: bf16, int8 and FP8 with shared exponents. NumPy only.

    kind        values of a row          scales of a row                 bytes of a row
    f32         C float32                none                            4 C
    bf16        C bfloat16               none                            2 C
    int8        C int8                   one float32                     C + 4
    fp8_e4m3    C float8 E4M3            one E8M0 per 32 columns         C + ceil(C / 32)

`fp8_e4m3` is the format of DeepSeek-V4.1's tables: 264 bytes for C = 256. An E4M3 byte is a sign, 4
bits of exponent and 3 of mantissa, at most 448; an E8M0 byte e is the scale 2^(e - 127). Where 32
does not divide C the last block is shorter. A packed row is its values, then its scales, in
little-endian order and without padding.

Local letter: U, rows that are encoded or decoded.
"""

from typing import Literal, get_args

import ml_dtypes
import numpy as np

Kind = Literal["f32", "bf16", "int8", "fp8_e4m3"]
KINDS: tuple[str, ...] = get_args(Kind)
BLOCK = 32  # columns that share an E8M0 scale

_VALUES = {
  "f32": np.dtype("<f4"),
  "bf16": np.dtype(ml_dtypes.bfloat16),
  "int8": np.dtype(np.int8),
  "fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_SCALES = {"int8": np.dtype("<f4"), "fp8_e4m3": np.dtype(ml_dtypes.float8_e8m0fnu)}
_E4M3 = np.arange(256, dtype=np.uint8).view(_VALUES["fp8_e4m3"]).astype(np.float32)
_BF16_MAX = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
_F32 = np.finfo(np.float32)
_E8M0_BIAS = 127
_FP8_MAX = np.float32(1.875 * 2.0**127)  # what is nearer to 2^128 would be read as infinity
_INT8_MAX_SCALE = np.nextafter(_F32.max / 127, 0, dtype=np.float32)  # likewise, times 127


def row_bytes(kind: str, width: int) -> int:
  """Bytes of one packed row of `width` columns."""
  values, scales = _sizes(kind, width)
  return values + scales


def encode(rows_UC: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray | None]:
  """(values, scales) of float32 rows [U, C].

  - `bf16`: to nearest, ties to even; beyond the largest bfloat16, that.
  - `int8`: round(x / s) with s = max |x| / 127, no less than float32's smallest normal number.
  - `fp8_e4m3`: x / s to nearest, with s the smallest power of two at which no value of the block
    exceeds 448, no less than 2^-127, and 1 for a block of zeros. So nothing saturates, but for
    what is beyond 15/8 2^127, the largest float32 of so few bits.

  Returns values [U, C] in the kind's type, and scales: None, float32 [U, 1] or E8M0
  [U, ceil(C / 32)].

  Raises ValueError for an unknown kind, another type or shape, or a number that is not finite.
  """
  _require_kind(kind)
  rows_UC = np.asarray(rows_UC)
  if rows_UC.ndim != 2 or rows_UC.shape[1] == 0 or rows_UC.dtype != np.float32:
    raise ValueError(f"rows are float32 [U, C], not {rows_UC.dtype} of shape {rows_UC.shape}")
  if not np.isfinite(rows_UC).all():
    row, column = np.argwhere(~np.isfinite(rows_UC))[0].tolist()
    raise ValueError(f"row {row}, column {column} is {rows_UC[row, column]}: no number to encode")
  if kind == "f32":
    return rows_UC, None
  if kind == "bf16":
    return rows_UC.clip(-_BF16_MAX, _BF16_MAX).astype(_VALUES[kind]), None
  return _encode_int8(rows_UC) if kind == "int8" else _encode_fp8(rows_UC)


def decode(values: np.ndarray, scales: np.ndarray | None, kind: str) -> np.ndarray:
  """float32 [U, C] of what `encode` gave; values times scales, rounded once.

  Bytes (uint8) are taken for values and scales of one byte, as some readers hand them out.

  Raises ValueError for an unknown kind, or types and shapes that are not its.
  """
  _require_kind(kind)
  values = _viewed(values, _VALUES[kind], "values")
  U, C = values.shape
  if kind not in _SCALES:
    return values.astype(np.float32)
  scales = _viewed(scales, _SCALES[kind], "scales")
  if scales.shape != (U, _blocks(kind, C)):
    raise ValueError(f"scales of {U} rows are [{U}, {_blocks(kind, C)}], not {list(scales.shape)}")
  if kind == "int8":
    rows_UC = values.astype(np.float32)
    rows_UC *= scales
  else:
    rows_UC = np.take(_E4M3, values.view(np.uint8), mode="clip")  # 7 times as fast as astype
    _multiply_blocks(rows_UC, scales.astype(np.float32))
  return rows_UC


def pack(values: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
  """uint8 [U, row_bytes]: each row's values, then its scales."""
  parts = [values] if scales is None else [values, scales]
  return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], axis=1)


def unpack(packed: np.ndarray, kind: str, width: int) -> tuple[np.ndarray, np.ndarray | None]:
  """(values, scales) of packed rows uint8 [U, row_bytes], as views; ValueError on another shape."""
  size, more = _sizes(kind, width)
  if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != size + more:
    raise ValueError(
      f"packed {kind} rows of width {width} are uint8 [U, {size + more}], "
      f"not {packed.dtype} {list(packed.shape)}"
    )
  values = packed[:, :size].view(_VALUES[kind])
  return values, packed[:, size:].view(_SCALES[kind]) if more else None


def _encode_int8(rows_UC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  largest = np.abs(rows_UC).max(axis=1, keepdims=True)
  scales = np.clip(largest / np.float32(127), _F32.tiny, _INT8_MAX_SCALE)
  return np.rint(rows_UC / scales).clip(-127, 127).astype(np.int8), scales


def _encode_fp8(rows_UC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  starts = np.arange(0, rows_UC.shape[1], BLOCK)
  largest = np.maximum.reduceat(np.abs(rows_UC), starts, axis=1).clip(max=_FP8_MAX)
  # largest = m 2^e with m in [1/2, 1), and 448 = 7/8 2^9, so it fits from 2^(e - 9) on, or e - 8.
  m, e = np.frexp(largest)
  exponents = np.where(largest == 0, 0, np.maximum(e - 9 + (m > 0.875), -_E8M0_BIAS))
  rows_UC = rows_UC.clip(-_FP8_MAX, _FP8_MAX)
  _multiply_blocks(rows_UC, np.ldexp(np.float32(1), -exponents))
  values = rows_UC.astype(_VALUES["fp8_e4m3"])
  return values, (exponents + _E8M0_BIAS).astype(np.uint8).view(_SCALES["fp8_e4m3"])


def _multiply_blocks(rows_UC: np.ndarray, scales: np.ndarray) -> None:
  """Multiplies each block of columns by its number of `scales` [U, ceil(C / 32)], in place."""
  U, C = rows_UC.shape
  whole = C - C % BLOCK  # columns of blocks that are full
  blocks = rows_UC[:, :whole].reshape(U, whole // BLOCK, BLOCK)  # a view, as only C is divided
  blocks *= scales[:, : whole // BLOCK, None]
  rows_UC[:, whole:] *= scales[:, whole // BLOCK :]


def _blocks(kind: str, width: int) -> int:
  """Scales of a row."""
  return {"int8": 1, "fp8_e4m3": -(-width // BLOCK)}.get(kind, 0)


def _sizes(kind: str, width: int) -> tuple[int, int]:
  """Bytes of a row's values, and of its scales."""
  _require_kind(kind)
  if width < 1:
    raise ValueError(f"width={width} must be at least 1")
  scales = _blocks(kind, width) * _SCALES[kind].itemsize if kind in _SCALES else 0
  return width * _VALUES[kind].itemsize, scales


def _viewed(array: np.ndarray | None, dtype: np.dtype, what: str) -> np.ndarray:
  if array is None:
    raise ValueError(f"{what} are missing: {dtype} [U, C]")
  array = np.asarray(array)
  if array.dtype == np.uint8 and dtype.itemsize == 1:
    array = array.view(dtype)
  if array.dtype != dtype or array.ndim != 2:
    raise ValueError(f"{what} are {dtype} [U, C], not {array.dtype} {list(array.shape)}")
  return array


def _require_kind(kind: str) -> None:
  if kind not in KINDS:
    raise ValueError(f"no row encoding {kind!r}; there are {', '.join(KINDS)}")
