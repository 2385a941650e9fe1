"""Promises of every table optimizer: touched rows move, nothing else is read, made or changed."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import OptimizerConfig
from engram_jax.tables.table_optimizer import table_optimizer

R, C = 16, 4
KINDS = ("adam", "adam_catch_up", "adagrad", "sinkhorn")
OPTIMIZERS = {
  kind: table_optimizer(OptimizerConfig(table=kind), lambda step: 2e-3) for kind in KINDS
}
DTYPES = (jnp.float32, jnp.bfloat16)


@functools.cache
def update(kind):
  return jax.jit(OPTIMIZERS[kind].update)


@functools.cache
def in_place(kind):
  """As in the training step: what goes in comes out in the same order, so buffers pair up."""

  def step(carry, grads, ids, ok):
    table, state = OPTIMIZERS[kind].sync(*carry, ids)
    return OPTIMIZERS[kind].update(grads, state, table, ids, ok)

  return jax.jit(step, donate_argnums=0)


def _table(dtype=jnp.float32):
  return jax.random.normal(jax.random.key(0), (R, C)).astype(dtype)


def _grads(count, step):
  return jax.random.normal(jax.random.key(100 + step), (count, C))


def _ids(*ids):
  return jnp.array(ids, jnp.int32)


def _warm(kind, dtype=jnp.float32):
  """A table and a state that has seen a step, so that zeros cannot hide a mistake."""
  table = _table(dtype)
  return update(kind)(_grads(R, 0), OPTIMIZERS[kind].init(table), table, jnp.arange(R))


def _bits(tree):
  return jax.tree.map(lambda x: np.asarray(x).view(f"u{x.dtype.itemsize}"), tree)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_only_touched_rows_move(kind, dtype):
  before = _warm(kind, dtype)
  ids = np.array([3, 4, 11], np.int32)
  after = update(kind)(50 * _grads(3, 1), before[1], before[0], ids)
  for new, old in zip(jax.tree.leaves(_bits(after)), jax.tree.leaves(_bits(before)), strict=True):
    if new.ndim:
      np.testing.assert_array_equal(np.delete(new, ids, 0), np.delete(old, ids, 0))
      assert (new[ids] != old[ids]).reshape(3, -1).any(1).all()
  assert after[0].dtype == dtype
  counts = lambda state: [int(x) for x in jax.tree.leaves(state) if x.ndim == 0]
  assert counts(after[1]) == [count + 1 for count in counts(before[1])]


@pytest.mark.parametrize("fill", [R, R + 7, 2**31 - 1, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_fill_entries_are_dropped(kind, fill):
  table, state = _warm(kind)
  grads = _grads(2, 1)
  padded = jnp.concatenate([grads, jnp.full((2, C), jnp.nan)])
  chex.assert_trees_all_equal(
    update(kind)(padded, state, table, _ids(3, 11, fill, fill)),
    update(kind)(grads, state, table, _ids(3, 11)),
  )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_not_ok_changes_nothing_bit_for_bit(kind, dtype):
  table, state = _warm(kind, dtype)
  table = table.at[0].set(-0.0)
  grads = jnp.full((R, C), jnp.nan)
  kept = update(kind)(grads, state, table, jnp.arange(R), jnp.bool_(False))
  chex.assert_trees_all_equal(_bits(kept), _bits((table, state)))


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_merge_by_their_ids(kind):
  """Distinct ids of the concatenation, gradients summed: the step of the whole batch."""
  table, state = _warm(kind)
  first, second = np.array([3, 5, 3]), np.array([5, 8, 8])
  grads = np.asarray(_grads(6, 1))
  distinct, inverse = np.unique(np.concatenate([first, second]), return_inverse=True)
  merged = np.zeros((len(distinct), C), np.float32)
  np.add.at(merged, inverse, grads)
  dense = jnp.zeros((R, C)).at[first].add(grads[:3]).at[second].add(grads[3:])
  got, _ = update(kind)(jnp.asarray(merged), state, table, _ids(*distinct))
  whole, _ = update(kind)(dense[distinct], state, table, _ids(*distinct))
  np.testing.assert_allclose(got, whole, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_ids_does_not_matter(kind):
  table, state = _warm(kind)
  grads, order = _grads(R, 1), jax.random.permutation(jax.random.key(1), R)
  got = update(kind)(grads[order], state, table, order)
  chex.assert_trees_all_close(got, update(kind)(grads, state, table, jnp.arange(R)), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_up_to_date_are_left_alone_by_sync_and_flush(kind):
  """All of them, for every optimizer but the one that catches up; there, those just written."""
  before = _warm(kind, jnp.bfloat16)
  chex.assert_trees_all_equal(
    _bits(jax.jit(OPTIMIZERS[kind].sync)(*before, _ids(1, 7))), _bits(before)
  )
  chex.assert_trees_all_equal(_bits(jax.jit(OPTIMIZERS[kind].flush)(*before)), _bits(before))


@pytest.mark.parametrize("kind", KINDS)
def test_donated_buffers_are_reused(kind):
  carry = (_table(), OPTIMIZERS[kind].init(_table()))
  where = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(carry) if x.ndim]
  carry = in_place(kind)(carry, _grads(2, 0), _ids(0, 1), jnp.bool_(True))
  assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(carry) if x.ndim] == where


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_step_gives_the_same_bits(kind):
  runs = []
  for _ in range(2):
    table, state = _warm(kind, jnp.bfloat16)
    runs.append(update(kind)(_grads(3, 1), state, table, _ids(0, 5, 9)))
  chex.assert_trees_all_equal(_bits(runs[0]), _bits(runs[1]))


def test_rows_lag_where_the_optimizer_catches_up_and_nowhere_else():
  assert [kind for kind in KINDS if OPTIMIZERS[kind].is_lazy] == ["adam_catch_up"]


@pytest.mark.parametrize("kind", KINDS)
def test_tables_learn_at_their_own_rate(kind):
  """table_rate times the schedule's learning rate."""
  ids, moves = _ids(2, 6), []
  for rate in (1.0, 3.0):
    chosen = table_optimizer(OptimizerConfig(table=kind, table_rate=rate), lambda step: 1e-3)
    table, _ = chosen.update(_grads(2, 0), chosen.init(_table()), _table(), ids)
    moves.append((table - _table())[ids])
  np.testing.assert_allclose(moves[1], 3 * moves[0], atol=1e-6)
  assert (np.abs(moves[0]) > 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_array_of_the_tables_size_is_made(optimized, kind):
  """With donated buffers neither memory nor work grows with the table."""

  def cost(rows):
    table = jax.ShapeDtypeStruct((rows, C), jnp.float32)
    state = jax.eval_shape(OPTIMIZERS[kind].init, table)
    grads, ids = jax.ShapeDtypeStruct((8, C), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)
    compiled = in_place(kind).lower((table, state), grads, ids, jnp.bool_(True)).compile()
    memory = compiled.memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((table, state)))
    assert memory.alias_size_in_bytes >= held
    assert not re.findall(rf"\[{rows}[,\]]\S* copy\(", compiled.as_text())
    return memory.temp_size_in_bytes

  assert cost(1 << 20) == cost(1 << 12) < 20_000
