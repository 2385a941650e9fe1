"""Stochastic rounding is right on average, and its noise belongs to a place and a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_jax.config import OptimizerConfig
from engram_jax.tables.table_optimizer import (
  STEP,
  SYNC,
  noise,
  put_rounded,
  round_by,
  table_optimizer,
  writable,
)

ROWS = jnp.arange(1 << 14, dtype=jnp.uint32)
EDGES = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -3.5, 2.0**-120], np.float32)
round_jit, noise_jit = jax.jit(round_by), jax.jit(noise, static_argnums=(1, 3))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.floats(width=32, allow_nan=False, min_value=-(2.0**120), max_value=2.0**120))
def test_rounds_to_one_of_the_two_neighbours_and_is_right_on_average(value):
  x = np.float32(value)
  draws = round_jit(np.full((len(ROWS), 1), x), noise_jit(7, STEP, ROWS, 1))
  draws = np.asarray(draws, np.float64)
  low, high = np.sort([_towards_zero(x), _away(x)])
  assert set(np.unique(draws)) <= {low, high}
  share, got = (np.float64(x) - low) / max(high - low, 1e-300), (draws == high).mean()
  if high > low:
    assert abs(got - share) < 6 * np.sqrt(0.25 / len(ROWS))


def _towards_zero(x):
  return np.float64((x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))


def _away(x):
  bits = x.view(np.uint32)
  return np.float64(((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32))


def test_what_bfloat16_holds_stays_as_it_is_whatever_the_noise():
  every = jax.lax.bitcast_convert_type(jnp.arange(1 << 16, dtype=jnp.uint16), jnp.bfloat16)
  for bits in (0, 2**32 - 1):
    got = round_jit(every.astype(jnp.float32), jnp.full(every.shape, bits, jnp.uint32))
    finite = np.isfinite(every.astype(np.float32))
    same = np.asarray(got).view(np.uint16) == np.asarray(every).view(np.uint16)
    normal = np.abs(np.asarray(every, np.float32)) >= 2.0**-126  # the CPU flushes those below
    assert same[finite & normal].all()


def test_infinities_and_nan_stay():
  got = round_jit(jnp.asarray(EDGES), jnp.full(EDGES.shape, 2**32 - 1, jnp.uint32))
  np.testing.assert_array_equal(np.asarray(got, np.float32), EDGES)


def test_noise_is_uniform_and_of_the_place_alone():
  first = np.asarray(noise_jit(3, STEP, ROWS, 8))
  shares = (first[..., None] >> np.arange(32, dtype=np.uint32) & 1).mean((0, 1))
  np.testing.assert_allclose(shares, 0.5, atol=6 * np.sqrt(0.25 / first.size))
  counts = np.bincount((first >> 24).ravel(), minlength=256)
  assert np.abs(counts - counts.mean()).max() < 6 * np.sqrt(counts.mean())
  np.testing.assert_array_equal(noise_jit(3, STEP, ROWS[100:107], 3), first[100:107, :3])


@pytest.mark.parametrize(
  "other", [lambda: noise(4, STEP, ROWS, 8), lambda: noise(3, SYNC, ROWS, 8), None, "columns"]
)
def test_noise_of_other_steps_streams_rows_and_columns_is_unrelated(other):
  first = np.asarray(noise(3, STEP, ROWS, 8))
  pairs = {None: (first[1:], first[:-1]), "columns": (first[:, 1:], first[:, :-1])}
  a, b = pairs[other] if other in pairs else (np.asarray(other()), first)
  correlation = np.corrcoef(a.ravel(), b.ravel())[0, 1]
  assert abs(correlation) < 6 / np.sqrt(a.size)
  assert abs((a == b).mean()) < 1e-3


def test_first_row_says_where_in_the_whole_table_a_shard_is():
  table, rows = jnp.zeros((16, 4), jnp.bfloat16), jax.random.normal(jax.random.key(0), (16, 4))

  @jax.jit
  def put(table, rows, first):
    ids = writable(jnp.arange(len(rows)), len(rows))
    return put_rounded(table, ids, rows, step=jnp.int32(5), first_row=first, stream=STEP)

  whole = put(table, rows, 0)
  np.testing.assert_array_equal(put(table[8:], rows[8:], 8), whole[8:])
  assert (put(table[8:], rows[8:], 0) != whole[8:]).any()


@pytest.mark.parametrize("kind", ["adam", "adam_catch_up", "adagrad", "sinkhorn"])
def test_steps_too_small_for_the_table_add_up(kind):
  """Each is a hundredth of the spacing of bfloat16 at 1; to nearest, nothing would ever move."""
  config = OptimizerConfig(table=kind, table_rate=1.0)
  scale = 0.18 if kind == "sinkhorn" else 1.0
  spacing = 2.0**-8
  step = 0.01 * spacing
  # Adagrad's steps shrink with the root of their number; this schedule undoes that.
  rate = lambda s: step / scale * (jnp.sqrt(s + 1.0) if kind == "adagrad" else 1.0)
  chosen = table_optimizer(config, rate)
  table = jnp.full((256, 4), 1.0, jnp.bfloat16)
  state, grads, update = chosen.init(table), jnp.ones((256, 4)), jax.jit(chosen.update)
  for _ in range(50):
    table, state = update(grads, state, table, jnp.arange(256))
  moved = 1 - np.asarray(table, np.float64).mean()
  np.testing.assert_allclose(moved, 50 * step, rtol=0.1)
