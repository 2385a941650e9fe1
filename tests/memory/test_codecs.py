"""Row encodings: what they keep, exactly where they can, and bytes that others read alike."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engram_jax.memory.codecs import KINDS, decode, encode, pack, row_bytes, unpack

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SMALL = st.floats(-1000, 1000, width=32)
SHAPES = st.tuples(st.integers(1, 4), st.sampled_from([1, 5, 31, 32, 33, 64, 80]))
ROWS = SHAPES.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=FLOATS | SMALL))
reproducible = settings(deadline=None, derandomize=True, database=None)
BLOCK = 32


def e4m3(byte: int) -> float:
  """The value of an E4M3 byte, from its definition (OCP 8-bit floating point, revision 1.0)."""
  sign, exponent, mantissa = -1 if byte >> 7 else 1, byte >> 3 & 15, byte & 7
  if exponent == 15 and mantissa == 7:
    return math.nan
  if exponent == 0:
    return sign * mantissa * 2.0**-9
  return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def dequantised(packed_row: bytes, width: int) -> list[float]:
  """A row of V4.1's format from its bytes alone, in double precision."""
  scales = packed_row[width:]
  return [e4m3(packed_row[c]) * 2.0 ** (scales[c // BLOCK] - 127) for c in range(width)]


def by_block(row: np.ndarray) -> list[np.ndarray]:
  return [row[c : c + BLOCK] for c in range(0, len(row), BLOCK)]


def back(rows: np.ndarray, kind: str) -> np.ndarray:
  return decode(*encode(rows, kind), kind)


def normal(shape: tuple[int, ...], std: float = 1.0) -> np.ndarray:
  return np.random.default_rng(0).normal(0, std, shape).astype(np.float32)


@pytest.mark.parametrize(
  ("kind", "width", "size"),
  [
    ("fp8_e4m3", 256, 264),  # DeepSeek-V4.1's
    ("fp8_e4m3", 80, 83),
    ("fp8_e4m3", 1, 2),
    ("int8", 80, 84),
    ("bf16", 80, 160),
    ("f32", 80, 320),
  ],
)
def test_bytes_of_a_row(kind, width, size):
  assert row_bytes(kind, width) == size
  assert pack(*encode(normal((3, width)), kind)).shape == (3, size)


@reproducible
@given(ROWS)
def test_f32_is_kept_bit_for_bit(rows):
  assert np.array_equal(back(rows, "f32").view(np.uint32), rows.view(np.uint32))


@reproducible
@given(ROWS)
def test_bf16_keeps_eight_bits_of_each_number_and_stays_finite(rows):
  step = np.maximum(np.abs(rows.astype(np.float64)) * 2.0**-8, 2.0**-134)
  assert np.isfinite(back(rows, "bf16")).all()
  largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
  inside = np.abs(rows) <= largest
  assert (np.abs(back(rows, "bf16").astype(np.float64) - rows) <= step)[inside].all()
  assert (np.abs(back(rows, "bf16")) == np.float32(largest))[~inside].all()


@reproducible
@given(ROWS)
def test_int8_is_within_half_a_step_of_the_rows_largest(rows):
  got, wide = back(rows, "int8").astype(np.float64), rows.astype(np.float64)
  step = np.maximum(np.abs(wide).max(axis=1, keepdims=True) / 127, np.finfo(np.float32).tiny)
  assert np.isfinite(got).all()
  assert (np.abs(got - wide) <= step * (0.5 + 1e-4)).all()


@reproducible
@given(ROWS)
def test_fp8_is_the_nearest_number_of_its_block(rows):
  """By search over all 256 bytes, at a scale that is the smallest at which nothing saturates."""
  values, scales = encode(rows, "fp8_e4m3")
  numbers = np.array([e4m3(b) for b in range(256) if not math.isnan(e4m3(b))])
  end = np.finfo(np.float32).max
  got = decode(values, scales, "fp8_e4m3").astype(np.float64)
  for row, out, exponents in zip(rows, got, scales.view(np.uint8), strict=True):
    for block, found, byte in zip(by_block(row), by_block(out), exponents, strict=True):
      scale, largest = 2.0 ** (int(byte) - 127), np.abs(block.astype(np.float64)).max()
      assert largest <= 448 * scale
      assert byte == 0 or largest > 448 * scale / 2 or (largest == 0 and scale == 1)
      finite = scale * numbers[scale * np.abs(numbers) <= end]
      distance = np.abs(block[:, None].astype(np.float64) - finite).min(axis=1)
      assert np.array_equal(np.abs(found - block.astype(np.float64)), distance)


@reproducible
@given(ROWS)
def test_bytes_read_by_their_definition_give_the_same_rows(rows):
  packed = pack(*encode(rows, "fp8_e4m3"))
  read = [dequantised(row.tobytes(), rows.shape[1]) for row in packed]
  assert np.array_equal(np.array(read), back(rows, "fp8_e4m3").astype(np.float64))


@reproducible
@given(ROWS, st.sampled_from(KINDS))
def test_encoding_what_was_decoded_changes_nothing(rows, kind):
  once = back(rows, kind)
  again = back(once, kind)
  if kind == "int8":  # its scale is no power of two
    assert np.allclose(again, once, rtol=1e-6, atol=0)
  else:
    assert np.array_equal(again, once)


@reproducible
@given(ROWS, st.sampled_from(KINDS))
def test_packed_rows_come_apart_as_they_were(rows, kind):
  values, scales = encode(rows, kind)
  packed = pack(values, scales)
  again, scales_again = unpack(packed, kind, rows.shape[1])
  assert again.tobytes() == values.tobytes()
  assert (scales is None) == (scales_again is None)
  assert np.array_equal(decode(again, scales_again, kind), decode(values, scales, kind))


@reproducible
@given(SHAPES, st.integers(-100, 100))
def test_fp8_keeps_what_fits_three_bits_of_mantissa_at_any_power_of_two(shape, exponent):
  numbers = np.array([0, 1, -1, 1.125, 1.875, -3.5, 448, -416, 2**-6, 2**-9], np.float32)
  rows = np.ldexp(np.resize(numbers, shape), exponent)
  assert np.array_equal(back(rows, "fp8_e4m3"), rows)


def test_scales_are_powers_of_two_and_shared_by_32_columns():
  rows = np.zeros((1, 80), np.float32)
  rows[0, [0, 40, 79]] = [448, 449, 2.0**-20]
  _, scales = encode(rows, "fp8_e4m3")
  assert scales.astype(np.float32).tolist() == [[1.0, 2.0, 2.0**-28]]


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_signs_stay_signs(kind):
  assert np.array_equal(back(np.zeros((2, 40), np.float32), kind), np.zeros((2, 40)))
  rows = normal((8, 40))
  got = back(rows, kind)
  assert ((got == 0) | (np.sign(got) == np.sign(rows))).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [3.4028235e38, 1.2e-38, 1e-41, 1.4e-45])
def test_the_ends_of_float32_are_encoded(kind, size):
  rows = np.array([[size, -size, 0, size]], np.float32)
  got = back(rows, kind)
  assert np.isfinite(got).all()
  below = {"f32": 0, "bf16": 2.0**-134, "int8": 2.0**-127, "fp8_e4m3": 2.0**-137}  # half a last bit
  step = max(size / 8, below[kind])
  assert np.abs(got.astype(np.float64) - rows.astype(np.float64)).max() <= step


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_none_are_refused_with_their_place(kind, bad):
  rows = np.zeros((4, 8), np.float32)
  rows[2, 5] = bad
  with pytest.raises(ValueError, match=rf"row 2, column 5 is {bad}"):
    encode(rows, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_are_no_rows(kind):
  packed = pack(*encode(np.zeros((0, 70), np.float32), kind))
  assert packed.shape == (0, row_bytes(kind, 70))
  assert decode(*unpack(packed, kind, 70), kind).shape == (0, 70)


def test_every_byte_is_decoded_as_defined():
  values = np.arange(256, dtype=np.uint8).reshape(8, 32)
  scales = np.full((8, 1), 127, np.uint8)
  wanted = np.array([e4m3(b) for b in range(256)]).reshape(8, 32)
  assert np.array_equal(decode(values, scales, "fp8_e4m3"), wanted, equal_nan=True)


def test_bytes_are_taken_where_values_have_one():
  values, scales = encode(normal((3, 64)), "fp8_e4m3")
  got = decode(values.view(np.uint8), scales.view(np.uint8), "fp8_e4m3")
  assert np.array_equal(got, decode(values, scales, "fp8_e4m3"))


def test_what_does_not_fit_is_refused():
  values, scales = encode(normal((3, 64)), "fp8_e4m3")
  with pytest.raises(ValueError, match="no row encoding 'fp4'"):
    row_bytes("fp4", 64)
  with pytest.raises(ValueError, match="float64"):
    encode(np.zeros((2, 4)), "int8")
  with pytest.raises(ValueError, match=r"\[3, 2\], not \[3, 1\]"):
    decode(values, scales[:, :1], "fp8_e4m3")
  with pytest.raises(ValueError, match="scales are missing"):
    decode(values, None, "fp8_e4m3")
  with pytest.raises(ValueError, match=r"\[U, 66\], not uint8 \[3, 65\]"):
    unpack(np.zeros((3, 65), np.uint8), "fp8_e4m3", 64)


def test_fp8_of_gaussian_rows_errs_by_a_few_percent():
  rows = normal((256, 256), 0.02)
  error = np.linalg.norm(back(rows, "fp8_e4m3") - rows) / np.linalg.norm(rows)
  assert 0.02 < error < 0.03
  assert np.linalg.norm(back(rows, "int8") - rows) / np.linalg.norm(rows) < 0.01
