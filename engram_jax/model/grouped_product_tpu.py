"""Products of groups of rows with a matrix each, by kernels that do no more work than that.

    y[n] = x[n] w[e]   for the rows n of group e,

groups one after the other, sizes[e] rows in group e. `lax.ragged_dot` is the plain form; what a
compiler makes of it differs: on TPU v5e, v6e and tpu7x, and for gradients on others too, every row
meets every matrix, E times the work. `tpu_grouped_product` is jax's own kernel for TPUs (megablox),
forward and both gradients. A block of rows that holds the end of a group is computed once for each
group in it, so rows in small blocks (128) waste least: (E - 1) blocks at most.

Local letters: N, rows; E, groups; D and F, widths of a row before and after.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

_LANES = 128  # of a TPU's vector unit: sides of blocks are multiples of it
_ROWS = 128
_LARGEST_SIDE = 1024  # of a block of the weights' gradient
_BLOCK_BYTES = 4 << 20  # of a block of weights; it is held twice, and VMEM has 16 MiB


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def tpu_grouped_product(
  x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, interpret: bool = False
) -> jax.Array:
  """Computes `lax.ragged_dot(x_ND, w_EDF, sizes_E)`, [N, F], on a TPU; sums in float32.

  Rows after the last group give anything, forward and backward, where `lax.ragged_dot` gives zeros.

  interpret: run the kernel's operations one by one, on any platform.
  """
  return _product(x_ND, w_EDF, sizes_E, interpret)


def _forward(x_ND, w_EDF, sizes_E, interpret):
  return _product(x_ND, w_EDF, sizes_E, interpret), (x_ND, w_EDF, sizes_E)


def _backward(interpret, residuals, dy_NF):
  x_ND, w_EDF, sizes_E = residuals
  dx_ND = _product(dy_NF, w_EDF, sizes_E, interpret, transpose=True)
  D, F = w_EDF.shape[1:]
  tiles = _ROWS, _side(D, _LARGEST_SIDE), _side(F, _LARGEST_SIDE)
  dw_EDF = tgmm(
    _whole_blocks(x_ND).T, _whole_blocks(dy_NF), sizes_E, w_EDF.dtype, tiles, interpret=interpret
  )
  return dx_ND.astype(x_ND.dtype), dw_EDF, None


tpu_grouped_product.defvjp(_forward, _backward)


def _product(x_ND, w_EDF, sizes_E, interpret: bool, *, transpose: bool = False) -> jax.Array:
  """[N, F] of w [E, D, F], or of w [E, F, D] with `transpose`."""
  D, F = reversed(w_EDF.shape[1:]) if transpose else w_EDF.shape[1:]
  # Rows of whole width, where they fit: a matrix is then read once a group, not once a block.
  depth = _side(D, _BLOCK_BYTES // (_LANES * w_EDF.dtype.itemsize))
  tiles = _ROWS, depth, _side(F, _BLOCK_BYTES // (depth * w_EDF.dtype.itemsize))
  y_NF = gmm(
    _whole_blocks(x_ND),
    w_EDF,
    sizes_E,
    x_ND.dtype,
    tiles,
    transpose_rhs=transpose,
    interpret=interpret,
  )
  return y_NF[: len(x_ND)]


def _side(size: int, most: int) -> int:
  """The largest side of a block, up to `most`, whose blocks cover an axis without another lane."""
  lanes = -(-size // _LANES)
  return next(n for n in range(min(most // _LANES, lanes), 0, -1) if lanes % n == 0) * _LANES


def _whole_blocks(x_ND: jax.Array) -> jax.Array:
  return jnp.pad(x_ND, ((0, -len(x_ND) % _ROWS), (0, 0)))
