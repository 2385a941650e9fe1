"""Every parameter has its optimizer by name, and Muon does to matrices what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from engram_jax.config import (
  AttentionConfig,
  EngramConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  ResidualConfig,
)
from engram_jax.model.lm import LM
from engram_jax.training.optimizer import ADAM_RMS, backbone_optimizer, parameter_groups

CFG = OptimizerConfig(weight_decay=0.0)

MUON = """
attention/w_query attention/w_query_down attention/w_query_up attention/w_latent
attention/w_key_rope attention/w_key_up attention/w_value_up attention/w_out
feed_forward/w_gate feed_forward/w_up feed_forward/w_down
moe/w_experts_gate moe/w_experts_up moe/w_experts_down
shared/w_gate shared/w_up shared/w_down engram/w_key engram/w_value
"""
ADAM = """
embedding head moe/w_router attention_residual/w_mix feed_forward_residual/w_mix
"""
ADAM_NO_DECAY = """
g_final attention/g_latent attention/g_query engram/w_conv
engram/b_key engram/b_value engram/g_key engram/g_query engram/g_conv
attention_residual/g_norm feed_forward_residual/g_norm
attention_residual/a_pre attention_residual/a_post attention_residual/a_res
attention_residual/b_pre attention_residual/b_post attention_residual/b_res
feed_forward_residual/a_pre feed_forward_residual/a_post feed_forward_residual/a_res
feed_forward_residual/b_pre feed_forward_residual/b_post feed_forward_residual/b_res
"""


def _parameters(cfg):
  """The shapes of an LM's parameters, as an nnx.State."""
  return nnx.split(nnx.eval_shape(lambda: LM(cfg, rngs=nnx.Rngs(0))), nnx.Param, ...)[1]


def _names(tree):
  """{the last two keys of a path: leaf}; the embedding and its like have one key."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  path = lambda keys: jax.tree_util.keystr(keys, simple=True, separator="/").split("/")
  return {"/".join(path(keys)[-2:]): leaf for keys, leaf in leaves}


def test_every_parameter_of_every_kind_of_model_is_in_its_group():
  memory = EngramConfig(layers=(1,), bias=True)
  models = (
    ModelConfig(engram=memory),
    ModelConfig(engram=memory, attention=AttentionConfig(query_latent=32), tie_embeddings=True),
    ModelConfig(
      moe=MoEConfig(routed_experts=0), residual=ResidualConfig(branches=1), tie_embeddings=True
    ),
  )
  groups = {}
  for cfg in models:
    groups |= _names(parameter_groups(nnx.to_pure_dict(_parameters(cfg))))
  for group, names in (("muon", MUON), ("adam", ADAM), ("adam_no_decay", ADAM_NO_DECAY)):
    assert {name for name, found in groups.items() if found == group} == set(names.split())


def test_an_nnx_state_and_its_pure_dict_are_the_same_to_it():
  state = _parameters(ModelConfig(layers=2))
  of_state = jax.tree.leaves(parameter_groups(state))
  assert of_state == jax.tree.leaves(parameter_groups(nnx.to_pure_dict(state)))
  optimizer = backbone_optimizer(CFG, lambda count: 1e-3, state)
  updates, _ = jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), state)
  assert jax.tree.structure(updates) == jax.tree.structure(state)


def _normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def _updates(params, grads, cfg=CFG, rate=1.0):
  """The first step's updates of the parameters with these names."""
  optimizer = backbone_optimizer(cfg, lambda count: jnp.float32(rate), params)
  return jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0])(params, grads)


def test_a_matrix_moves_by_a_near_orthogonal_step_of_adams_size():
  shapes = {"w_gate": (24, 24), "w_up": (12, 40), "w_down": (40, 12)}
  grads = {name: 1e-3 * _normal(*shape) for name, shape in shapes.items()}
  updates = _updates({"shared": grads}, {"shared": grads})["shared"]
  for name, shape in shapes.items():
    update = np.asarray(updates[name])
    values = np.linalg.svd(update / (ADAM_RMS * max(shape) ** 0.5), compute_uv=False)
    assert values.max() < 1.3
    # A square Gaussian has singular values near zero, which five iterations do not bring to one.
    assert values.min() > (0.3 if name == "w_gate" else 0.6)
    np.testing.assert_allclose(np.sqrt(np.mean(update**2)), ADAM_RMS, rtol=0.15)
    assert np.vdot(update, grads[name]) < 0


