"""The loss on eight devices: equal to one device's, and its head travels in parts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from engram_jax.aot.collectives import collectives, compile_with_text
from engram_jax.core.mesh import BATCH_AXES, make_mesh
from engram_jax.model.params import param_shardings
from engram_jax.training.loss import cross_entropy_on

B, T, D, V = 8, 6, 16, 48
SPLITS = [
  {"data": 8},
  {"fsdp": 8},
  {"data": 2, "fsdp": 4},
  {"fsdp": 4, "tensor": 2},
  {"expert": 2, "tensor": 2, "fsdp": 2},
]


def given(mesh=None):
  """hidden, head, targets, mask; on a mesh each where the train step has it."""
  random = np.random.default_rng(0)
  values = (
    random.standard_normal((B, T, D)).astype(np.float32),
    random.standard_normal((D, V)).astype(np.float32),
    random.integers(0, V, (B, T), np.int32),
    random.random((B, T)) < 0.8,
  )
  if mesh is None:
    return values
  batch = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
  head = param_shardings({"head": values[1]}, mesh)["head"]
  return tuple(map(jax.device_put, values, (batch, head, batch, batch)))


def loss_and_gradients(mesh):
  run = functools.partial(cross_entropy_on, mesh, chunk=8, z_loss=1e-3)
  return jax.value_and_grad(run, argnums=(0, 1), has_aux=True)


@functools.cache
def alone():
  return jax.jit(loss_and_gradients(None))(*given())


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_loss_and_gradients_are_those_of_one_device(sizes):
  mesh = make_mesh(sizes)
  (loss, aux), (d_hidden, d_head) = jax.jit(loss_and_gradients(mesh))(*given(mesh))
  (expected, expected_aux), (d_hidden_1, d_head_1) = alone()
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_allclose(aux["nll_BT"], expected_aux["nll_BT"], rtol=1e-6, atol=1e-6)
  assert aux["tokens"] == expected_aux["tokens"]
  np.testing.assert_allclose(d_hidden, d_hidden_1, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(d_head, d_head_1, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", SPLITS[1:], ids=str)
def test_the_heads_gradient_goes_home_in_parts(optimized, sizes):
  """In bfloat16, as it is used; and what every device gets is its own part."""
  mesh = make_mesh(sizes)
  hidden, head, targets, mask = given(mesh)

  def gradient(hidden, head, targets, mask):
    found = loss_and_gradients(mesh)(hidden.astype(jnp.bfloat16), head, targets, mask)[1][1]
    return jax.lax.with_sharding_constraint(found, head_place)

  head_place = head.sharding
  text = compile_with_text(jax.jit(gradient).lower(hidden, head, targets, mask))[1]
  moved = collectives(text)
  size = lambda c: max((math.prod(array.dims) for array in c.shapes), default=0)
  assert any(c.kind == "reduce-scatter" and size(c) >= D * V / 2 for c in moved)
  parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
  assert all(size(c) <= D * V // parts for c in moved if c.kind == "all-reduce")
