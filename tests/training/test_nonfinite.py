"""Clipping, and what a gradient that is not finite leaves alone."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.training.step import clip_scale, global_norm, where_tree


def test_the_norm_is_of_all_gradients_together():
  backbone, rows = {"w": jnp.full((3, 3), 2.0)}, jnp.full((4, 4), -2.0)
  norm = global_norm(backbone, jnp.sum(rows**2))
  assert norm == 10.0
  assert norm * clip_scale(norm, 1.0) == pytest.approx(1.0)
  assert clip_scale(norm, 0.0) == clip_scale(norm, 11.0) == 1.0


def test_zero_gradients_clip_to_zero():
  norm = global_norm({"w": jnp.zeros((2, 2))})
  assert norm == 0
  assert np.isfinite(clip_scale(norm, 1.0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_is_found_and_keeps_the_old_state(bad):
  good = {"a": jnp.zeros(3), "b": (jnp.ones((2, 2)),)}
  new = {"a": jnp.ones(3), "b": (jnp.ones((2, 2)).at[1, 1].set(bad),)}
  ok, not_ok = (jnp.isfinite(global_norm(tree)) for tree in (good, new))
  assert ok
  assert not not_ok
  chex.assert_trees_all_equal(where_tree(not_ok, new, good), good)
  chex.assert_trees_all_equal(where_tree(ok, new, good), new)