def test_experts_and_branches_move_one_by_one_and_heads_as_one():
  """A matrix among others is orthogonalised by itself, however large its neighbours are."""
  experts = _normal(3, 8, 12, seed=1) * jnp.array([1.0, 10.0, 100.0])[:, None, None]
  branches, heads = experts.swapaxes(0, 1), experts.swapaxes(0, 2)
  grads = {
    "moe": {"w_experts_up": experts},
    "engram": {"w_key": branches},
    "attention": {"w_out": heads, "w_query": experts},
    "alone": [{"shared": {"w_up": expert}} for expert in experts],
    "joined": {"shared": {"w_up": heads.reshape(-1, 3), "w_down": experts.reshape(3, -1)}},
  }
  updates = _updates(grads, grads)
  alone = jnp.stack([tree["shared"]["w_up"] for tree in updates["alone"]])
  close = functools.partial(np.testing.assert_allclose, atol=1e-5)
  close(updates["moe"]["w_experts_up"], alone)
  close(updates["engram"]["w_key"], alone.swapaxes(0, 1))
  joined = updates["joined"]["shared"]
  close(updates["attention"]["w_out"], joined["w_up"].reshape(heads.shape))
  close(updates["attention"]["w_query"], joined["w_down"].reshape(experts.shape))


def test_an_expert_without_tokens_and_without_momentum_stays():
  params = {"moe": {"w_experts_up": _normal(3, 8, 8)}}
  grads = {"moe": {"w_experts_up": _normal(3, 8, 8, seed=1).at[1].set(0)}}
  update = np.asarray(_updates(params, grads)["moe"]["w_experts_up"])
  assert np.isfinite(update).all()
  assert (update[1] == 0).all()
  assert (update[0] != 0).all()


def test_the_rest_is_adamw_and_decay_spares_gains_and_the_convolution():
  cfg = OptimizerConfig(weight_decay=0.1)
  params = {
    "embedding": _normal(6, 4),
    "engram": {"g_key": _normal(2, 4), "w_conv": _normal(4, 2, 4)},
    "shared": {"w_up": _normal(8, 8)},
  }
  grads = jax.tree.map(lambda x: _normal(*x.shape, seed=1), params)
  grads["shared"]["w_up"] = jnp.zeros((8, 8))  # so that a matrix shows its decay alone
  updates = _updates(params, grads, cfg, rate=0.01)
  mask = {"embedding": True, "engram": False, "shared": False}
  adamw = optax.adamw(0.01, cfg.beta1, cfg.beta2, cfg.eps, weight_decay=0.1, mask=mask)
  expected, _ = adamw.update(grads, adamw.init(params), params)
  close = functools.partial(np.testing.assert_allclose, atol=1e-7)
  close(updates["embedding"], expected["embedding"])
  close(updates["engram"]["g_key"], expected["engram"]["g_key"])
  close(updates["engram"]["w_conv"], expected["engram"]["w_conv"])
  close(updates["shared"]["w_up"], -0.01 * 0.1 * params["shared"]["w_up"])


def test_the_schedule_counts_steps_from_zero():
  params = grads = {"g_final": jnp.ones(3)}
  optimizer = backbone_optimizer(CFG, lambda count: 0.5 + count, params)
  state, sizes = optimizer.init(params), []
  for _ in range(3):
    updates, state = optimizer.update(grads, state, params)
    sizes.append(float(-updates["g_final"][0]))
  np.testing.assert_allclose(sizes, [0.5, 1.5, 2.5], rtol=1e-4)


def test_a_parameter_without_a_rule_is_refused_by_name():
  with pytest.raises(ValueError, match=r"'block/w_novel' of shape \(3, 4\)"):
    backbone_optimizer(CFG, lambda count: 1.0, {"block": {"w_novel": jnp.ones((3, 4))}})


def test_a_matrix_of_another_rank_is_refused_by_name():
  with pytest.raises(ValueError, match=r"'shared/w_up' of shape \(2, 3, 4\) has 3 axes.*'f t'"):
    parameter_groups({"shared": {"w_up": jnp.ones((2, 3, 4))}})


def test_parameters_and_state_are_updated_in_place(optimized):
  params = {"moe": {"w_experts_up": _normal(3, 8, 8)}, "embedding": _normal(6, 4)}
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
