"""Safetensors files by ranges: equal to the library's reading, and unmoved by any bytes."""

import json
import struct
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import Raw, fp8, header_of, numbers, write_file

from engram_jax.errors import StorageError
from engram_jax.interop.safetensors import MAX_HEADER_BYTES, SafetensorsFile

ARRAYS = {
  "scalar": np.array(3.5, np.float32),
  "empty": np.zeros((0, 4), np.float32),
  "f16": np.arange(6, dtype=np.float16).reshape(2, 3),
  "i64": np.array([2**62 + 1, -5]),
  "bool": np.array([True, False]),
  "u8": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  path = tmp_path_factory.mktemp("file") / "x.safetensors"
  safetensors.numpy.save_file(ARRAYS, path, metadata={"format": "np"})
  return path


def test_reads_what_the_library_wrote(written):
  with SafetensorsFile(written) as file:
    assert file.metadata == {"format": "np"}
    assert set(file.tensors) == set(ARRAYS)
    for name, array in ARRAYS.items():
      found = file.read(name)
      assert found.dtype == array.dtype
      np.testing.assert_array_equal(found, array)


def test_slices_and_rows_are_those_of_the_array(written):
  with SafetensorsFile(written) as file:
    u8 = ARRAYS["u8"]
    np.testing.assert_array_equal(file.read("u8", 1, 2), u8[1:2])
    ids = np.array([[1, 0], [1, 1]])
    np.testing.assert_array_equal(file.read_rows("u8", ids), u8[ids])
    assert file.read_rows("u8", np.zeros((0, 2), int)).shape == (0, 2, 3, 4)
    for bad in (-1, 2):
      with pytest.raises(ValueError, match=f"no row {bad}"):
        file.read_rows("u8", np.array([0, bad]))
    with pytest.raises(ValueError, match="outside"):
      file.read("u8", 1, 3)


def test_a_row_costs_its_bytes_and_no_more(tmp_path):
  rng = np.random.default_rng(0)
  table = fp8(rng, (1000, 32))
  write_file(tmp_path / "x.safetensors", header_of({"t": table}), table.data)
  with SafetensorsFile(tmp_path / "x.safetensors") as file:
    before = file.bytes_read
    found = file.read_rows("t", np.array([7, 999, 7, 7]))
    assert file.bytes_read - before == 2 * 32
    np.testing.assert_array_equal(found.astype(np.float32), numbers(table)[[7, 999, 7, 7]])


def test_every_fp8_byte_means_what_its_bits_say(tmp_path):
  codes = bytes(range(256))
  tensors = {"a": Raw("F8_E4M3", (256,), codes), "b": Raw("F8_E8M0", (255,), codes[:255])}
  write_file(tmp_path / "x.safetensors", header_of(tensors), codes + codes[:255])
  with SafetensorsFile(tmp_path / "x.safetensors") as file:
    found = file.read("a").astype(np.float32)
    nan = np.isin(np.arange(256), [0x7F, 0xFF])
    assert np.isnan(found[nan]).all()
    np.testing.assert_array_equal(found[~nan], numbers(tensors["a"])[~nan])
    assert file.read("b").dtype == ml_dtypes.float8_e8m0fnu
    np.testing.assert_array_equal(file.read("b").astype(np.float32), numbers(tensors["b"]))


GOOD = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
B = {"dtype": "U8", "shape": [4], "data_offsets": [16, 20]}


@pytest.mark.parametrize(
  ("header", "size", "said"),
  [
    (GOOD, 15, "is truncated: "),
    (GOOD, 17, "goes on after its last tensor"),
    (GOOD | {"b": B | {"data_offsets": [12, 16]}}, 16, "'b' overlaps"),
    (GOOD | {"b": B | {"data_offsets": [17, 21]}}, 21, "'b' leaves a gap"),
    (GOOD | {"b": B | {"data_offsets": [2**62, 2**62 + 4]}}, 20, "leaves a gap"),
    (GOOD | {"b": B | {"data_offsets": [2**70, 2**70 + 4]}}, 20, "below 2^63"),
    (GOOD | {"b": B | {"shape": [10**4299] * 2}}, 20, "below 2^63"),
    (GOOD | {"b": B | {"shape": [2**62] * 10_000}}, 20, "10000 axes"),
    (GOOD | {"b": B | {"shape": [2**62] * 32}}, 20, "bytes, but its data_offsets"),
    (GOOD | {"b": B | {"data_offsets": [20, 16]}}, 20, "hold -4"),
    (GOOD | {"b": B | {"data_offsets": [16, 19]}}, 20, "hold 3"),
    (GOOD | {"b": B | {"shape": [2**62, 2**62]}}, 20, "bytes, but its data_offsets"),
    (GOOD | {"b": B | {"shape": [-4]}}, 20, "not lists of whole numbers"),
    (GOOD | {"b": B | {"shape": [True, 4]}}, 20, "not lists of whole numbers"),
    (GOOD | {"b": B | {"shape": "4"}}, 20, "not lists of whole numbers"),
    (GOOD | {"b": B | {"dtype": "F9"}}, 20, "dtype 'F9': none of"),
    (GOOD | {"b": B | {"dtype": 3}}, 20, "dtype 3"),
    (GOOD | {"b": [1]}, 20, "must have dtype, shape"),
    (GOOD | {"b": B | {"more": 1}}, 20, "must have dtype, shape"),
    (GOOD | {"__metadata__": {"a": 1}}, 16, "__metadata__"),
    (b"[1, 2]", 16, "a JSON list, not an object"),
    (b'{"a"', 16, "is not JSON"),
    (b"\xff\xfe{}", 16, "is not JSON"),
    (b"[" * 100_000, 16, "is not JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", 16, "is not JSON"),
    (json.dumps(GOOD).encode()[:-1] + b", " + json.dumps(GOOD).encode()[1:], 16, "stands twice"),
  ],
)
def test_an_edited_header_is_refused_in_one_line(tmp_path, header, size, said):
  path = tmp_path / "x.safetensors"
  write_file(path, header, bytes(size))
  with pytest.raises(StorageError, match=r"x\.safetensors") as caught:
    SafetensorsFile(path)
  message = str(caught.value)
  assert said in message
  assert "\n" not in message
  assert caught.value.exit_code == 5


def test_a_key_that_stands_twice_is_found_among_very_many(tmp_path):
  names = [f"t{i}" for i in range(100_000)]
  header = "{" + ", ".join(f'"{name}": {{}}' for name in [*names, names[-1]]) + "}"
  write_file(tmp_path / "x.safetensors", header.encode(), b"")
  begin = time.perf_counter()
  with pytest.raises(StorageError, match="'t99999' stands twice"):
    SafetensorsFile(tmp_path / "x.safetensors")
  assert time.perf_counter() - begin < 10  # each with each would take minutes


@pytest.mark.parametrize(
  ("start", "said"),
  [
    (b"", "0 bytes"),
    (b"\0" * 7, "7 bytes"),
    (struct.pack("<Q", 2**63), "a header of 9,223,372,036,854,775,808 bytes: at most"),
    (struct.pack("<Q", MAX_HEADER_BYTES), "is truncated"),
    (struct.pack("<Q", 9) + b"{}", "is truncated"),
  ],
)
def test_an_absurd_header_is_refused_before_it_is_read(tmp_path, start, said):
  path = tmp_path / "x.safetensors"
  path.write_bytes(start)
  with pytest.raises(StorageError, match=r"x\.safetensors") as caught:
    SafetensorsFile(path)
  assert said in str(caught.value)


def test_a_file_cut_while_in_use_is_an_error_and_no_crash(tmp_path):
  path = tmp_path / "x.safetensors"
  write_file(path, GOOD, bytes(16))
  with SafetensorsFile(path) as file:
    with open(path, "r+b") as cut:
      cut.truncate(path.stat().st_size - 4)
    np.testing.assert_array_equal(file.read("a", 0, 1), np.zeros((1, 2), np.float32))
    with pytest.raises(StorageError, match="cut while in use"):
      file.read("a")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_a_byte_becomes_it_opens_or_is_refused(written, tmp_path_factory, data):
  """The library is as strict: what it refuses for its header, this does."""
  content = bytearray(written.read_bytes())
  begin = 8 + struct.unpack("<Q", content[:8])[0]
  at = data.draw(st.integers(0, begin - 1))
  content[at] = data.draw(st.integers(0, 255))
  path = tmp_path_factory.mktemp("flip") / "x.safetensors"
  path.write_bytes(content)
  try:
    with SafetensorsFile(path) as file:
      opened = {name: file.read(name) for name in file.tensors}
  except StorageError:
    return
  theirs = safetensors.numpy.load_file(path)
  assert opened.keys() == theirs.keys()
