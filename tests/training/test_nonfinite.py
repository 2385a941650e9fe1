"""Clipping, and what a gradient that is not finite leaves alone."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.training.step import (
  clip_scale,
  first_nonfinite,
  global_norm,
  squared_norms,
  where_tree,
)


def test_the_norm_is_of_all_gradients_together():
  backbone, rows = {"w": jnp.full((3, 3), 2.0)}, jnp.full((4, 4), -2.0)
  norm = global_norm(squared_norms(backbone), jnp.sum(rows**2))
  assert norm == 10.0
  assert norm * clip_scale(norm, 1.0) == pytest.approx(1.0)
  assert clip_scale(norm, 0.0) == clip_scale(norm, 11.0) == 1.0


def test_zero_gradients_clip_to_zero():
  norm = global_norm(squared_norms({"w": jnp.zeros((2, 2))}))
  assert norm == 0
  assert np.isfinite(clip_scale(norm, 1.0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_is_found_and_keeps_the_old_state(bad):
  good = {"a": jnp.zeros(3), "b": (jnp.ones((2, 2)),)}
  new = {"a": jnp.ones(3), "b": (jnp.ones((2, 2)).at[1, 1].set(bad),)}
  ok, not_ok = (jnp.isfinite(global_norm(squared_norms(tree))) for tree in (good, new))
  assert ok
  assert not not_ok
  chex.assert_trees_all_equal(where_tree(not_ok, new, good), good)
  chex.assert_trees_all_equal(where_tree(ok, new, good), new)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_the_first_leaf_that_is_not_finite_is_named_by_its_index(bad):
  """A square that overflows makes the norm infinite, so its leaf is the one to name."""
  good = [jnp.zeros(3), jnp.ones((2, 2)), jnp.float32(7)]
  assert int(first_nonfinite(squared_norms(good))) == -1
  for first in range(3):
    leaves = [x if i < first else x.at[...].set(bad) for i, x in enumerate(good)]
    assert int(first_nonfinite(squared_norms(leaves))) == first
