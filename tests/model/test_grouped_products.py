"""Grouped products of TPUs and GPUs, interpreted, equal `lax.ragged_dot` in value and gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from engram_jax.model.grouped_product_gpu import gpu_grouped_product
from engram_jax.model.grouped_product_tpu import _side, tpu_grouped_product


@functools.partial(jax.jit, static_argnums=(0, 5))
def value_and_gradients(product, x_ND, w_EDF, sizes_E, dy_NF, grouped):
  """y, dx of the rows that lie in a group, and dw."""
  y, pullback = jax.vjp(lambda x, w: product(x, w, sizes_E), x_ND, w_EDF)
  dx, dw = pullback(dy_NF)
  return y[:grouped], dx[:grouped], dw


KERNELS = pytest.mark.parametrize("kernel", [tpu_grouped_product, gpu_grouped_product])


@KERNELS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  ("rows", "D", "F", "sizes"),
  [
    (75, 8, 12, (10, 0, 30, 20, 0, 15)),
    (600, 130, 260, (0, 600, 0)),  # sides and rows that no block divides
    (300, 128, 640, (127, 1, 129, 3)),  # and rows of no group
    (256, 128, 128, (128, 128)),
    (40, 8, 8, (0, 0)),
  ],
)
def test_values_and_gradients(rows, D, F, sizes, dtype, kernel):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
  grouped = sum(sizes)
  dy_NF = normal(rows, F).at[grouped:].set(0)
  args = normal(rows, D), normal(len(sizes), D, F), jnp.asarray(sizes, jnp.int32), dy_NF, grouped
  want = value_and_gradients(lax.ragged_dot, *args)
  got = value_and_gradients(functools.partial(kernel, interpret=True), *args)
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == jnp.float32 else {"rtol": 0.02, "atol": 0.1}
  chex.assert_trees_all_close(got, want, **tolerance)


@KERNELS
def test_sums_are_in_float32(kernel):
  """One and 2^-9 a thousand times: a sum in bfloat16 would stay at one."""
  x = jnp.full((128, 1025), 2.0**-9, jnp.bfloat16).at[:, 0].set(1)
  w = jnp.ones((1, 1025, 128), jnp.bfloat16)
  y = kernel(x, w, jnp.asarray([128], jnp.int32), True)
  chex.assert_trees_all_close(y.astype(jnp.float32), jnp.full((128, 128), 3.0), rtol=0.01)


def test_blocks_cover_an_axis_without_another_lane():
  assert [_side(n, 1024) for n in (8, 128, 1024, 1536, 2560)] == [128, 128, 1024, 768, 640]
  for size in range(1, 4000, 37):
    side = _side(size, 1024)
    assert side <= 1024
    assert (-(-size // side) * side) == -(-size // 128) * 128
