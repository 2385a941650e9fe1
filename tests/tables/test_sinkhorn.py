"""Momentum with Sinkhorn balancing against the same written out over whole matrices in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.tables.optimizers.sinkhorn import ADAM_RMS, sinkhorn

R, C, RATE = 12, 6, 0.1
update = jax.jit(sinkhorn(RATE).update)


def _rms(x, axis):
  return np.sqrt((x**2).mean(axis, keepdims=True))


def balanced(x):
  x = x.astype(np.float64)
  active = _rms(x, 1)[:, 0] >= 1e-3 * np.sqrt((x**2).mean())
  y = x[active]
  for turn in range(11):
    y = y / _rms(y, 1 - turn % 2)
  out = np.zeros_like(x)
  out[active] = y
  return out


def _start(dtype=jnp.float32):
  table = jax.random.normal(jax.random.key(0), (R, C)).astype(dtype)
  return table, sinkhorn(RATE).init(table)


def _grads(rng, count):
  """Rows and columns that differ in size a hundredfold, as rows met once and often do."""
  scales = 10.0 ** rng.uniform(-1, 1, (count, 1)) * 10.0 ** rng.uniform(-1, 1, (1, C))
  return (1e-4 * scales * rng.normal(size=(count, C))).astype(np.float32)


def test_equals_the_plain_form_on_the_touched_rows():
  rng = np.random.default_rng(0)
  table, state = _start()
  expected, mu = np.asarray(table, np.float64), np.zeros((R, C))
  for _ in range(10):
    ids = np.sort(rng.choice(R, 7, replace=False)).astype(np.int32)
    grads = _grads(rng, 7)
    padded = np.append(ids, np.int32(2**31 - 1)), np.append(grads, np.full((1, C), np.nan), 0)
    table, state = update(padded[1].astype(np.float32), state, table, padded[0])
    mu[ids] = 0.95 * mu[ids] + grads
    expected[ids] -= RATE * ADAM_RMS * balanced(0.95 * mu[ids] + grads)
  np.testing.assert_allclose(table, expected, atol=1e-5)
  np.testing.assert_allclose(state.mu_RC, mu, rtol=1e-4, atol=1e-9)


def test_every_active_row_moves_as_far_as_the_others_and_so_does_every_column():
  table, state = _start()
  new, _ = update(_grads(np.random.default_rng(1), R), state, table, jnp.arange(R))
  moved = np.asarray(new - table) / (RATE * ADAM_RMS)
  np.testing.assert_allclose(_rms(moved, 1), 1, rtol=1e-3)
  np.testing.assert_allclose(_rms(moved, 0), 1, rtol=0.05)


def test_the_scale_of_the_loss_does_not_matter():
  table, state = _start()
  grads = _grads(np.random.default_rng(2), R)
  small, large = (update(grads * s, state, table, jnp.arange(R))[0] for s in (1e-6, 1e6))
  np.testing.assert_allclose(small, large, atol=1e-6)


def test_rows_with_next_to_no_gradient_stand_still_and_are_counted_nowhere():
  table, state = _start()
  grads = _grads(np.random.default_rng(3), R) * 1e3
  grads[[2, 5]] = [[0.0], [1e-7]]
  new, _ = update(grads, state, table, jnp.arange(R))
  rest = np.setdiff1d(np.arange(R), [2, 5])
  np.testing.assert_array_equal(new[jnp.array([2, 5])], table[jnp.array([2, 5])])
  without, _ = update(grads[rest], state, table, jnp.asarray(rest))
  np.testing.assert_allclose(new, without, atol=1e-6)


@pytest.mark.parametrize("column", ["all", 1])
def test_zeros_are_divided_by_nothing(column):
  table, state = _start()
  grads = _grads(np.random.default_rng(4), R)
  where = slice(None) if column == "all" else column
  grads[:, where] = 0
  new, _ = update(grads, state, table, jnp.arange(R))
  np.testing.assert_array_equal(new[:, where], table[:, where])
  assert jnp.isfinite(new).all()


def test_a_batch_without_rows_is_a_step_that_moves_none():
  table, state = _start()
  new, new_state = update(jnp.ones((2, C)), state, table, jnp.full(2, 2**31 - 1, jnp.int32))
  np.testing.assert_array_equal(new, table)
  assert new_state.count == 1


def test_momentum_is_kept_in_the_tables_type():
  """One state of two bytes a number, where Adam has two of four."""
  table, state = _start(jnp.bfloat16)
  assert state.mu_RC.dtype == jnp.bfloat16
  grads = _grads(np.random.default_rng(5), R)
  _, state = update(grads, state, table, jnp.arange(R))
  np.testing.assert_allclose(state.mu_RC.astype(jnp.float32), grads, rtol=2**-7)
