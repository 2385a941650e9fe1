"""The learning rate at the steps where something happens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import ScheduleConfig
from engram_jax.core.schedule import learning_rate


def _at(cfg, steps, *points, peak=4e-4):
  schedule = jax.jit(learning_rate(cfg, peak, steps))
  return [float(schedule(jnp.int32(point))) / peak for point in points]


def test_warm_up_starts_above_zero_and_ends_at_the_peak():
  cfg = ScheduleConfig(kind="constant", warmup_steps=10)
  np.testing.assert_allclose(_at(cfg, 100, 0, 4, 9, 10, 99), [0.1, 0.5, 1, 1, 1], rtol=1e-6)


def test_without_warm_up_the_first_step_takes_the_peak():
  cfg = ScheduleConfig(kind="constant", warmup_steps=0)
  np.testing.assert_allclose(_at(cfg, 100, 0, 1), [1, 1], rtol=1e-6)


def test_steps_down_where_the_paper_does():
  cfg = ScheduleConfig(kind="step", warmup_steps=20)
  values = _at(cfg, 400, 20, 319, 320, 359, 360, 399)
  np.testing.assert_allclose(values, [1, 1, 0.316, 0.316, 0.1, 0.1], rtol=1e-6)


def test_a_share_that_is_not_exact_in_binary_lands_on_its_step():
  cfg = ScheduleConfig(kind="step", warmup_steps=0, decay_at=(0.07,), decay_to=(0.5,))
  assert 0.07 * 100 > 7
  np.testing.assert_allclose(_at(cfg, 100, 6, 7), [1, 0.5], rtol=1e-6)


def test_cosine_falls_from_the_peak_to_its_final_share():
  cfg = ScheduleConfig(kind="cosine", warmup_steps=20, final=0.2)
  np.testing.assert_allclose(_at(cfg, 220, 20, 120, 220, 999), [1, 0.6, 0.2, 0.2], rtol=1e-6)
  curve = np.array(_at(cfg, 220, *range(20, 221, 20)))
  assert (np.diff(curve) < 0).all()


@pytest.mark.parametrize("kind", ["step", "cosine", "constant"])
def test_returns_float32_of_the_steps_shape(kind):
  schedule = learning_rate(ScheduleConfig(kind=kind, warmup_steps=3), 1e-3, 10)
  rates = schedule(jnp.arange(10))
  assert (rates.shape, rates.dtype) == ((10,), jnp.float32)
  np.testing.assert_allclose(rates, [schedule(step) for step in range(10)], rtol=1e-6)
