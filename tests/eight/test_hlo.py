"""Collectives and loops read from programs compiled for eight simulated devices."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from engram_jax.aot import collectives as hlo
from engram_jax.core.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("optimized")
N = 8
AXIS = "data"
SPLIT = P(AXIS)


@pytest.fixture(scope="module")
def mesh():
  return make_mesh()


def text_of(function, *args):
  return hlo.compile_with_text(jax.jit(function).lower(*args))[1]


def on_mesh(mesh, function, spec=SPLIT):
  return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


CASES = {
  # kind: what each device does with its f32[16, 4]; the array counted; its bytes
  "all-gather": (lambda x: jax.lax.all_gather(x, AXIS, tiled=True), (N * 16, 4)),
  "all-reduce": (lambda x: jax.lax.psum(x, AXIS), (16, 4)),
  "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, AXIS, tiled=True), (16, 4)),
  "all-to-all": (lambda x: jax.lax.all_to_all(x, AXIS, 0, 0, tiled=True), (16, 4)),
  "collective-permute": (lambda x: jax.lax.ppermute(x, AXIS, [(0, 1)]), (16, 4)),
}


@pytest.mark.parametrize("kind", CASES)
def test_each_kind_counts_one_devices_array(mesh, kind):
  function, dims = CASES[kind]
  text = text_of(on_mesh(mesh, function), jnp.zeros((N * 16, 4)))
  (found,) = hlo.collectives(text)
  assert (found.kind, found.count, found.is_exact) == (kind, 1, True)
  assert found.bytes == 4 * math.prod(dims)
  assert sum(array.bytes for array in found.shapes) == found.bytes
  assert {array.dtype for array in found.shapes} == {"f32"}


def test_loops_multiply_and_data_dependent_ones_say_so(mesh):
  def inner(x, _):
    return jax.lax.all_to_all(x, AXIS, 0, 0, tiled=True) + 1, None

  def outer(x, _):
    x = jax.lax.ppermute(x, AXIS, [(0, 1)])
    return jax.lax.scan(inner, x, None, length=5)[0], None

  def rounds(x):
    going = lambda state: jax.lax.psum(jnp.sum(state), AXIS) < 9
    return jax.lax.while_loop(going, lambda state: state * 2 + 1, x)

  nested = lambda x: rounds(jax.lax.scan(outer, x, None, length=3)[0])
  text = text_of(on_mesh(mesh, nested), jnp.zeros((N * N, 4)))
  counts = {found.kind: (found.count, found.is_exact) for found in hlo.collectives(text)}
  assert counts["all-to-all"] == (15, True)
  assert counts["collective-permute"] == (3, True)
  assert counts["all-reduce"] == (1, False)


def test_a_branch_is_counted_as_taken_but_not_as_certain(mesh):
  def either(x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: jax.lax.psum(x, AXIS), lambda x: x * 2, x)

  (found,) = hlo.collectives(text_of(on_mesh(mesh, either, P()), jnp.zeros((16, 4))))
  assert (found.count, found.is_exact) == (1, False)


def test_a_gradient_as_large_as_the_table_is_found(mesh):
  rows, ids = 1031, jnp.arange(8)

  def loss(table):
    return jnp.sum(table[ids] ** 2)

  table = jnp.zeros((rows, 4))
  update = jax.jit(lambda table: table.at[ids].add(1.0), donate_argnums=0)
  in_place = hlo.compile_with_text(update.lower(table))[1]
  dense = text_of(jax.grad(loss), table)
  assert hlo.has_array_with_rows(in_place, rows)
  assert "broadcast" not in {made.opcode for made in hlo.makers(in_place, rows)}
  assert "broadcast" in {made.opcode for made in hlo.makers(dense, rows)}
