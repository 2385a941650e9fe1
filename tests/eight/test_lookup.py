"""Lookup over eight devices: exact whatever the ids, and what the compiled program moves."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import USER_EMITTERS
from jax.sharding import NamedSharding, PartitionSpec

from engram_jax.aot.collectives import collectives, has_array_with_rows, makers
from engram_jax.core.mesh import batch_sharding, make_mesh
from engram_jax.memory import exchange
from engram_jax.memory.table import (
  init_table,
  lookup,
  lookup_reference,
  padded_rows,
  table_sharding,
)
from engram_jax.tables.optimizers.adam import adam
from engram_jax.tables.sharded import ShardedRows
from engram_jax.tables.state import expand_rows

C = 4
MESHES = (
  {"data": 8},
  {"fsdp": 4, "tensor": 2},
  {"data": 2, "fsdp": 2, "expert": 2},
  {"data": 3},
  {"fsdp": 3, "tensor": 2},
  {"data": 1},
)


@functools.cache
def mesh_of(index: int):
  sizes = MESHES[index]
  return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


@functools.cache
def looked_up(index: int, capacity: float):
  """rows and d_table of sum(rows weights) on the mesh."""
  mesh = mesh_of(index)

  def run(table, ids, weights):
    rows, transpose = jax.vjp(lambda t: lookup(t, ids, mesh=mesh, capacity=capacity), table)
    return rows, transpose(weights)[0]

  return jax.jit(run)


def assert_exact(index: int, rows: int, ids: np.ndarray, capacity: float) -> None:
  """Values bit for bit, and the table's gradient, against plain indexing on one device."""
  random = np.random.default_rng(0)
  table = random.standard_normal((padded_rows(rows), C), np.float32)
  weights = random.standard_normal((*ids.shape, C), np.float32)
  found, grad = looked_up(index, capacity)(table, ids, weights)
  np.testing.assert_array_equal(found, lookup_reference(table, ids))
  expected = np.zeros_like(table)
  np.add.at(expected, ids, weights)
  np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-5)


def zipf(random, shape, rows):
  return (random.zipf(1.2, shape) * 2_654_435_761 % rows).astype(np.int32)


SKEWED = {
  "all on one shard": lambda r: r.integers(0, 100, (8, 6, 2), np.int32),
  "one id": lambda r: np.full((8, 6, 2), 2999, np.int32),
  "every row of a shard": lambda r: r.permutation(384).astype(np.int32).reshape(8, 24, 2),
  "one device wants all": lambda r: np.tile(
    np.arange(48, dtype=np.int32).reshape(1, 24, 2), (8, 1, 1)
  ),
  "Zipf": lambda r: zipf(r, (8, 24, 2), 3000),
  "uniform": lambda r: r.integers(0, 3000, (8, 24, 2), np.int32),
  "does not divide": lambda r: r.integers(0, 3000, (3, 7), np.int32),
  "a single id": lambda r: np.array([17], np.int32),
}


@pytest.mark.parametrize("capacity", [1.25, 0.01], ids=["room", "overflow_rounds"])
@pytest.mark.parametrize("name", SKEWED)
def test_skewed_ids_are_served_exactly(name, capacity):
  assert_exact(0, 3000, SKEWED[name](np.random.default_rng(1)), capacity)


@pytest.mark.parametrize("index", range(1, len(MESHES)))
def test_any_mesh_and_device_count_gives_the_same(index):
  ids = np.random.default_rng(2).integers(0, 1500, (12, 5), np.int32)
  assert_exact(index, 1500, ids, 1.25)


def test_a_table_made_on_a_mesh_and_its_gradient_are_divided_by_rows():
  mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  table = init_table(jax.random.key(0), 3000, C, std=1.0, mesh=mesh)
  assert table.sharding.shard_shape(table.shape) == (3072 // 8, C)
  whole = jnp.asarray(np.asarray(table))
  np.testing.assert_array_equal(whole, init_table(jax.random.key(0), 3000, C, std=1.0))
  ids = jax.random.randint(jax.random.key(1), (8, 5, 3), 0, 3000)
  spread = jax.device_put(ids, batch_sharding(mesh))

  @jax.jit
  def rows_and_gradient(table, ids):
    rows, transpose = jax.vjp(lambda table: lookup(table, ids, mesh=mesh), table)
    return rows, transpose(2 * rows)[0]

  rows, grad = rows_and_gradient(table, spread)
  np.testing.assert_array_equal(rows, lookup_reference(whole, ids))
  assert grad.sharding.is_equivalent_to(table_sharding(mesh), 2), grad.sharding
  expected = jax.grad(lambda t: jnp.sum(lookup_reference(t, ids) ** 2))(whole)
  np.testing.assert_allclose(grad, expected, rtol=1e-6)


def test_an_empty_batch_gives_no_rows():
  mesh = mesh_of(0)
  for shape in ((0,), (8, 0, 2)):
    rows = lookup(jnp.ones((1024, C)), jnp.zeros(shape, jnp.int32), mesh=mesh)
    assert rows.shape == (*shape, C)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=25, deadline=None)
def test_any_ids_on_a_small_table(data):
  index = data.draw(st.sampled_from(range(len(MESHES))))
  capacity = data.draw(st.sampled_from([1.25, 0.3]))
  numbers = data.draw(st.lists(st.integers(0, 1023), min_size=24, max_size=24))
  assert_exact(index, 1024, np.array(numbers, np.int32).reshape(6, 4), capacity)


