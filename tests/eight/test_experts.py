"""Experts over eight simulated devices against every expert over every token on one."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from engram_jax.config import MoEConfig
from engram_jax.core.mesh import batch_sharding, make_mesh
from engram_jax.model import expert_parallel
from engram_jax.model.expert_dispatch import dense_experts, ragged_experts
from engram_jax.model.expert_parallel import capacity, routed_experts
from engram_jax.model.grouped_product_tpu import tpu_grouped_product
from engram_jax.model.params import expert_specs
from engram_jax.model.router import expert_load, route

B, T, D, F, E, K = 8, 9, 4, 8, 8, 2
CFG = MoEConfig(routed_experts=E, top_k=K, expert_width=F)
RNG = np.random.default_rng(0)
NORMAL = lambda *shape: jnp.asarray(RNG.standard_normal(shape), jnp.float32)
X, ROUTER, TARGET = NORMAL(B, T, D), NORMAL(D, E), NORMAL(B, T, D)
WEIGHTS = (NORMAL(E, D, F), NORMAL(E, D, F), NORMAL(E, F, D))
BIASES = {
  "balanced": np.zeros(E, np.float32),
  "two_experts": np.where(np.arange(E) < 2, 10.0, 0.0).astype(np.float32),
  "two_owners": np.where(np.isin(np.arange(E), (1, 6)), 10.0, 0.0).astype(np.float32),
}


def value_and_grads(forward, x, router, weights, target, bias):
  def loss(x, router, weights):
    y, load = forward(x, router, bias, weights)
    return jnp.vdot(y, target), (y, load)

  return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x, router, weights)


@functools.partial(jax.jit, static_argnums=0)
def parallel(mesh, *args):
  specs = expert_specs(WEIGHTS, mesh)
  forward = lambda x, router, bias, weights: routed_experts(
    CFG, x, router, bias, weights, specs, mesh
  )
  return value_and_grads(forward, *args)


@jax.jit
def reference(*args):
  def forward(x, router, bias, weights):
    experts, shares = route(x.reshape(-1, D), router, bias, K, 1.0)
    y = dense_experts(x.reshape(-1, D), experts, shares, *weights)
    return y.reshape(x.shape), expert_load(experts, E)

  return value_and_grads(forward, *args)


@pytest.mark.parametrize(
  "split",
  [{"expert": 8}, {"expert": 2, "tensor": 2, "fsdp": 2}, {"fsdp": 4, "data": 2}],
  ids=lambda s: "_".join(f"{k}{v}" for k, v in s.items()),
)
def test_equal_dense_experts_in_value_and_every_gradient(split):
  mesh = make_mesh(split)
  place = lambda w, spec: jax.device_put(w, NamedSharding(mesh, spec))
  weights = tuple(map(place, WEIGHTS, expert_specs(WEIGHTS, mesh)))
  x, target = jax.device_put((X, TARGET), batch_sharding(mesh))
  for kind, bias in BIASES.items():
    got = parallel(mesh, x, ROUTER, weights, target, bias)
    want = reference(X, ROUTER, WEIGHTS, TARGET, bias)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4, custom_message=kind)


def test_rows_of_no_expert_do_no_harm_on_tpus(monkeypatch):
  """Rows outside all groups are not written by the TPU's kernel: NaN where it is interpreted."""
  product = functools.partial(tpu_grouped_product, interpret=True)
  experts = functools.partial(ragged_experts, product=product)
  monkeypatch.setattr(expert_parallel, "experts_for", lambda *_: experts)
  mesh = make_mesh({"expert": 2, "data": 4})
  place = lambda w, spec: jax.device_put(w, NamedSharding(mesh, spec))
  weights = tuple(map(place, WEIGHTS, expert_specs(WEIGHTS, mesh)))
  x, target = jax.device_put((X, TARGET), batch_sharding(mesh))
  with_kernel = jax.jit(functools.partial(parallel.__wrapped__, mesh))
  for kind in ("balanced", "two_experts"):
    got = with_kernel(x, ROUTER, weights, target, BIASES[kind])
    want = reference(X, ROUTER, WEIGHTS, TARGET, BIASES[kind])
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4, custom_message=kind)


def test_the_buffers_above_overflow_when_two_experts_get_all():
  assert capacity(tokens=B * T // 8, top_k=K, experts=E, devices=8) < B * T // 8  # one an owner
  assert capacity(tokens=B * T // 4, top_k=K, experts=E, devices=2) < 2 * B * T // 4


def test_a_buffer_never_has_slots_that_nothing_could_use():
  assert capacity(tokens=5, top_k=6, experts=8, devices=8) == 5
  assert capacity(tokens=4096, top_k=6, experts=64, devices=8) == 4616
