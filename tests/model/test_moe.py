"""Mixture of experts: three dispatches of one sum, the router, balancing without a loss."""

import functools
import itertools
import types
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import MoEConfig
from engram_jax.model import expert_dispatch as dispatch
from engram_jax.model import moe as moe_module
from engram_jax.model.grouped_product_gpu import gpu_grouped_product
from engram_jax.model.grouped_product_tpu import tpu_grouped_product
from engram_jax.model.moe import FeedForward, MoE
from engram_jax.model.router import RouterBias, expert_load, updated_bias

WIDTH, HIDDEN = 8, 12

# Kernels of accelerators, their operations one by one.
KERNELS = {
  name: functools.partial(
    dispatch.ragged_experts, product=functools.partial(product, interpret=True)
  )
  for name, product in (("tpu", tpu_grouped_product), ("gpu", gpu_grouped_product))
}
route = jax.jit(moe_module.route, static_argnums=(3, 4))


def _routing(kind: str) -> tuple[np.ndarray, int]:
  """(experts_SK, E) of one routing pattern; 75 tokens divide by no block."""
  rng = np.random.default_rng(0)
  tokens, experts = 75, 6
  random = np.argsort(rng.random((tokens, experts)), axis=1)
  return {
    "random": (random[:, :2], experts),
    "one_expert": (np.full((tokens, 1), 3), experts),
    "two_of_six": (np.tile([[4, 1]], (tokens, 1)), experts),
    "top_1": (random[:, :1], experts),
    "all": (random, experts),
  }[kind]


@functools.partial(jax.jit, static_argnums=0)
def _value_and_grads(experts_fn, args, target_SD):
  x, experts, *floats = args

  def loss(x, *floats):
    y_SD = experts_fn(x, experts, *floats)
    return jnp.vdot(y_SD, target_SD), y_SD

  return jax.grad(loss, argnums=range(5), has_aux=True)(x, *floats)


def _arguments(kind: str, dtype=jnp.float32):
  experts_SK, experts = _routing(kind)
  rng = np.random.default_rng(1)
  tokens = len(experts_SK)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  return (
    normal(tokens, WIDTH),
    jnp.asarray(experts_SK, jnp.int32),
    jnp.asarray(rng.random(experts_SK.shape), jnp.float32),
    normal(experts, WIDTH, HIDDEN),
    normal(experts, WIDTH, HIDDEN),
    normal(experts, HIDDEN, WIDTH),
  ), normal(tokens, WIDTH)


@pytest.mark.parametrize(
  ("name", "kind"),
  [
    *itertools.product(
      ("blocked", "ragged"), ("random", "one_expert", "two_of_six", "top_1", "all")
    ),
    *itertools.product(("tpu", "gpu"), ("random", "one_expert")),  # interpreted: slower
  ],
)
def test_dispatch_equals_dense_in_value_and_every_gradient(name: str, kind: str):
  args, target_SD = _arguments(kind)
  experts = KERNELS[name] if name in KERNELS else dispatch.experts_for(name)
  want = _value_and_grads(dispatch.dense_experts, args, target_SD)
  got = _value_and_grads(experts, args, target_SD)
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)


def test_dense_is_the_sum_over_chosen_experts():
  (x, experts, weights, w_gate, w_up, w_down), _ = _arguments("random")
  args = [np.asarray(a, np.float64) for a in (x, weights, w_gate, w_up, w_down)]
  x64, weights64, gate64, up64, down64 = args
  want = np.zeros_like(x64)
  for s, chosen in enumerate(np.asarray(experts)):
    for k, e in enumerate(chosen):
      gate = x64[s] @ gate64[e]
      want[s] += weights64[s, k] * (gate / (1 + np.exp(-gate)) * (x64[s] @ up64[e])) @ down64[e]
  got = dispatch.dense_experts(x, experts, weights, w_gate, w_up, w_down)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_blocked_does_no_work_on_unused_blocks():
  args, _ = _arguments("two_of_six")
  rows = dispatch.block_rows(args[1].size, 6)
  blocks = jax.jit(dispatch._blocks, static_argnums=(1, 2))(args[1], 6, rows)
  used = int(blocks.used)
  assert used == 2 * -(-75 // rows)
  assert set(np.asarray(blocks.expert_P[:used])) == {1, 4}
  held = np.asarray(blocks.assignment_PQ).reshape(-1)
  np.testing.assert_array_equal(held[np.asarray(blocks.row_SK).reshape(-1)], np.arange(150))
  assert np.sum(held < 150) == 150


def test_blocked_keeps_the_compute_dtype_and_is_close_in_bfloat16():
  args, target_SD = _arguments("random", jnp.bfloat16)
  grads, y_SD = _value_and_grads(dispatch.blocked_experts, args, target_SD)
  assert y_SD.dtype == jnp.bfloat16
  assert [g.dtype for g in grads] == [args[0].dtype] + [a.dtype for a in args[2:]]
  exact = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, args)
  want = _value_and_grads(dispatch.dense_experts, exact, target_SD.astype(jnp.float32))
  for got_leaf, want_leaf in zip(
    jax.tree.leaves((grads, y_SD)), jax.tree.leaves(want), strict=True
  ):
    error = jnp.linalg.norm(got_leaf.astype(jnp.float32) - want_leaf) / jnp.linalg.norm(want_leaf)
    assert error < 0.02


