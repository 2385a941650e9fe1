"""The kernels of model/grouped_product.py for TPUs: jax's own, megablox.

A block of rows that holds the end of a group is computed once for each group in it, so rows in
small blocks (128) waste least: (E - 1) blocks at most.

Local letters: N, rows; E, groups; D and F, widths of a row before and after.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from engram_jax.model.grouped_product import Kernels, grouped_product

_LANES = 128  # of a TPU's vector unit: sides of blocks are multiples of it
_ROWS = 128
_LARGEST_SIDE = 1024  # of a block of the weights' gradient
_BLOCK_BYTES = 4 << 20  # of a block of weights; it is held twice, and VMEM has 16 MiB


def _product(x_ND, w_EDF, sizes_E, *, transpose: bool, interpret: bool) -> jax.Array:
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


def _weights_gradient(x_ND, dy_NF, sizes_E, dtype, *, interpret: bool) -> jax.Array:
  D, F = x_ND.shape[1], dy_NF.shape[1]
  tiles = _ROWS, _side(D, _LARGEST_SIDE), _side(F, _LARGEST_SIDE)
  rows_before, rows_after = _whole_blocks(x_ND).T, _whole_blocks(dy_NF)
  return tgmm(rows_before, rows_after, sizes_E, dtype, tiles, interpret=interpret)


def _side(size: int, most: int) -> int:
  """The largest side of a block, up to `most`, whose blocks cover an axis without another lane."""
  lanes = -(-size // _LANES)
  return next(n for n in range(min(most // _LANES, lanes), 0, -1) if lanes % n == 0) * _LANES


def _whole_blocks(x_ND: jax.Array) -> jax.Array:
  return jnp.pad(x_ND, ((0, -len(x_ND) % _ROWS), (0, 0)))


tpu_grouped_product = functools.partial(grouped_product, Kernels(_product, _weights_gradient))
