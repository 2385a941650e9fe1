"""Truths about tables: padding, lookup and its transpose, distinct rows, sharding, the mesh."""

import chex
import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.core.mesh import AXES, batch_sharding, make_mesh, replicated
from engram_jax.memory.compress import check_ids
from engram_jax.memory.dedup import FILL, _sort_with_positions, dedup, expand, gather_rows
from engram_jax.memory.table import (
  init_table,
  lookup,
  lookup_reference,
  padded_rows,
  table_sharding,
)

ROWS, C = 37, 5


@pytest.fixture(scope="module")
def table():
  return init_table(jax.random.key(0), ROWS, C, std=0.5)


def some_ids(shape=(2, 9, 4)):
  return jnp.asarray(np.random.default_rng(0).integers(0, ROWS, shape), jnp.int32)


def test_rows_are_padded_to_a_fixed_multiple():
  assert [padded_rows(n) for n in (1, 1024, 1025, 504)] == [1024, 1024, 2048, 1024]
  for rows in (0, 2**31):
    with pytest.raises(ValueError, match=f"{rows:,} rows"):
      padded_rows(rows)


def test_pad_rows_are_zero(table):
  chex.assert_shape(table, (1024, C))
  assert not np.any(table[ROWS:])
  assert np.all(np.any(table[:ROWS] != 0, axis=1))
  big = init_table(jax.random.key(0), 1024, 64, std=0.5, dtype=jnp.bfloat16)
  assert big.dtype == jnp.bfloat16
  assert float(jnp.std(big.astype(jnp.float32))) == pytest.approx(0.5, rel=0.02)


def test_lookup_equals_take(table):
  ids = some_ids()
  np.testing.assert_array_equal(jax.jit(lookup)(table, ids), lookup_reference(table, ids))
  assert lookup(table, ids).shape == (*ids.shape, C)


def test_lookup_transposed(table):
  """<lookup(table), y> = <table, lookup^T(y)>, which is the segment sum of y."""
  ids = some_ids()
  y = jax.random.normal(jax.random.key(1), (*ids.shape, C))
  grad = jax.jit(jax.grad(lambda t: jnp.vdot(lookup(t, ids), y)))(table)
  np.testing.assert_allclose(jnp.vdot(lookup(table, ids), y), jnp.vdot(table, grad), rtol=1e-5)
  expected = jax.ops.segment_sum(y.reshape(-1, C), ids.reshape(-1), table.shape[0])
  np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [-1, 1024, FILL])
def test_an_id_outside_reads_no_other_row(table, bad):
  rows = lookup(table, jnp.asarray([3, bad]))
  np.testing.assert_array_equal(rows[0], table[3])
  assert np.all(np.isnan(rows[1]))


def test_bad_ids_are_refused_where_they_enter():
  check_ids(np.asarray([[0, ROWS - 1]]), ROWS, "row id")
  check_ids(np.zeros((0, 4), np.int32), ROWS, "row id")
  with pytest.raises(ValueError, match=r"row id 37 at position \[1, 0\] is outside \[0, 37\)"):
    check_ids(np.asarray([[0, 1], [ROWS, -4]]), ROWS, "row id")
  with pytest.raises(ValueError, match=r"row id -4 at position \[0\]"):
    check_ids(np.asarray([-4]), ROWS, "row id")
  with pytest.raises(ValueError, match="not float64"):
    check_ids(np.asarray([1.0]), ROWS, "row id")


unique_in_jit = jax.jit(dedup, static_argnums=1)
by_place = jax.jit(_sort_with_positions, static_argnums=1)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
  hypothesis.extra.numpy.arrays(np.int32, (3, 8), elements=st.integers(0, ROWS - 1)),
  st.sampled_from([ROWS, 1000, 20]),
)
def test_dedup_equals_numpy(ids, rows):
  ids = ids % rows
  unique = unique_in_jit(ids, rows)
  expected, inverse = np.unique(ids, return_inverse=True)
  assert unique.count == len(expected)
  assert unique.ids_U.shape == (min(ids.size, rows),)
  np.testing.assert_array_equal(unique.ids_U[: len(expected)], expected)
  np.testing.assert_array_equal(unique.ids_U[len(expected) :], FILL)
  np.testing.assert_array_equal(unique.inverse, inverse.reshape(ids.shape))
  elsewhere = by_place(ids.reshape(-1), min(ids.size, rows))  # than on CPU, where it also runs
  np.testing.assert_array_equal(elsewhere.ids_U, unique.ids_U)
  np.testing.assert_array_equal(elsewhere.inverse, inverse.reshape(-1))
  assert elsewhere.count == unique.count


def test_distinct_rows_expand_to_the_lookup(table):
  ids = some_ids()
  unique = dedup(ids, table.shape[0])
  rows_UC = gather_rows(table, unique.ids_U)
  np.testing.assert_array_equal(expand(rows_UC, unique.inverse), lookup(table, ids))
  assert np.all(np.isnan(rows_UC[unique.count :]))


def test_gradients_of_distinct_rows_are_the_tables(table):
  """Also where most of U is fill: those gradients are zero and point past the table."""
  ids = some_ids()
  loss = lambda rows: jnp.sum(jnp.sin(rows) * jnp.arange(1.0, C + 1))
  unique = dedup(ids, table.shape[0])
  rows_UC = gather_rows(table, unique.ids_U)
  grads_UC = jax.jit(jax.grad(lambda r: loss(expand(r, unique.inverse))))(rows_UC)
  np.testing.assert_array_equal(grads_UC[unique.count :], 0)
  dense = jax.jit(jax.grad(lambda t: loss(lookup(t, ids))))(table)
  scattered = jnp.zeros_like(table).at[unique.ids_U].add(grads_UC, mode="drop")
  np.testing.assert_allclose(scattered, dense, rtol=0, atol=1e-5)


def test_mesh_of_one_device(table):
  mesh = make_mesh(devices=jax.devices()[:1])
  assert mesh.axis_names == AXES
  assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
  ids = some_ids()
  on_mesh = jax.device_put(table, table_sharding(mesh))
  np.testing.assert_array_equal(lookup(on_mesh, ids, mesh=mesh), lookup(table, ids))
  assert batch_sharding(mesh).shard_shape((4, 3)) == (4, 3)
  assert replicated(mesh).is_fully_replicated


def test_mesh_that_does_not_fit_is_refused():
  with pytest.raises(ValueError, match=r"no axis 'model': the axes are data, fsdp, expert, tensor"):
    make_mesh({"model": 1})
  with pytest.raises(ValueError, match="holds 6 devices but there are 1"):
    make_mesh({"data": 2, "tensor": 3}, devices=jax.devices()[:1])
