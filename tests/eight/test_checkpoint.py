"""Checkpoints go from one mesh to another bit for bit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import NamedSharding, PartitionSpec

from engram_jax.core import checkpoint, saved_arrays
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.mesh import make_mesh
from engram_jax.errors import StorageError

SHAPES = {"table": (1024, 8), "moments/touched": (1024,), "w": (24, 16), "step": ()}
DTYPES = {"table": jnp.bfloat16, "moments/touched": np.int32, "w": np.float32, "step": np.int32}
MESHES = [
  {"data": 8},
  {"data": 2, "fsdp": 2, "tensor": 2},
  {"expert": 4, "tensor": 2},
  {"data": 4},
  {"fsdp": 2, "tensor": 2},
  {"tensor": 2},
  {"data": 1},
]


def mesh_of(shape: dict[str, int]) -> jax.sharding.Mesh:
  return make_mesh(shape, jax.devices()[: math.prod(shape.values())])


def specs(mesh: jax.sharding.Mesh) -> dict[str, PartitionSpec]:
  rows = PartitionSpec(mesh.axis_names)
  w = PartitionSpec("fsdp", "tensor")
  return {"table": rows, "moments/touched": rows, "w": w, "step": PartitionSpec()}


def abstract(shape: dict[str, int], rows: int = 1024) -> dict[str, jax.ShapeDtypeStruct]:
  mesh = mesh_of(shape)
  sizes = SHAPES | {"table": (rows, 8), "moments/touched": (rows,)}
  return {
    name: jax.ShapeDtypeStruct(sizes[name], DTYPES[name], sharding=NamedSharding(mesh, spec))
    for name, spec in specs(mesh).items()
  }


@pytest.fixture(scope="module")
def values() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {
    name: np.asarray(rng.integers(-99, 99, shape), DTYPES[name]) for name, shape in SHAPES.items()
  }


def place(values: dict[str, np.ndarray], like: dict[str, jax.ShapeDtypeStruct]) -> dict:
  return {name: jax.device_put(value, like[name].sharding) for name, value in values.items()}


def assert_same_bits(restored: dict[str, jax.Array], values: dict[str, np.ndarray]) -> None:
  for name, value in values.items():
    assert restored[name].dtype == value.dtype
    assert np.asarray(restored[name]).tobytes() == value.tobytes(), name


@pytest.mark.parametrize("written", MESHES, ids=str)
def test_a_state_goes_from_any_mesh_to_any_other(tmp_path, values, written):
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, place(values, abstract(written)), {})
    for mesh in MESHES:
      like = abstract(mesh)
      restored = checkpoints.restore(1, like)
      assert_same_bits(restored, values)
      assert all(restored[name].sharding == like[name].sharding for name in like)


def filled_up(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  whole = np.zeros(shape, value.dtype)
  whole[tuple(map(slice, value.shape))] = value
  return whole


ROWS = 1000  # what the table holds; the rest is zeros


@pytest.mark.parametrize("sizes", [(1024, 1026), (1026, 1024), (1026, 1002), (1002, 1024)])
def test_tables_are_cut_and_filled_up_as_the_devices_ask(tmp_path, values, sizes):
  """1,026 and 1,002 rows divide over 6 and 3 devices, 1,024 over 8: the first 1,000 count."""
  devices = {1024: 8, 1026: 6, 1002: 3}
  saved, wanted = (abstract({"data": devices[rows]}, rows) for rows in sizes)
  first = {name: value[:ROWS] if value.ndim else value for name, value in values.items()}
  filled = {name: filled_up(value, saved[name].shape) for name, value in first.items()}
  unplaced = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in wanted.items()}
  rows = {"table": ROWS, "moments": ROWS}
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, place(filled, saved), {})
    for like in (wanted, unplaced):
      restored = checkpoints.restore(1, like, rows=rows)
      assert {n: x.shape for n, x in restored.items()} == {n: x.shape for n, x in like.items()}
      for name, value in first.items():
        array = np.asarray(restored[name])
        np.testing.assert_array_equal(array[:ROWS] if value.ndim else array, value)
        assert not value.ndim or not array[len(value) :].any()
    with pytest.raises(StorageError, match="leaf moments/touched is"):
      checkpoints.restore(1, wanted)
    with pytest.raises(StorageError, match="leaf moments/touched is"):
      checkpoints.restore(1, wanted, rows={"table": ROWS})
    with pytest.raises(StorageError, match="leaf table is"):
      checkpoints.restore(1, wanted, rows={"table": 1030, "moments": ROWS})


def test_a_table_of_one_device_is_written_in_pieces_that_others_read(tmp_path, monkeypatch, values):
  for module in (checkpoint, saved_arrays):
    monkeypatch.setattr(module, "CHUNK_BYTES", 2048)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, place(values, abstract({"data": 1})), {})
    checkpoints.wait()
    assert_same_bits(checkpoints.restore(1, abstract({"data": 8})), values)
  store = {"driver": "ocdbt", "base": f"file://{tmp_path}/step_00000001/state"}
  table = ts.open({"driver": "zarr", "kvstore": store | {"path": "table/"}}, open=True).result()
  assert table.chunk_layout.read_chunk.shape == (128, 8)
