"""Orthogonalisation of many matrices at a time is optax's of each by itself."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from optax.contrib import MuonDimensionNumbers
from optax.contrib import scale_by_muon as optax_muon

from engram_jax.training.muon import newton_schulz, scale_by_muon

AXES = {"wide": "IO", "tall": "IO", "experts": "EIO", "heads": "IOO", "out": "IIO", "keys": "IGO"}
SHAPES = {
  "wide": (4, 6),
  "tall": (6, 4),
  "experts": (3, 4, 6),
  "heads": (4, 2, 3),
  "out": (2, 3, 4),
  "keys": (6, 2, 4),
}


def tree(seed):
  random = np.random.default_rng(seed)
  return {k: jnp.asarray(random.standard_normal(s), jnp.float32) for k, s in SHAPES.items()}


def numbers(_):
  positions = lambda axes, letter: tuple(i for i, axis in enumerate(axes) if axis == letter)
  return {k: MuonDimensionNumbers(positions(a, "I"), positions(a, "O")) for k, a in AXES.items()}


def test_equals_optax_over_several_steps():
  ours = scale_by_muon(lambda _: AXES, 5, 0.9)
  theirs = optax_muon(ns_steps=5, beta=0.9, weight_dimension_numbers=numbers)
  one, two = ours.init(tree(0)), theirs.init(tree(0))
  for step in range(3):
    a, one = jax.jit(ours.update)(tree(step), one)
    b, two = jax.jit(theirs.update)(tree(step), two)
    chex.assert_trees_all_close(a, b, rtol=2e-4, atol=2e-5)
  chex.assert_trees_all_close(one.mu, two.mu)


def test_singular_values_come_near_one():
  x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 8, 20)), jnp.float32)
  values = np.linalg.svd(newton_schulz(x, 5), compute_uv=False)
  assert values.min() > 0.6
  assert values.max() < 1.3


def test_a_zero_gradient_moves_nothing():
  assert not np.any(newton_schulz(jnp.zeros((1, 3, 5)), 5))
