"""Scanned layers and rematerialisation change no number; parameters stay one layer's own."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import AttentionConfig, EngramConfig, ModelConfig, MoEConfig, ResidualConfig
from engram_jax.model.lm import LM, _runs
from engram_jax.model.router import RouterBias

B, T, V = 2, 5, 20
CFG = ModelConfig(
  vocab_size=V,
  width=8,
  layers=3,
  dtype="float32",
  attention=AttentionConfig(heads=2, latent=4, nope_dim=4, rope_dim=4, value_dim=4),
  moe=MoEConfig(routed_experts=3, top_k=2, expert_width=4, leading_dense_layers=1, dense_width=8),
  residual=ResidualConfig(branches=2, sinkhorn_iterations=2),
  engram=EngramConfig(
    layers=(0,), max_ngram=2, heads=2, row_width=4, rows_per_head=50, conv_kernel=0
  ),
)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, V, (B, T), dtype=np.int32)
ROWS = RNG.standard_normal((B, T, CFG.engram.memory_width)).astype(np.float32)


def weights(cfg: ModelConfig):
  shapes = nnx.eval_shape(lambda: LM(cfg, rngs=nnx.Rngs(0)))
  graphdef, *states = nnx.split(shapes, nnx.Param, RouterBias)
  rng = np.random.default_rng(1)
  draw = lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), jnp.float32)
  return graphdef, *(jax.tree.map(draw, nnx.to_pure_dict(state)) for state in states)


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, params, biases):
  def loss(params):
    lm = nnx.merge(graphdef, nnx.State(params), nnx.State(biases))
    hidden_BTD, probes = lm(TOKENS, (ROWS,))
    return jnp.square(hidden_BTD - 1).sum(), (hidden_BTD, probes)

  return jax.grad(loss, has_aux=True)(params)


def run(**changes):
  return _run(*weights(CFG.model_copy(update=changes)))


@pytest.fixture(scope="module")
def unrolled():
  return run()


@pytest.mark.parametrize(
  "changes",
  [{"scan_layers": True}, {"scan_layers": True, "remat": "dots"}, {"remat": "block"}],
  ids=["scan", "scan_dots", "block"],
)
def test_scanned_and_rematerialised_layers_equal_the_others(unrolled, changes):
  chex.assert_trees_all_close(run(**changes), unrolled, rtol=1e-4, atol=1e-5)


def test_equal_neighbours_without_a_memory_form_a_run():
  engram = CFG.engram.model_copy(update={"layers": (3,)})
  cfg = CFG.model_copy(update={"layers": 6, "engram": engram})
  shapes = nnx.eval_shape(lambda: LM(cfg, rngs=nnx.Rngs(0)))
  split = [nnx.split(block, nnx.Param, RouterBias) for block in shapes.blocks]
  assert _runs(split, {3: ROWS}) == [[0], [1, 2], [3], [4, 5]]


def test_a_run_is_one_loop_over_bfloat16_weights():
  cfg = CFG.model_copy(update={"scan_layers": True, "dtype": "bfloat16"})
  graphdef, params, biases = weights(cfg)
  forward = lambda p: nnx.merge(graphdef, nnx.State(p), nnx.State(biases))(TOKENS, (ROWS,))[0]
  jaxpr = jax.make_jaxpr(forward)(params)
  (loop,) = [e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == 2]
  dtypes = {variable.aval.shape: variable.aval.dtype for variable in loop.invars}
  assert dtypes[2, 3, 8, 4] == jnp.bfloat16  # experts
  assert dtypes[2, 8, 3] == jnp.float32  # router


def test_a_scanned_model_has_the_parameters_of_an_unrolled_one():
  scanned = weights(CFG.model_copy(update={"scan_layers": True}))
  chex.assert_trees_all_equal_shapes(scanned[1:], weights(CFG)[1:])
