"""The language model on eight simulated devices, in every split, against one device."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import AttentionConfig, EngramConfig, ModelConfig, MoEConfig, ResidualConfig
from engram_jax.core.mesh import batch_sharding, make_mesh
from engram_jax.model.lm import LM
from engram_jax.model.params import param_shardings
from engram_jax.model.router import RouterBias

B, T, V = 8, 6, 32
CFG = ModelConfig(
  vocab_size=V,
  width=16,
  layers=2,
  dtype="float32",
  attention=AttentionConfig(heads=2, latent=8, nope_dim=4, rope_dim=4, value_dim=4),
  moe=MoEConfig(routed_experts=8, top_k=2, expert_width=8, leading_dense_layers=1, dense_width=16),
  residual=ResidualConfig(branches=2, sinkhorn_iterations=2),
  engram=EngramConfig(
    layers=(0,), max_ngram=2, heads=2, row_width=4, rows_per_head=50, conv_kernel=2
  ),
)
SPLITS = [
  {"data": 8},
  {"fsdp": 8},
  {"expert": 4, "data": 2},
  {"tensor": 2, "fsdp": 4},
  {"expert": 2, "tensor": 2, "data": 2},
]
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, V, (B, T), dtype=np.int32)
ROWS = RNG.standard_normal((B, T, CFG.engram.memory_width)).astype(np.float32)
SEGMENTS = np.sort(RNG.integers(0, 3, (B, T), dtype=np.int32), axis=1)
TARGET = RNG.standard_normal((B, T, CFG.width)).astype(np.float32)


def model(cfg: ModelConfig):
  """graphdef, parameters and biases; every parameter random."""
  shapes = nnx.eval_shape(lambda: LM(cfg, rngs=nnx.Rngs(0)))
  graphdef, params, biases = nnx.split(shapes, nnx.Param, RouterBias)
  rng = np.random.default_rng(1)
  draw = lambda p: (0.4 * rng.standard_normal(p.shape)).astype(np.float32)
  params = jax.tree.map(draw, nnx.to_pure_dict(params))
  return (
    graphdef,
    params,
    jax.tree.map(lambda b: np.zeros(b.shape, np.float32), nnx.to_pure_dict(biases)),
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(graphdef, mesh, params, rows, biases, tokens, segments, target):
  """Something like a loss, the probes, and the gradients of parameters and rows."""

  def loss(params, rows):
    lm = nnx.merge(graphdef, nnx.State(params), nnx.State(biases))
    hidden_BTD, probes = lm(tokens, (rows,), segments_BT=segments, mesh=mesh)
    return jnp.vdot(hidden_BTD, target) / B, probes

  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, rows)


def on_mesh(cfg: ModelConfig, split: dict[str, int]):
  mesh = make_mesh(split)
  graphdef, params, biases = model(cfg)
  params = jax.device_put(params, param_shardings(params, mesh))
  batch = jax.device_put((ROWS, TOKENS, SEGMENTS, TARGET), batch_sharding(mesh))
  rows, *rest = batch
  return run(graphdef, mesh, params, rows, biases, *rest)


def on_one_device(cfg: ModelConfig):
  graphdef, params, biases = model(cfg)
  return run(graphdef, None, params, ROWS, biases, TOKENS, SEGMENTS, TARGET)


@pytest.fixture(scope="module")
def want():
  return on_one_device(CFG)


def assert_equal(got, want):
  (loss, probes), (dparams, drows) = jax.device_get(got)
  (want_loss, want_probes), (want_dparams, want_drows) = jax.device_get(want)
  np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
  chex.assert_trees_all_close(probes, want_probes, rtol=1e-4, atol=1e-5)

  def close(path, a, b):
    # The mixing of equal streams has gradients that cancel: to them applies the absolute part.
    limit = 1e-5 * np.linalg.norm(b) + 1e-6
    assert np.linalg.norm(a - b) < limit, (jax.tree_util.keystr(path), np.linalg.norm(a - b), limit)

  jax.tree_util.tree_map_with_path(close, (dparams, drows), (want_dparams, want_drows))


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: "_".join(f"{k}{v}" for k, v in s.items()))
def test_a_split_gives_the_loss_and_gradients_of_one_device(split, want):
  assert_equal(on_mesh(CFG, split), want)


def test_scanned_and_rematerialised_layers_do_too():
  plain = CFG.model_copy(update={"layers": 3})  # a layer of dense width, and two that are scanned
  cfg = plain.model_copy(update={"scan_layers": True, "remat": "dots"})
  got = on_mesh(cfg, {"fsdp": 2, "expert": 2, "tensor": 2})
  assert_equal(got, on_one_device(plain))
