"""Touched-row Adam is Adam on the rows that were touched, and nothing happens to the others."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from engram_jax.training.nonfinite import clip_by_global_norm, keep_if
from engram_jax.training.rows import RowAdamState, touched_row_adam

R, C = 16, 4
OPTIMIZER = touched_row_adam(0.01)
update = jax.jit(OPTIMIZER.update)


@functools.partial(jax.jit, donate_argnums=0)
def in_place(carry, grads, ids, ok):
  """As in the training step: what goes in comes out in the same order, so buffers pair up."""
  table, state = carry
  return OPTIMIZER.update(grads, state, table, ids, ok)


def _table(seed=0):
  return jax.random.normal(jax.random.key(seed), (R, C))


def _grads(count, step):
  return jax.random.normal(jax.random.key(100 + step), (count, C))


def _ids(*ids):
  return jnp.array(ids, jnp.int32)


def _warm():
  """A table and a state that has seen a step, so that zeros cannot hide a mistake."""
  table = _table()
  return update(_grads(R, 0), OPTIMIZER.init(table), table, jnp.arange(R))


def test_equals_optax_adam_where_every_row_is_touched():
  schedule = optax.linear_schedule(0.01, 0.05, 5)
  ours, theirs = touched_row_adam(schedule, 0.9, 0.95, 1e-8), optax.adam(schedule, 0.9, 0.95, 1e-8)
  table = expected = _table()
  state, expected_state = ours.init(table), theirs.init(table)
  step, expected_step = jax.jit(ours.update), jax.jit(theirs.update)
  for i in range(6):
    grads, order = _grads(R, i), jax.random.permutation(jax.random.key(i), R)
    table, state = step(grads[order], state, table, order)
    updates, expected_state = expected_step(grads, expected_state)
    expected = optax.apply_updates(expected, updates)
    np.testing.assert_allclose(table, expected, atol=1e-6)
  assert state.count == 6


def test_a_rare_row_moves_as_adam_on_its_own_gradients():
  adam = optax.adam(0.01, 0.9, 0.95)
  table, rare = _table(), 5
  row = table[rare]
  state, row_state = OPTIMIZER.init(table), adam.init(row)
  for i in range(8):
    touched = i in (2, 3, 7)
    ids, grads = _ids(1, rare if touched else 9), _grads(2, i)
    table, state = update(grads, state, table, ids)
    if touched:
      moved, row_state = adam.update(grads[1], row_state)
      row = optax.apply_updates(row, moved)
  np.testing.assert_allclose(table[rare], row, atol=1e-6)
  assert state.touched_R[rare] == 3
  assert state.touched_R[1] == 8


def test_only_touched_rows_move():
  table, state = _warm()
  ids = np.array([3, 11, 4], np.int32)
  new_table, new_state = update(_grads(3, 1), state, table, ids)
  rest = np.setdiff1d(np.arange(R), ids)
  untouched = lambda table, state: [np.asarray(x)[rest] for x in (table, *state[1:])]
  chex.assert_trees_all_equal(untouched(new_table, new_state), untouched(table, state))
  for new, old in zip((new_table, *new_state[1:]), (table, *state[1:]), strict=True):
    assert (np.asarray(new)[ids] != np.asarray(old)[ids]).all()


@pytest.mark.parametrize("fill", [R, R + 7, 2**31 - 1, -1])
def test_fill_entries_are_dropped(fill):
  table, state = _warm()
  grads = _grads(2, 1)
  padded = jnp.concatenate([grads, jnp.full((2, C), jnp.nan)])
  chex.assert_trees_all_equal(
    update(padded, state, table, _ids(3, 11, fill, fill)), update(grads, state, table, _ids(3, 11))
  )


def test_a_step_that_is_not_ok_changes_nothing_bit_for_bit():
  table, state = _warm()
  table = table.at[0].set(-0.0)
  grads = jnp.full((R, C), jnp.nan)
  kept = update(grads, state, table, jnp.arange(R), jnp.bool_(False))
  bits = lambda tree: jax.tree.map(lambda x: np.asarray(x).view(np.int32), tree)
  chex.assert_trees_all_equal(bits(kept), bits((table, state)))


def test_micro_batches_merge_by_their_ids():
  """Distinct ids of the concatenation, gradients summed: the step of the whole batch."""
  table, state = _warm()
  first, second = np.array([3, 5, 3]), np.array([5, 8, 8])
  grads = np.asarray(_grads(6, 1))
  distinct, inverse = np.unique(np.concatenate([first, second]), return_inverse=True)
  merged = np.zeros((len(distinct), C), np.float32)
  np.add.at(merged, inverse, grads)
  dense = jnp.zeros((R, C)).at[first].add(grads[:3]).at[second].add(grads[3:])
  np.testing.assert_allclose(merged, dense[distinct], atol=1e-6)
  got = update(jnp.asarray(merged), state, table, _ids(*distinct))
  every, _ = update(dense, state, table, jnp.arange(R))
  np.testing.assert_allclose(got[0][distinct], every[distinct], atol=1e-6)


def test_bfloat16_tables_keep_float32_moments():
  table = _table().astype(jnp.bfloat16)
  new, state = update(_grads(2, 1), OPTIMIZER.init(table), table, _ids(1, 2))
  assert new.dtype == jnp.bfloat16
  assert state.mu_RC.dtype == state.nu_RC.dtype == jnp.float32


def test_no_array_of_the_tables_size_is_made():
  """With donated buffers neither memory nor work grows with the table."""

  def cost(rows):
    table = jax.ShapeDtypeStruct((rows, C), jnp.float32)
    state = jax.eval_shape(OPTIMIZER.init, table)
    grads, ids = jax.ShapeDtypeStruct((8, C), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)
    compiled = in_place.lower((table, state), grads, ids, jnp.bool_(True)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= rows * (3 * C + 1) * 4
    assert " copy(" not in compiled.as_text()
    return memory.temp_size_in_bytes

  assert cost(1 << 20) == cost(1 << 12) < 10_000


def test_donated_buffers_are_reused():
  table = _table()
  state = OPTIMIZER.init(table)
  where = [x.unsafe_buffer_pointer() for x in (table, state.mu_RC, state.nu_RC)]
  new, state = in_place((table, state), _grads(2, 0), _ids(0, 1), jnp.bool_(True))
  assert [x.unsafe_buffer_pointer() for x in (new, state.mu_RC, state.nu_RC)] == where
  assert isinstance(state, RowAdamState)


def test_clipping_is_of_all_gradients_together():
  grads = ({"w": jnp.full((3, 3), 2.0)}, (jnp.full((4, 4), -2.0),))
  clipped, norm = clip_by_global_norm(grads, 1.0)
  assert norm == 10.0
  np.testing.assert_allclose(optax.tree.norm(clipped), 1.0, rtol=1e-6)
  chex.assert_trees_all_equal(clip_by_global_norm(grads, 0.0), (grads, norm))
  chex.assert_trees_all_equal(clip_by_global_norm(grads, 11.0), (grads, norm))


def test_zero_gradients_clip_to_zero():
  clipped, norm = clip_by_global_norm({"w": jnp.zeros((2, 2))}, 1.0)
  assert norm == 0
  assert (clipped["w"] == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_is_found_and_keeps_the_old_state(bad):
  good = {"a": jnp.zeros(3), "b": (jnp.ones((2, 2)),)}
  new = {"a": jnp.ones(3), "b": (jnp.ones((2, 2)).at[1, 1].set(bad),)}
  ok, not_ok = (jnp.isfinite(clip_by_global_norm(tree, 1.0)[1]) for tree in (good, new))
  assert ok
  assert not not_ok
  chex.assert_trees_all_equal(keep_if(not_ok, new, good), good)
  chex.assert_trees_all_equal(keep_if(ok, new, good), new)
