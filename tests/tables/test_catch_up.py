"""Adam that catches up is dense Adam, whenever somebody looks."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from engram_jax.tables.optimizers import adam_catch_up as catch_up
from engram_jax.tables.optimizers.adam_catch_up import adam_catch_up, decay_steps

R, C, U = 12, 4, 5
RARE = R - 1  # touched by the first steps alone, and read again when it has long stood still
STEPS = 330


def _schedule(step):
  """Warm-up, decay, and steps: nothing that could be taken for a constant."""
  return 4e-3 * jnp.minimum((step + 1) / 20, 1.0) * jnp.where(step < 200, 1.0, 0.3)


def _table():
  return jax.random.normal(jax.random.key(0), (R, C))


@functools.cache
def batches():
  """(ids [U] rising with fill, gradients [U, C]) of each step, from one row to all but one."""
  rng = np.random.default_rng(0)
  made = []
  for step in range(STEPS):
    rows = rng.choice(RARE, rng.integers(0, U), replace=False)
    rows = np.sort(np.append(rows, RARE) if step < 3 else rows)
    ids = np.full(U, 2**31 - 1, np.int32)
    ids[: len(rows)] = rows
    made.append((ids, rng.normal(size=(U, C)).astype(np.float32) * 10.0 ** rng.integers(-4, 2)))
  return made


def dense(ids, grads):
  whole = np.zeros((R, C), np.float32)
  whole[ids[ids < R]] = grads[ids < R]
  return whole


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.95), (0.9, 0.999), (0.0, 0.9), (0.98, 0.95)])
def test_equals_dense_adam_over_hundreds_of_steps(b1, b2):
  """The last pair has b1 > sqrt(b2): there a row without gradients speeds up before it stops."""
  ours, theirs = adam_catch_up(_schedule, b1, b2, 1e-8), optax.adam(_schedule, b1, b2, 1e-8)
  sync, update = jax.jit(ours.sync), jax.jit(ours.update)

  @jax.jit
  def expected_step(grads, state, table):
    updates, state = theirs.update(grads, state)
    return optax.apply_updates(table, updates), state

  table = expected = _table()
  state, expected_state = ours.init(table), theirs.init(table)
  for ids, grads in batches():
    table, state = sync(table, state, ids)
    rows = ids[ids < R]
    np.testing.assert_allclose(table[rows], expected[rows], atol=1e-6)
    table, state = update(grads, state, table, ids)
    expected, expected_state = expected_step(dense(ids, grads), expected_state, expected)
  assert b1 == 0 or np.abs(table - expected).max() > 1e-5  # some rows had yet to catch up
  table, state = jax.jit(ours.flush)(table, state)
  np.testing.assert_allclose(table, expected, atol=1e-6)
  np.testing.assert_allclose(state.mu_RC, expected_state[0].mu, rtol=1e-4, atol=1e-10)
  np.testing.assert_allclose(state.nu_RC, expected_state[0].nu, rtol=1e-4, atol=1e-10)
  assert (state.last_R == STEPS).all()


OURS = adam_catch_up(_schedule)
sync, update, flush = jax.jit(OURS.sync), jax.jit(OURS.update), jax.jit(OURS.flush)


def _some_steps(count, table=None):
  table = _table() if table is None else table
  state = OURS.init(table)
  for ids, grads in batches()[:count]:
    table, state = update(grads, state, table, ids)
  return table, state


def test_an_update_catches_up_with_rows_that_were_not_synced():
  table, state = _some_steps(40)
  ids, grads = batches()[40]
  synced = update(grads, *reversed(sync(table, state, ids)), ids)
  chex.assert_trees_all_close(update(grads, state, table, ids), synced, atol=1e-7)


def test_steps_that_are_not_ok_are_no_steps():
  table, state = _some_steps(30)
  (ids, _), nan = batches()[31], jnp.full((U, C), jnp.nan)
  after = update(nan, state, table, ids, False)
  chex.assert_trees_all_equal(flush(*after), flush(table, state))


def test_looking_changes_nothing():
  """Rows brought up to date in between, or twice, end where they would have."""
  once = flush(*_some_steps(50))
  chex.assert_trees_all_equal(flush(*once), once)
  looked = _table(), OURS.init(_table())
  for ids, grads in batches()[:50]:
    looked = update(grads, *reversed(flush(*looked)), ids)
  np.testing.assert_allclose(flush(*looked)[0], once[0], atol=1e-6)


@pytest.mark.parametrize("rows", [5, 16, 21])
def test_flush_is_sync_of_every_row_in_turns(rows, monkeypatch):
  monkeypatch.setattr(catch_up, "FLUSH_ROWS", 8)
  table, state = _some_steps(20, jax.random.normal(jax.random.key(1), (rows, C)))
  every = sync(table, state, jnp.arange(rows))
  in_turns = jax.jit(lambda *both: OURS.flush(*both))(table, state)
  chex.assert_trees_all_close(in_turns, every, atol=1e-7)


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.95), (0.9, 0.999), (0.5, 0.9), (0.97, 0.95)])
def test_what_a_row_would_still_move_cannot_be_seen(b1, b2):
  """Decay of the worst row: its gradients grew so that its momentum is the largest it can be."""
  if b1 * b1 < b2:
    q = (1 - b1) / math.sqrt((1 - b2) * (1 - b1 * b1 / b2))
    k = np.arange(decay_steps(b1, b2) + 1, 100_000)
    tail = q / (1 - b1) * ((b1 / math.sqrt(b2)) ** k).sum()
    assert tail < 2**-24
    assert tail > 2**-26
  else:
    assert np.float32(3e38) * b1 ** decay_steps(b1, b2) < np.finfo(np.float32).smallest_subnormal


def test_without_momentum_no_row_moves():
  assert decay_steps(0.0, 0.95) == 0
  assert decay_steps(0.9, 0.95) == 272


def test_flush_makes_no_second_table(optimized):
  def temporary(rows):
    table = jax.ShapeDtypeStruct((rows, C), jnp.float32)
    state = jax.eval_shape(OURS.init, table)
    compiled = jax.jit(OURS.flush, donate_argnums=(0, 1)).lower(table, state).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= rows * (3 * C + 1) * 4
    return memory.temp_size_in_bytes

  assert temporary(1 << 20) == temporary(1 << 16)
