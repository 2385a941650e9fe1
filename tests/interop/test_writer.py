"""Folders of shards are written in slices, appear complete or not at all, and the library reads
them."""

import os

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import read_folder

from engram_jax.config import EngramConfig
from engram_jax.errors import ConfigError, StorageError
from engram_jax.interop import engram_format
from engram_jax.interop.folder import Folder
from engram_jax.interop.safetensors import DTYPE_NAMES
from engram_jax.interop.writer import (
  StreamedTensor,
  new_folder,
  slice_ranges,
  write_tensors,
  write_text,
)
from engram_jax.memory.engram import Engram


def streamed(array: np.ndarray, cuts: int = 1) -> StreamedTensor:
  slices = np.array_split(array, cuts) if array.ndim else [array]
  return StreamedTensor(DTYPE_NAMES[array.dtype], array.shape, lambda: iter(slices))


@given(st.integers(0, 10_000), st.integers(0, 5000), st.integers(1, 20_000))
def test_ranges_cover_every_row_once_and_stay_small(rows, row_bytes, max_bytes):
  ranges = list(slice_ranges(rows, row_bytes, max_bytes))
  assert [i for a, b in ranges for i in range(a, b)] == list(range(rows))
  assert all((b - a) * row_bytes <= max_bytes or b - a == 1 for a, b in ranges)


DTYPES = [np.float32, np.int64, np.uint8, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=6), st.integers(1, 200))
def test_written_tensors_are_read_back(tmp_path_factory, kinds, shard_bytes):
  rng = np.random.default_rng(0)
  arrays = {
    f"t{i}": rng.integers(0, 100, size=shape).astype(dtype)
    for i, (dtype, shape) in enumerate(kinds)
  }
  folder = tmp_path_factory.mktemp("w") / "new"
  with new_folder(folder) as part:
    write_text(part / "config.json", "{}")
    write_tensors(part, {name: streamed(x, cuts=2) for name, x in arrays.items()}, shard_bytes)
  raw = read_folder(folder)
  assert raw.keys() == arrays.keys()
  with Folder(folder) as reader:
    for name, array in arrays.items():
      assert raw[name].shape == array.shape
      assert raw[name].data == array.tobytes()
      found = reader.read(name)
      assert (found.dtype, found.shape) == (array.dtype, array.shape)
      assert found.tobytes() == array.tobytes()
  for file in folder.glob("*.safetensors"):
    with safetensors.safe_open(file, "np") as opened:
      for name in opened.keys():  # noqa: SIM118 (no mapping)
        assert opened.get_slice(name).get_shape() == list(arrays[name].shape)


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
  short = StreamedTensor("U8", (6,), lambda: [np.zeros(5, np.uint8)])
  with pytest.raises(ValueError, match="5 bytes in slices, 6"), new_folder(tmp_path / "a") as part:
    write_tensors(part, {"ok": streamed(np.ones(3, np.float32)), "short": short})
  with pytest.raises(ValueError, match="a slice int8"), new_folder(tmp_path / "a") as part:
    write_tensors(part, {"other": StreamedTensor("U8", (6,), lambda: [np.zeros(6, np.int8)])})
  with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a"):
    raise KeyboardInterrupt
  assert list(tmp_path.iterdir()) == []
  with new_folder(tmp_path / "deep" / "a") as part:
    assert not (tmp_path / "deep" / "a").exists()
    write_text(part / "x", "1")
  assert (tmp_path / "deep" / "a" / "x").read_text() == "1"
  with pytest.raises(ConfigError, match="exists already"), new_folder(tmp_path / "deep" / "a"):
    pytest.fail("reached")


def test_tensors_that_do_not_fit_on_the_disk_are_refused_before_writing(tmp_path):
  never = StreamedTensor("U8", (2**60,), lambda: pytest.fail("read"))
  with pytest.raises(StorageError, match="1,152,921,504,606,846,976 do not fit"):
    write_tensors(tmp_path, {"a": never})
  assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(StorageError, match="cannot be written"), new_folder(tmp_path / "file" / "a"):
    pytest.fail("reached")
  os.symlink(tmp_path / "nowhere", tmp_path / "link")
  with pytest.raises(ConfigError, match="exists already"), new_folder(tmp_path / "link"):
    pytest.fail("reached")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
  "fields", [{"conv_kernel": 0}, {"conv_kernel": 4}, {"gate": "none"}, {"projections": False}]
)
def test_module_shapes_are_those_of_the_module(bias, fields):
  if "projections" in fields:
    fields, bias = fields | {"gate": "none", "row_width": 2}, False
  cfg = EngramConfig(layers=(1,), **{"heads": 2, "row_width": 4, "bias": bias} | fields)
  module = nnx.eval_shape(lambda: Engram(cfg, 8, 3, rngs=nnx.Rngs(0)))
  shapes = jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
  assert engram_format.module_shapes(cfg, 8, 3) == shapes
