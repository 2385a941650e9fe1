"""Every parameter has its optimizer by name, and Muon does to matrices what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from engram_jax.config import OptimizerConfig
from engram_jax.training.optimizer import ADAM_RMS, backbone_optimizer, parameter_groups

CFG = OptimizerConfig(weight_decay=0.0)


def _normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def _updates(params, grads, cfg=CFG, rate=1.0):
  """The first step's updates, per unit of learning rate."""
  optimizer = backbone_optimizer(cfg, lambda count: jnp.float32(rate), params)
  return jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0])(params, grads)


def _singular_values(update):
  """Of the orthogonalised matrix behind a Muon update."""
  scale = ADAM_RMS * max(update.shape) ** 0.5
  return np.linalg.svd(np.asarray(update) / scale, compute_uv=False)


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12)])
def test_a_matrix_moves_by_a_near_orthogonal_step_of_adams_size(shape):
  params = {"w_up": _normal(*shape)}
  update = _updates(params, {"w_up": 1e-3 * _normal(*shape, seed=1)})["w_up"]
  values = _singular_values(update)
  assert values.max() < 1.3
  assert values.min() > 0.3 if shape[0] == shape[1] else values.min() > 0.6
  rms = np.sqrt(np.mean(np.square(update)))
  np.testing.assert_allclose(rms, ADAM_RMS, rtol=0.15)


def test_it_points_downhill():
  grads = {"w_up": _normal(16, 16, seed=1)}
  update = _updates({"w_up": _normal(16, 16)}, grads)["w_up"]
  assert jnp.vdot(update, grads["w_up"]) < 0


@pytest.mark.parametrize(
  ("name", "shape", "axis"), [("w_experts_up", (5, 8, 12), 0), ("engram/w_key", (8, 3, 12), 1)]
)
def test_stacked_matrices_move_one_by_one(name, shape, axis):
  """Experts and branches: each is orthogonalised by itself, however large its neighbours are."""
  *parents, leaf = name.split("/")
  nest = lambda x: functools.reduce(lambda tree, key: {key: tree}, [leaf, *reversed(parents)], x)
  sizes = jnp.expand_dims(10.0 ** jnp.arange(shape[axis]), [i for i in range(3) if i != axis])
  grads = sizes * _normal(*shape, seed=1)
  together = jax.tree.leaves(_updates(nest(_normal(*shape)), nest(grads)))[0]
  matrices = [jnp.take(grads, i, axis) for i in range(shape[axis])]
  alone = [
    _updates({"w_up": jnp.zeros_like(matrix)}, {"w_up": matrix})["w_up"] for matrix in matrices
  ]
  np.testing.assert_allclose(together, jnp.stack(alone, axis), atol=1e-5)


def test_an_expert_without_tokens_and_without_momentum_stays():
  grads = {"w_experts_up": _normal(3, 8, 8).at[1].set(0)}
  update = _updates({"w_experts_up": _normal(3, 8, 8, seed=1)}, grads)["w_experts_up"]
  assert jnp.isfinite(update).all()
  assert (update[1] == 0).all()


def test_the_rest_is_adamw_and_decay_spares_gains_and_the_convolution():
  cfg = OptimizerConfig(weight_decay=0.1)
  params = {"embedding": _normal(6, 4), "g_key": _normal(2, 4), "w_conv": _normal(4, 2, 4)}
  grads = jax.tree.map(lambda x: _normal(*x.shape, seed=1), params)
  updates = _updates(params, grads, cfg, rate=0.01)
  mask = {"embedding": True, "g_key": False, "w_conv": False}
  adamw = optax.adamw(0.01, cfg.beta1, cfg.beta2, cfg.eps, weight_decay=0.1, mask=mask)
  expected, _ = adamw.update(grads, adamw.init(params), params)
  for name in params:
    np.testing.assert_allclose(updates[name], expected[name], atol=1e-7)


def test_decay_shrinks_a_matrix_by_rate_times_decay():
  params, grads = {"w_up": _normal(8, 8)}, {"w_up": _normal(8, 8, seed=1)}
  decayed = _updates(params, grads, OptimizerConfig(weight_decay=0.1), rate=0.01)["w_up"]
  plain = _updates(params, grads, rate=0.01)["w_up"]
  np.testing.assert_allclose(decayed - plain, -0.01 * 0.1 * params["w_up"], atol=1e-7)


def test_the_schedule_counts_steps_from_zero():
  params = grads = {"g_key": jnp.ones(3)}
  optimizer = backbone_optimizer(CFG, lambda count: 0.5 + count, params)
  state, sizes = optimizer.init(params), []
  for _ in range(3):
    updates, state = optimizer.update(grads, state, params)
    sizes.append(float(-updates["g_key"][0]))
  np.testing.assert_allclose(sizes, [0.5, 1.5, 2.5], rtol=1e-4)


def test_a_parameter_without_a_rule_is_refused_by_name():
  with pytest.raises(ValueError, match=r"'block/w_novel' of shape \(3, 4\)"):
    backbone_optimizer(CFG, lambda count: 1.0, {"block": {"w_novel": jnp.ones((3, 4))}})


def test_a_matrix_of_another_rank_is_refused_by_name():
  with pytest.raises(ValueError, match=r"'w_up' of shape \(2, 3, 4\) has 3 axes.*'IO'"):
    parameter_groups({"w_up": jnp.ones((2, 3, 4))})


def test_parameters_and_state_are_updated_in_place():
  params = {"w_experts_up": _normal(3, 8, 8), "embedding": _normal(6, 4), "g_key": jnp.ones(4)}
  optimizer = backbone_optimizer(CFG, lambda count: 1e-3, params)
  state = optimizer.init(params)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(carry, grads):
    params, state = carry
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  grads = jax.tree.map(jnp.ones_like, params)
  size = sum(x.nbytes for x in jax.tree.leaves((params, state)))
  assert step.lower((params, state), grads).compile().memory_analysis().alias_size_in_bytes == size
