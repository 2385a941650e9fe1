"""Row-wise Adagrad against its formula in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.tables.optimizers.adagrad import adagrad

R, C, EPS = 10, 4, 1e-6


def test_equals_dense_row_wise_adagrad():
  rate = lambda step: 0.1 / (1 + step)
  ours = adagrad(rate, EPS)
  rng = np.random.default_rng(0)
  table = rng.normal(size=(R, C)).astype(np.float32)
  expected, square = table.astype(np.float64), np.zeros(R)
  table, state = jnp.asarray(table), ours.init(table)
  update = jax.jit(ours.update)
  for step in range(20):
    ids = np.sort(rng.choice(R, 4, replace=False)).astype(np.int32)
    grads = rng.normal(size=(4, C)).astype(np.float32)
    table, state = update(grads, state, table, ids)
    dense = np.zeros((R, C))
    dense[ids] = grads
    square += (dense**2).mean(1)
    expected -= rate(step) * dense / (np.sqrt(square) + EPS)[:, None]
  np.testing.assert_allclose(table, expected, atol=1e-6)
  np.testing.assert_allclose(state.square_R, square, rtol=1e-6)


def test_a_rows_first_step_has_an_rms_of_the_learning_rate():
  ours = adagrad(0.01)
  table, grads = jnp.zeros((R, C)), jax.random.normal(jax.random.key(0), (2, C)) * 1e-3
  table, _ = ours.update(grads, ours.init(table), table, jnp.array([1, 4]))
  np.testing.assert_allclose(jnp.sqrt((table[jnp.array([1, 4])] ** 2).mean(1)), 0.01, rtol=1e-4)


def test_its_state_is_one_number_a_row():
  state = adagrad(0.01).init(jnp.zeros((R, C), jnp.bfloat16))
  assert state.square_R.shape == (R,)
  assert state.square_R.dtype == jnp.float32


def test_a_gradient_of_zero_moves_nothing():
  ours = adagrad(0.01)
  table = jnp.ones((R, C))
  new, state = ours.update(jnp.zeros((1, C)), ours.init(table), table, jnp.array([3]))
  np.testing.assert_array_equal(new, table)
  assert (state.square_R == 0).all()
