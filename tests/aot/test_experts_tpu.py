"""Experts as the TPU compiler makes them: no more FLOPs than their products need."""

import json
import os
import subprocess
import sys

import pytest

N, E, D, F = 8192, 16, 512, 256
PROGRAM = f"""
import json, sys
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from engram_jax.aot.collectives import compile_with_text
from engram_jax.aot.hlo_cost import cost, kernels
from engram_jax.aot.topology import abstract_devices, topology
from engram_jax.model.grouped_product_tpu import tpu_grouped_product

target = topology(sys.argv[1])
place = SingleDeviceSharding(abstract_devices(target)[0])
array = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=place)

def both(x, w, sizes, dy):
  y, pullback = jax.vjp(lambda x, w: tpu_grouped_product(x, w, sizes), x, w)
  return y, pullback(dy)

lowered = jax.jit(both).lower(
  array(({N}, {D})), array(({E}, {D}, {F})), array(({E},), jnp.int32), array(({N}, {F}))
)
text = compile_with_text(lowered)[1]
spent = cost(text, target.generation.rates)
print(json.dumps({{"flops": spent.flops, "kernels": kernels(text), "uncounted": spent.uncounted}}))
"""


@pytest.mark.slow  # a compilation of ten seconds each; CI runs it
@pytest.mark.parametrize("target", ["v5p:2x2x1", "v6e:2x2"])
def test_products_of_groups_do_what_is_needed(target):
  pytest.importorskip("libtpu", reason="needs libtpu: the extra `tpu`")
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, target], env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.strip().split("\n")[-1])
  needed = 3 * 2 * N * D * F  # the product, and two gradients
  assert 0.95 < found["flops"] / needed < 1.15
  assert sum(found["kernels"].values()) == 3
  assert found["uncounted"] == []
