"""The product of groups of rows with a matrix each, and its gradients, by a platform's kernels.

    y[n] = x[n] w[e]   for the rows n of group e,

groups one after the other, sizes[e] rows in group e. `lax.ragged_dot` is the plain form; what a
compiler makes of it differs: on GPUs, on TPU v5e, v6e and tpu7x, and for gradients on others too,
every row meets every matrix, E times the work. The kernels are in model/grouped_product_tpu.py and
grouped_product_gpu.py.

Local letters: N, rows; E, groups; D and F, widths of a row before and after.
"""

import functools
from typing import Any, NamedTuple, Protocol

import jax


class _Product(Protocol):
  def __call__(
    self, x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, *, transpose: bool, interpret: bool
  ) -> jax.Array:
    """[N, F] of w [E, D, F], or of w [E, F, D] with `transpose`."""
    ...


class _WeightsGradient(Protocol):
  def __call__(
    self, x_ND: jax.Array, dy_NF: jax.Array, sizes_E: jax.Array, dtype: Any, *, interpret: bool
  ) -> jax.Array:
    """[E, D, F]: of each group the product of its rows before, transposed, and after."""
    ...


class Kernels(NamedTuple):
  """A platform's kernels; sums are in float32."""

  product: _Product
  weights_gradient: _WeightsGradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def grouped_product(
  kernels: Kernels,
  x_ND: jax.Array,
  w_EDF: jax.Array,
  sizes_E: jax.Array,
  interpret: bool = False,
) -> jax.Array:
  """Computes `lax.ragged_dot(x_ND, w_EDF, sizes_E)`, [N, F] in the dtype of x.

  Rows after the last group give anything, forward and backward, where `lax.ragged_dot` gives zeros.

  interpret: run the kernels' operations one by one, on any platform.
  """
  return kernels.product(x_ND, w_EDF, sizes_E, transpose=False, interpret=interpret)


def _forward(kernels, x_ND, w_EDF, sizes_E, interpret):
  return grouped_product(kernels, x_ND, w_EDF, sizes_E, interpret), (x_ND, w_EDF, sizes_E)


def _backward(kernels, interpret, residuals, dy_NF):
  x_ND, w_EDF, sizes_E = residuals
  dx_ND = kernels.product(dy_NF, w_EDF, sizes_E, transpose=True, interpret=interpret)
  dw_EDF = kernels.weights_gradient(x_ND, dy_NF, sizes_E, w_EDF.dtype, interpret=interpret)
  return dx_ND.astype(x_ND.dtype), dw_EDF, None


grouped_product.defvjp(_forward, _backward)
