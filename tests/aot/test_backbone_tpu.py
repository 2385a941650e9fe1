"""The backbone as the TPU compiler makes it for a slice of eight chips that is not here."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from engram_jax.config import AttentionConfig, EngramConfig, ModelConfig, MoEConfig, ResidualConfig
from engram_jax.aot.collectives import collectives, compile_with_text
from engram_jax.aot.hlo_cost import kernels
from engram_jax.core.mesh import batch_sharding, make_mesh
from engram_jax.aot.topology import abstract_devices, topology
from engram_jax.model.lm import LM
from engram_jax.model.router import RouterBias
from engram_jax.model.params import param_shardings

cfg = ModelConfig(
  vocab_size=512, width=256, layers=3, scan_layers=True,
  attention=AttentionConfig(heads=2, latent=128, nope_dim=128, rope_dim=64, value_dim=128),
  moe=MoEConfig(routed_experts=4, top_k=2, expert_width=256, dense_width=512),
  residual=ResidualConfig(branches=2, sinkhorn_iterations=2),
  engram=EngramConfig(layers=(0,), max_ngram=2, heads=2, row_width=64, rows_per_head=50),
)
B, T = 4, 256
mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2}, abstract_devices(topology("v5p:2x2x2")))
shapes = nnx.eval_shape(lambda: LM(cfg, rngs=nnx.Rngs(0)))
graphdef, *states = nnx.split(shapes, nnx.Param, RouterBias)

array = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

def loss(params, biases, tokens_BT, rows_BTM):
  lm = nnx.merge(graphdef, nnx.State(params), nnx.State(biases))
  return lm(tokens_BT, (rows_BTM,), mesh=mesh)[0].astype(jnp.float32).var()

params, biases = map(nnx.to_pure_dict, states)
params = jax.tree.map(array, params, param_shardings(params, mesh))
biases = jax.tree.map(lambda x: array(x, NamedSharding(mesh, PartitionSpec())), biases)
batch = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
lowered = jax.jit(jax.grad(loss), out_shardings=jax.tree.map(lambda p: p.sharding, params)).lower(
  params, biases, batch(B, T, dtype=jnp.int32),
  batch(B, T, cfg.engram.memory_width, dtype=jnp.bfloat16),
)
text = compile_with_text(lowered)[1]
print(json.dumps({
  "kernels": kernels(text),
  "collectives": [
    [c.kind, [[a.dtype, a.dims] for a in c.shapes], c.op_name] for c in collectives(text)
  ],
}))
"""


@pytest.fixture(scope="module")
def compiled() -> dict:
  pytest.importorskip("libtpu")
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.strip().split("\n")[-1])


pytestmark = pytest.mark.slow  # a compilation of a minute or two


def test_attention_is_the_splash_kernel_in_every_layer(compiled):
  splash = {name: count for name, count in compiled["kernels"].items() if "splash" in name}
  assert {name.split("_")[2] for name in splash} == {"fwd", "dq", "dkv"}
  assert set(splash.values()) == {3}  # one block alone, and a scan of two


def test_experts_are_grouped_products(compiled):
  grouped = {name for name in compiled["kernels"] if "gmm" in name}
  assert any("tgmm" in name for name in grouped)  # the weights' gradients
  assert len(grouped) > 1


def test_weights_travel_in_bfloat16(compiled):
  wide = [
    (kind, dims, op)
    for kind, shapes, op in compiled["collectives"]
    for dtype, dims in shapes
    if kind == "all-gather" and dtype == "f32" and 256 in dims and max(dims) * min(dims) > 8192
  ]
  assert wide == []


def test_tokens_travel_to_experts_by_all_to_all(compiled):
  assert any(kind == "all-to-all" for kind, _, _ in compiled["collectives"])
