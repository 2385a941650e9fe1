"""Hyper-connections: doubly stochastic mixing, the equations, a start near a plain residual."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import ResidualConfig
from engram_jax.model import mhc
from engram_jax.model.mhc import HyperConnection

B, T, G, D, EPS = 2, 3, 4, 8, 1e-6
CFG = ResidualConfig(branches=G)

sinkhorn = jax.jit(mhc.sinkhorn, static_argnums=1)


@jax.jit
def sinkhorn_gradient(logits_GGS, weight_GGS):
  return jax.grad(lambda z: jnp.vdot(mhc.sinkhorn(z, 20), weight_GGS))(logits_GGS)


def random(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_sinkhorn_is_doubly_stochastic():
  mix_GGS = np.asarray(sinkhorn(random(0, G, G, 32), 20))
  assert (mix_GGS > 0).all()
  np.testing.assert_allclose(mix_GGS.sum(0), 1, atol=1e-5)
  np.testing.assert_allclose(mix_GGS.sum(1), 1, atol=1e-5)


def test_sinkhorn_forgets_what_rows_and_columns_share():
  logits = random(0, G, G, 32)
  shifted = logits + random(1, G, 1, 32) + random(2, 1, G, 32)
  np.testing.assert_allclose(sinkhorn(shifted, 20), sinkhorn(logits, 20), atol=1e-5)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_sinkhorn_of_huge_logits_is_finite(size: float):
  logits = size * random(0, G, G, 32)
  mix_GGS = sinkhorn(logits, 20)
  np.testing.assert_allclose(mix_GGS.sum(0), 1, atol=1e-5)
  assert np.isfinite(sinkhorn_gradient(logits, random(1, G, G, 32))).all()


def test_sinkhorn_of_a_clear_permutation_is_that_permutation():
  permutation = np.eye(G, dtype=np.float32)[[2, 0, 3, 1], :, None]
  np.testing.assert_allclose(sinkhorn(500 * np.tile(permutation, 32), 20)[..., :1], permutation)


@pytest.mark.parametrize("unroll", [4, 19])
def test_sinkhorn_in_fewer_passes_is_the_same(unroll):
  """The program of accelerators, in value and gradient."""
  logits, weight = random(0, G, G, 32), random(1, G, G, 32)

  @functools.partial(jax.jit, static_argnums=0)
  def both(unroll, z):
    return jax.value_and_grad(lambda z: jnp.vdot(mhc.sinkhorn(z, 20, unroll), weight))(z)

  chex.assert_trees_all_close(both(unroll, logits), both(1, logits), rtol=1e-5, atol=1e-7)


def sublayer(x_BTD):
  """Anything that mixes the width."""
  return jnp.tanh(x_BTD @ random(9, D, D)), {"seen": x_BTD}


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, params, x_BTGD, dy_BTGD):
  """The streams after the block, probes, and the gradients of parameters and streams."""

  def call(params, x_BTGD):
    return nnx.merge(graphdef, params)(x_BTGD, sublayer)

  y, pullback, probes = jax.vjp(call, params, x_BTGD, has_aux=True)
  return y, probes, pullback(dy_BTGD)


@pytest.fixture(scope="module")
def at_start() -> tuple[nnx.GraphDef, nnx.State]:
  key = jax.random.key(0, impl="unsafe_rbg")  # compiles faster
  build = lambda: HyperConnection(CFG, D, 0.02, EPS, rngs=nnx.Rngs(key))
  return nnx.split(nnx.eval_shape(build))[0], jax.jit(lambda: nnx.split(build())[1])()


@pytest.fixture(scope="module")
def moved(at_start) -> tuple[nnx.GraphDef, nnx.State]:
  """Every parameter away from where it starts."""
  graphdef, params = at_start
  return graphdef, jax.tree.map(lambda p: p + 0.3 * random(p.size, *p.shape), params)


def reference(params: dict, x_GD: np.ndarray) -> np.ndarray:
  """One token, by the equations, in float64."""
  p = {name: np.asarray(value, np.float64) for name, value in params.items()}
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  x_GD = x_GD.astype(np.float64)
  r = (x_GD / np.sqrt(np.mean(x_GD**2) + EPS)).reshape(-1)
  w_pre, w_post, w_res = np.split(p["w_mix"].reshape(-1, G * D), [G, 2 * G])
  pre = sigmoid(p["a_pre"] * (w_pre @ r) + p["b_pre"])
  post = 2 * sigmoid(p["a_post"] * (w_post @ r) + p["b_post"])
  mix = np.exp(p["a_res"] * (w_res @ r).reshape(G, G) + p["b_res"])
  for _ in range(CFG.sinkhorn_iterations):
    mix /= mix.sum(1, keepdims=True)
    mix /= mix.sum(0, keepdims=True)
  read = pre @ x_GD
  normed = p["g_norm"] * read / np.sqrt(np.mean(read**2) + EPS)
  return mix @ x_GD + np.outer(post, np.tanh(normed @ random(9, D, D)))


def test_streams_follow_the_equations(moved):
  x = random(0, B, T, G, D)
  y, _, _ = run(*moved, x, np.zeros_like(x))
  params = nnx.to_pure_dict(moved[1])
  want = [[reference(params, x[b, t]) for t in range(T)] for b in range(B)]
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)


def plain_residual(x_BTD, gain_D):
  normed = gain_D * x_BTD / np.sqrt(np.mean(x_BTD**2, -1, keepdims=True) + EPS)
  return x_BTD + sublayer(normed)[0]


def test_equal_streams_start_as_a_plain_residual(at_start):
  x = random(0, B, T, 1, D)
  streams = np.tile(x, (1, 1, G, 1))
  y, _, _ = run(*at_start, streams, np.zeros_like(streams))
  np.testing.assert_allclose(y.mean(2), plain_residual(x[:, :, 0], 1.0), atol=2e-3)


def test_unequal_streams_start_nearly_apart(at_start):
  x = random(0, B, T, G, D)
  y, probes, _ = run(*at_start, x, np.zeros_like(x))
  added = sublayer(probes["seen"])[0][:, :, None]
  kept = np.einsum("btgd,btgd->btg", y - added, x) / np.einsum("btgd,btgd->btg", x, x)
  np.testing.assert_allclose(kept, 1, atol=0.1)


@pytest.mark.parametrize("state", ["at_start", "moved"])
def test_unequal_streams_give_every_mixing_parameter_a_gradient(state: str, request):
  x = random(0, B, T, G, D)
  _, _, (dparams, dx) = run(*request.getfixturevalue(state), x, random(1, *x.shape))
  grads = nnx.to_pure_dict(dparams)
  assert set(grads) == {"g_norm", "w_mix", "a_pre", "a_post", "a_res", "b_pre", "b_post", "b_res"}
  grads["w_pre"], grads["w_post"], grads["w_res"] = np.split(grads.pop("w_mix"), [G, 2 * G])
  for name, grad in grads.items():
    assert np.isfinite(grad).all(), name
    assert np.any(np.asarray(grad) != 0), name
  assert np.isfinite(dx).all()


def test_one_stream_is_a_plain_residual_with_no_parameter_but_its_norm():
  cfg = ResidualConfig(branches=1)
  graphdef, params = nnx.split(HyperConnection(cfg, D, 0.02, EPS, rngs=nnx.Rngs(0)))
  assert set(nnx.to_pure_dict(params)) == {"g_norm"}
  params["g_norm"] = params["g_norm"].replace(jnp.asarray(1 + 0.3 * random(3, D)))
  x = random(0, B, T, 1, D)
  y, _, _ = run(graphdef, params, x, np.zeros_like(x))
  want = plain_residual(x[:, :, 0], params["g_norm"][...])[:, :, None]
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
