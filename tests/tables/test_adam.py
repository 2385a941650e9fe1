"""Touched-row Adam is Adam on the rows that were touched."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from engram_jax.tables.optimizers.adam import adam

R, C = 16, 4


def _table(seed=0):
  return jax.random.normal(jax.random.key(seed), (R, C))


def _grads(count, step):
  return jax.random.normal(jax.random.key(100 + step), (count, C))


def test_equals_optax_adam_where_every_row_is_touched():
  schedule = optax.linear_schedule(0.01, 0.05, 5)
  ours, theirs = adam(schedule, 0.9, 0.95, 1e-8), optax.adam(schedule, 0.9, 0.95, 1e-8)
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
  ours, theirs = adam(0.01), optax.adam(0.01, 0.9, 0.95)
  update = jax.jit(ours.update)
  table, rare = _table(), 5
  row = table[rare]
  state, row_state = ours.init(table), theirs.init(row)
  for i in range(8):
    touched = i in (2, 3, 7)
    ids, grads = jnp.array([1, rare if touched else 9], jnp.int32), _grads(2, i)
    table, state = update(grads, state, table, ids)
    if touched:
      moved, row_state = theirs.update(grads[1], row_state)
      row = optax.apply_updates(row, moved)
  np.testing.assert_allclose(table[rare], row, atol=1e-6)
  assert state.touched_R[rare] == 3
  assert state.touched_R[1] == 8


def test_bfloat16_tables_keep_float32_moments():
  state = adam(0.01).init(_table().astype(jnp.bfloat16))
  assert state.mu_RC.dtype == state.nu_RC.dtype == jnp.float32