def test_block_rows_stay_in_range():
  assert dispatch.block_rows(1, 64) == 16
  assert dispatch.block_rows(8192, 16) == 256
  assert dispatch.block_rows(10**7, 4) == 512


def test_auto_is_blocked_on_cpu():
  assert dispatch.experts_for("auto") is dispatch.blocked_experts


class Device(NamedTuple):
  """As much of a jax.Device as the choice of kernels asks for."""

  platform: str
  compute_capability: str = ""


@pytest.mark.parametrize(
  ("device", "product"),
  [
    (Device("tpu"), tpu_grouped_product),
    (Device("gpu", "9.0"), gpu_grouped_product),
    (Device("gpu", "8.0"), gpu_grouped_product),
    (Device("gpu", "7.5"), None),
    (Device("gpu", "gfx90a"), None),
  ],
)
def test_auto_takes_the_kernel_of_the_device(device, product):
  mesh = types.SimpleNamespace(devices=np.asarray([None]))
  mesh.devices[0] = device
  found = dispatch.experts_for("auto", mesh)
  assert (
    found is dispatch.ragged_experts if product is None else found.keywords["product"] is product
  )


def _router(seed: int = 0, tokens: int = 64, experts: int = 8) -> tuple[jax.Array, jax.Array]:
  keys = jax.random.split(jax.random.key(seed))
  return jax.random.normal(keys[0], (tokens, WIDTH)), jax.random.normal(keys[1], (WIDTH, experts))


def test_weights_are_the_chosen_scores_and_sum_to_the_scale():
  x, w = _router()
  experts, weights = route(x, w, jnp.zeros(8), 3, 2.5)
  scores = 1 / (1 + np.exp(-np.asarray(x, np.float64) @ np.asarray(w, np.float64)))
  want = np.sort(scores, axis=1)[:, ::-1][:, :3]
  np.testing.assert_allclose(weights, 2.5 * want / want.sum(1, keepdims=True), rtol=1e-5)
  np.testing.assert_allclose(jnp.sum(weights, -1), 2.5, rtol=1e-6)
  assert experts.dtype == jnp.int32
  assert all(len(set(row)) == 3 for row in np.asarray(experts).tolist())


def test_bias_changes_the_choice_but_not_the_weights():
  x, w = _router()
  bias = jnp.zeros(8).at[5].set(10.0).at[2].set(10.0)
  experts, weights = route(x, w, bias, 2, 1.0)
  np.testing.assert_array_equal(np.sort(experts, axis=1), np.tile([2, 5], (64, 1)))
  chosen = np.take_along_axis(np.asarray(jax.nn.sigmoid(x @ w)), np.asarray(experts), axis=1)
  np.testing.assert_allclose(weights, chosen / chosen.sum(1, keepdims=True), rtol=1e-5)


def test_only_the_scores_carry_a_gradient():
  x, w = _router()
  target = jax.random.normal(jax.random.key(3), (64, 2))

  def loss(w, bias):
    return jnp.vdot(route(x, w, bias, 2, 1.0)[1], target)

  d_router, d_bias = jax.jit(jax.grad(loss, argnums=(0, 1)))(w, 0.1 * jnp.arange(8.0))
  assert jnp.linalg.norm(d_router) > 0
  np.testing.assert_array_equal(d_bias, 0)


def test_load_is_the_share_of_assignments():
  load = expert_load(jnp.asarray([[0, 2], [2, 3], [2, 0]]), 5)
  np.testing.assert_allclose(load, [2 / 6, 0, 3 / 6, 1 / 6, 0], rtol=1e-6)
  assert load.dtype == jnp.float32


