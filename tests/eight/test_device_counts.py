"""A state saved on one number of devices is restored bit for bit on any other, and on the host.

python -m pytest -m slow tests/eight/test_device_counts.py            every pair

Three devices do not divide a multiple of 1,024, so their tables have more pad rows than others'.
"""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from engram_jax.config import load_config
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.mesh import make_mesh
from engram_jax.core.saved_arrays import leaves_by_path
from engram_jax.memory.table import padded_rows
from engram_jax.model.counts import table_layout
from engram_jax.tables.base import Tables
from engram_jax.tables.row_checkpoint import OPTIMIZERS, TABLES
from engram_jax.tables.state import TableState
from engram_jax.training.state import (
  TrainSetup,
  TrainState,
  make_setup,
  restore_state,
  save_state,
  state_shapes,
  stored,
)

MESHES: dict[str, dict[str, int]] = {
  "1": {},
  "2": {"fsdp": 2},
  "3": {"fsdp": 3},
  "4": {"expert": 2, "tensor": 2},
  "8": {"data": 2, "fsdp": 2, "tensor": 2},
}
OFFLOADED = ("host", "file")
PLACES = (*MESHES, *OFFLOADED)
CONFIG = {
  "model.vocab_size": 264,
  "model.width": 24,
  "model.layers": 2,
  "model.attention.heads": 2,
  "model.attention.latent": 8,
  "model.attention.nope_dim": 8,
  "model.attention.rope_dim": 4,
  "model.attention.value_dim": 8,
  "model.moe.routed_experts": 4,
  "model.moe.expert_width": 12,
  "model.moe.dense_width": 24,
  "model.residual.branches": 2,
  "model.engram.layers": [0, 1],
  "model.engram.heads": 2,
  "model.engram.row_width": 4,
  "model.engram.rows_per_head": 307,
}
SHORT = [("3", "8"), ("3", "host"), ("host", "3"), ("2", "3")]
KINDS = [("adam", "float32"), ("adam_catch_up", "bfloat16")]  # the second not in files
EVERY = [
  (kind, dtype, source, target)
  for kind, dtype in KINDS
  for source in PLACES
  for target in PLACES
  if kind == "adam" or "file" not in (source, target)
]


@functools.cache
def setup_on(place: str, kind: str, dtype: str) -> TrainSetup:
  """The setup of a small model on so many devices, or with its tables off the device."""
  placement = place if place in OFFLOADED else "device"
  cfg = load_config(
    None,
    CONFIG
    | {
      "model.engram.placement": placement,
      "model.engram.table_dtype": dtype,
      "train.optimizer.table": kind,
    },
  )
  shape = MESHES.get(place, {})
  devices = jax.devices()[: int(place) if place in MESHES else 1]
  setup = make_setup(cfg, table_layout(cfg.model), make_mesh(shape, devices))
  setup.tables._folder = None  # files lie in the system's folder for temporary ones
  return setup


@functools.cache
def shapes_on(place: str, kind: str, dtype: str) -> TrainState:
  """The state's shapes and shardings."""
  return state_shapes(setup_on(place, kind, dtype))


def shapes_of(setup: TrainSetup) -> TrainState:
  """See `shapes_on`, which makes them once."""
  devices = setup.mesh.size if setup.mesh else 1
  placement, optimizer = setup.config.model.engram.placement, setup.config.train.optimizer.table
  place = placement if placement in OFFLOADED else str(devices)
  return shapes_on(place, optimizer, setup.config.model.engram.table_dtype)


def full_tables(setup: TrainSetup, state: TableState) -> TableState:
  """Tables and optimizer states [R_padded, ...], of whichever placement."""
  if state.host is None:
    return state
  tables, optimizers = {}, {}
  every_id = {n: np.arange(R) for n, R in setup.tables.row_counts.items()}
  drawn = {n: np.asarray(rows) for n, rows in state.host.lookup(every_id).items()}
  for n, table in state.host.tables.items():
    every = np.arange(table.schema.padded)
    leaves = table.schema.unpack(table.take(every))
    scalars = tuple(jax.tree.leaves(state.optimizer[n]))
    optimizers[n] = table.schema.join_state(leaves[1:], scalars)
    tables[n] = np.concatenate([drawn[n], leaves[0][table.schema.rows :]])
  return TableState(tables, optimizers)


def row_count(setup: TrainSetup, path: str, leaf: Any) -> int | None:
  """Rows of a leaf that count, if it belongs to a table and has some."""
  part, index, *_ = [*path.split("/"), ""]
  if part not in (TABLES, OPTIMIZERS) or not leaf.ndim:
    return None
  return setup.tables.row_counts[setup.tables.layers[int(index)]]


def contents(setup: TrainSetup) -> dict[str, np.ndarray]:
  """Values for all leaves by their stored path, without pad rows: random, and no two of a leaf with
  at most 2^16 of them are equal."""
  shapes = leaves_by_path(stored(shapes_of(setup)))
  rng, values = np.random.default_rng(0), {}
  for path, leaf in shapes.items():
    size = row_count(setup, path, leaf)
    shape = leaf.shape if size is None else (size, *leaf.shape[1:])
    numbers = rng.permutation(max(1 << 15, int(np.prod(shape))))[: int(np.prod(shape))] + 1
    dtype = np.dtype(leaf.dtype)
    if dtype.itemsize == 2:  # as bits: positive numbers from the smallest on
      values[path] = (numbers % 0x7F00).astype(np.uint16).view(dtype).reshape(shape)
    else:
      values[path] = numbers.astype(dtype).reshape(shape) * dtype.type(3)
  return values