def test_ids_outside_the_table_give_nan_and_nothing_else():
  ids = jnp.array([-1, 5, 1024, 2**31 - 1, -(2**31), 7, 1023, 0], jnp.int32)
  table = jnp.arange(1024.0 * C).reshape(1024, C)
  rows = np.asarray(jax.jit(lambda t, i: lookup(t, i, mesh=mesh_of(0)))(table, ids))
  bad = np.array([True, False, True, True, True, False, False, False])
  assert np.isnan(rows[bad]).all()
  np.testing.assert_array_equal(rows[~bad], np.asarray(table)[np.asarray(ids)[~bad]])


def test_the_transpose_is_the_adjoint():
  """<lookup(t), w> = <t, transpose(w)>."""
  random = np.random.default_rng(3)
  table = random.standard_normal((1024, C), np.float32)
  ids = random.integers(0, 1024, (8, 9), np.int32)
  weights = random.standard_normal((8, 9, C), np.float32)
  rows, grad = looked_up(0, 1.25)(table, ids, weights)
  assert np.vdot(rows, weights) == pytest.approx(np.vdot(table, grad), rel=1e-4)


def test_rounds_follow_from_how_many_ids_there_are_and_not_from_where_they_lie():
  """Ids that lie side by side in a table of two thousand million rows take no more than others."""
  mesh, P, each = mesh_of(0), 8, 1024
  p = exchange.make_partition(("data",), P, (2**31 - 1024) // P, each, 0.25)

  def rounds(ids):
    requests = [exchange.make_requests(ids, p)]
    return exchange.overflow_rounds(lambda carry, _: carry, (), requests, [p])[1][None]

  spec = PartitionSpec("data")
  count = jax.jit(jax.shard_map(rounds, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
  random = np.random.default_rng(4)
  draw = lambda high: np.sort(random.integers(0, high, P * each).astype(np.int32))
  needed = lambda requested: -(-(requested - p.slots) // p.overflow_slots)
  one = count(np.full(P * each, 9, np.int32))
  spread = count(random.permutation(draw(P * p.rows)))
  crowded = count(random.permutation(draw(p.rows)))
  beside = count(np.arange(P * each, dtype=np.int32) + p.rows - 5)  # each device rows of its own
  for found in (spread, crowded, beside):
    assert (np.asarray(found) == found[0]).all()  # alike on every device
  assert one[0] == 0
  assert 0 < needed(each // P) <= spread[0] <= 2 * needed(each // P) + 8
  assert needed(each) <= crowded[0] <= 2 * needed(each)
  assert beside[0] <= P * (each // p.overflow_slots + 1)


ROWS, WIDTH, IDS = 1 << 18, 64, 8 * 8192  # one device wants 8,192 ids of a table of 262,144 rows


@pytest.fixture(scope="module")
def program(optimized):
  """Forward and backward of a lookup, compiled; the cotangent's home is the table."""
  mesh = mesh_of(0)
  split = NamedSharding(mesh, PartitionSpec("data"))
  table = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=table_sharding(mesh))
  ids = jax.ShapeDtypeStruct((8, IDS // 8), jnp.int32, sharding=split)
  weights = jax.ShapeDtypeStruct((8, IDS // 8, WIDTH), jnp.float32, sharding=split)

  def run(table, ids, weights):
    rows, transpose = jax.vjp(lambda t: lookup(t, ids, mesh=mesh), table)
    return rows, transpose(weights)[0]

  return jax.jit(run).lower(table, ids, weights).compile().as_text()


def test_the_table_stays_where_it_is(program):
  shard = ROWS // 8
  moved = collectives(program)
  assert {c.kind for c in moved} == {"all-to-all", "all-reduce"}
  assert all(array.dims == (8,) for c in moved if c.kind == "all-reduce" for array in c.shapes)
  assert not any({ROWS, shard} & set(array.dims) for c in moved for array in c.shapes)
  assert not has_array_with_rows(program, ROWS)


def test_little_more_travels_than_the_distinct_rows(program):
  """Uniform ids are nearly all distinct: in both directions together, twice their bytes."""
  distinct = IDS / 8 * (1 - IDS / 8 / ROWS / 2)
  assert sum(c.bytes for c in collectives(program)) < 1.5 * 2 * distinct * WIDTH * 4


def test_without_a_table_gradient_nothing_of_its_size_is_made(optimized):
  mesh = mesh_of(0)
  rows = ShardedRows(adam(0.1), mesh, (ROWS,), 1.25, jnp.float32)
  spread = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  table = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=table_sharding(mesh))
  per_row = lambda x: spread(mesh.axis_names) if x.ndim else spread()
  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=per_row(x)),
    jax.eval_shape(rows.optimizer.init, table),
  )
  ids = jax.ShapeDtypeStruct((8, 512, 2), jnp.int32, sharding=spread("data"))
  weights = jax.ShapeDtypeStruct((8, 512, 2, WIDTH), jnp.float32, sharding=spread("data"))

  def run(table, state, ids, weights):
    fetched, tables, states = rows.fetch((table,), (state,), (ids,))
    _, transpose = jax.vjp(lambda r: expand_rows(mesh, r, fetched.inverses[0]), fetched.rows[0])
    grads = transpose(weights)
    row_grads = rows.reduce_grads(fetched, grads)
    return rows.update(fetched, row_grads, tables, states, jnp.float32(1), jnp.bool_(True))

  lowered = jax.jit(run, donate_argnums=(0, 1)).lower(table, state, ids, weights)
  # With the emitters that a user has: those of tests/conftest.py write rows in a loop.
  program = lowered.compile(USER_EMITTERS)
  made = {i.opcode for i in makers(program.as_text(), ROWS // 8)}
  assert made <= {"scatter", "fusion"}, made  # written in place; a gradient would be a broadcast
  shard_bytes = (ROWS // 8) * (3 * WIDTH + 1) * 4
  assert program.memory_analysis().temp_size_in_bytes < shard_bytes / 2