def test_bias_drives_a_skewed_router_towards_balance():
  rng = np.random.default_rng(0)
  scores = 1 / (1 + np.exp(-(rng.normal(size=(512, 8)) + np.linspace(-2, 2, 8))))
  bias, worst = jnp.zeros(8), []
  for _ in range(150):
    experts = np.argsort(-(scores + np.asarray(bias)), axis=1)[:, :2]
    load = expert_load(jnp.asarray(experts), 8)
    worst.append(float(load.max() * 8))
    bias = updated_bias(bias, load, 0.01)
  assert worst[0] > 2.5  # the busiest expert, over the mean
  assert max(worst[-20:]) < 1.15


def test_balanced_load_leaves_the_bias_alone():
  bias = jnp.asarray([0.5, -0.25, 0.0, 1.0])
  np.testing.assert_array_equal(updated_bias(bias, jnp.full(4, 0.25), 0.1), bias)


CFG = MoEConfig(routed_experts=6, top_k=2, shared_experts=2, expert_width=HIDDEN)


def _count(tree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_module_splits_into_parameters_and_biases():
  def shapes(build):
    return nnx.split(nnx.eval_shape(lambda: build(std=0.02, rngs=nnx.Rngs(0))), nnx.Param, ...)[1:]

  params, biases = shapes(functools.partial(MoE, CFG, WIDTH))
  one_expert = 3 * WIDTH * HIDDEN
  assert _count(params) == WIDTH * 6 + (6 + 2) * one_expert
  assert _count(biases) == 6
  assert all(type(leaf) is RouterBias for _, leaf in nnx.to_flat_state(biases))
  none_shared = CFG.model_copy(update={"shared_experts": 0})
  params, _ = shapes(functools.partial(MoE, none_shared, WIDTH))
  assert _count(params) == WIDTH * 6 + 6 * one_expert
  params, _ = shapes(functools.partial(FeedForward, WIDTH, HIDDEN))
  assert _count(params) == one_expert


@pytest.fixture(scope="module")
def moe() -> MoE:
  graphdef, params, biases = nnx.split(
    nnx.eval_shape(lambda: MoE(CFG, WIDTH, 0.3, rngs=nnx.Rngs(0))), nnx.Param, RouterBias
  )
  rng = np.random.default_rng(0)  # drawn here: compiling an initialiser for each shape takes longer
  params = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), p.dtype), params)
  biases = jax.tree.map(lambda b: jnp.zeros(b.shape, b.dtype), biases)
  return nnx.merge(graphdef, params, biases)


@functools.partial(jax.jit, static_argnums=0)
def _apply(graphdef, state, x_BTD):
  return nnx.merge(graphdef, state)(x_BTD)


def test_module_is_shared_plus_routed_experts(moe):
  x_BTD = jax.random.normal(jax.random.key(0), (3, 7, WIDTH))
  y_BTD, probes = _apply(*nnx.split(moe), x_BTD)
  np.testing.assert_allclose(jnp.sum(probes["load"]), 1, rtol=1e-6)
  x_SD = x_BTD.reshape(-1, WIDTH)
  experts, weights = route(x_SD, moe.w_router[...], moe.bias[...], CFG.top_k, CFG.route_scale)
  stacked = (moe.w_experts_gate[...], moe.w_experts_up[...], moe.w_experts_down[...])
  routed = jax.jit(dispatch.dense_experts)(x_SD, experts, weights, *stacked)
  want = (routed + moe.shared(x_SD)).reshape(x_BTD.shape)
  np.testing.assert_allclose(y_BTD, want, rtol=1e-4, atol=1e-5)


def test_gradient_reaches_every_parameter_of_the_module(moe):
  x_BTD = jax.random.normal(jax.random.key(0), (3, 7, WIDTH))
  graphdef, params, biases = nnx.split(moe, nnx.Param, RouterBias)

  @jax.jit
  @jax.grad
  def gradient(params):
    return jnp.sum(nnx.merge(graphdef, params, biases)(x_BTD)[0] ** 2)

  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
    assert jnp.linalg.norm(leaf) > 0, jax.tree_util.keystr(path)


def test_module_without_routed_experts_is_refused():
  with pytest.raises(ValueError, match="routed_experts=0"):
    MoE(MoEConfig(routed_experts=0), WIDTH, 0.02, rngs=nnx.Rngs(0))