def with_unwritten_rows(setup: TrainSetup, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The values, but every fourth row of each table as it is before the first step."""
  one = setup_on("1", setup.config.train.optimizer.table, setup.config.model.engram.table_dtype)
  first = one.tables.init(Tables.key(one.config))
  like = leaves_by_path({TABLES: tuple(first.tables.values())})
  values = dict(values)
  for path, value in values.items():
    if row_count(setup, path, value) is not None:
      old = np.asarray(like[path]) if path in like else np.zeros_like(value)
      is_old = (np.arange(len(value)) % 4 == 3).reshape(-1, *(1,) * (value.ndim - 1))
      values[path] = np.where(is_old, old[: len(value)], value)
  return values


def place_state(setup: TrainSetup, values: dict[str, np.ndarray]) -> TrainState:
  """The state that holds these values, tables where they belong."""
  shapes = shapes_of(setup)
  names = leaves_by_path(stored(shapes))

  def put(path: str) -> jax.Array:
    leaf = names[path]
    value = np.zeros(leaf.shape, leaf.dtype)
    value[tuple(map(slice, values[path].shape))] = values[path]
    return jax.device_put(value, leaf.sharding)

  if not setup.tables.is_offloaded:
    made = {id(leaf): put(path) for path, leaf in names.items()}
    return jax.tree.map(lambda leaf: made[id(leaf)], shapes)
  made = {id(x): put(p) for p, x in names.items() if not p.startswith((TABLES, OPTIMIZERS))}
  rest = jax.tree.map(lambda leaf: made[id(leaf)], shapes._replace(tables=None))
  host, scalars = setup.tables.init(Tables.key(setup.config)).host, {}
  for i, (n, table) in enumerate(host.tables.items()):
    paths = [f"{TABLES}/{i}", *(f"{OPTIMIZERS}/{i}/{name}" for name, *_ in table.schema.leaves[1:])]
    written = np.flatnonzero(np.arange(table.schema.rows) % 4 != 3)
    table.put(written, table.schema.pack(tuple(values[path][written] for path in paths)))
    own = [p for p in values if p.startswith(f"{OPTIMIZERS}/{i}/") and not values[p].ndim]
    scalars[n] = tuple(jax.device_put(values[path]) for path in own)
  return rest._replace(tables=host.state(scalars))


def assert_holds(setup: TrainSetup, state: TrainState, values: dict[str, np.ndarray]) -> None:
  """The state has these values, zeros after them, and lies where the setup says."""
  if not setup.tables.is_offloaded:
    shardings = jax.tree.map(lambda x: x.sharding, shapes_of(setup))
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
  full = state._replace(tables=full_tables(setup, state.tables))
  leaves = leaves_by_path(stored(full))
  assert leaves.keys() == values.keys()
  devices = 1 if setup.mesh is None else setup.mesh.size
  for path, leaf in leaves.items():
    size, array = row_count(setup, path, leaf), np.asarray(leaf)
    if size is not None:
      assert len(array) == padded_rows(size, devices), path
      assert not array[size:].tobytes().strip(b"\0"), f"{path}: a pad row is not zero"
      array = array[:size]
    assert (array.dtype, array.shape) == (values[path].dtype, values[path].shape), path
    assert array.tobytes() == values[path].tobytes(), path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """`saved(place, kind, dtype)`: a folder with the state saved there, and its values; once."""

  @functools.cache
  def save(place: str, kind: str, dtype: str) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    setup, folder = setup_on(place, kind, dtype), tmp_path_factory.mktemp("saved")
    values = contents(setup)
    if place in OFFLOADED:
      values = with_unwritten_rows(setup, values)
    with setup.tables, Checkpoints(folder, keep=1) as checkpoints:
      state = place_state(setup, values)
      assert_holds(setup, state, values)
      save_state(checkpoints, 7, setup, state, {})
    return folder, values

  return save


def assert_restored(saved: Any, source: str, target: str, kind: str, dtype: str) -> None:
  folder, values = saved(source, kind, dtype)
  setup = setup_on(target, kind, dtype)
  with setup.tables, Checkpoints(folder, keep=None) as checkpoints:
    assert_holds(setup, restore_state(checkpoints, 7, setup), values)


@pytest.mark.parametrize(("source", "target"), SHORT)
def test_a_state_goes_from_so_many_devices_to_so_many(saved, source, target):
  assert_restored(saved, source, target, *KINDS[0])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype", "source", "target"), EVERY)
def test_every_pair(saved, kind, dtype, source, target):
  assert_restored(saved, source, target, kind, dtype)


def test_three_devices_have_more_pad_rows_than_others():
  """Three devices pad a table further than others do, and divide some of the parameters."""
  three, eight = (setup_on(place, *KINDS[0]) for place in ("3", "8"))
  for n, rows in three.tables.row_counts.items():
    assert three.tables.shapes.tables[n].shape[0] == 3072 > rows
    assert eight.tables.shapes.tables[n].shape[0] == 2048 > rows
  specs = [x.sharding.spec for x in jax.tree.leaves(state_shapes(three).params)]
  assert any("fsdp" in spec for spec in specs)
