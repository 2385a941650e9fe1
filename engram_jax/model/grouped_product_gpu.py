"""The kernels of model/grouped_product.py for NVIDIA GPUs, in Triton by Pallas.

XLA repeats the rows of `lax.ragged_dot` once for each group on CUDA: E times the work, and an array
E times as large. Here the rows of a group are cut into blocks from its first row on, and a program
of the kernel multiplies one block with its group's matrix: no work but the last block's rest, no
atomics, float32 sums in a fixed order. The weights' gradient is a kernel of one program for each
tile of each matrix, which runs through the rows of its group.

Local letters: N, rows; E, groups; D and F, widths of a row before and after; P, blocks of rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from engram_jax.model.grouped_product import Kernels, grouped_product

TRITON_CAPABILITY = 8.0  # the least compute capability that XLA's Triton compiles for
# Sides of tiles, powers of two as Triton's are. A block of x and one of w in bfloat16, four of each
# under way, are 128 KiB of the 227 KiB that an H100 shares.
_ROWS, _COLUMNS, _DEPTH = 128, 128, 64
_SMALLEST = 16  # side that Triton multiplies
_WARPS, _STAGES = 8, 4


class _Blocks(NamedTuple):
  """Blocks of rows of one group each, int32 [P]; those past the last block have no rows."""

  group_P: jax.Array
  start_P: jax.Array
  stop_P: jax.Array  # one past the block's last row of its group; the block may be longer


def _blocks(sizes_E: jax.Array, rows: int, block: int) -> _Blocks:
  groups = len(sizes_E)
  stop_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
  start_E = stop_E - sizes_E
  blocks_E = -(-sizes_E // block)
  last_E = jnp.cumsum(blocks_E, dtype=jnp.int32)
  block_P = jnp.arange(-(-rows // block) + groups, dtype=jnp.int32)
  group_P = jnp.sum(block_P[:, None] >= last_E, axis=1, dtype=jnp.int32)
  is_used_P, group_P = group_P < groups, jnp.minimum(group_P, groups - 1)
  start_P = start_E[group_P] + (block_P - (last_E - blocks_E)[group_P]) * block
  start_P = jnp.where(is_used_P, start_P, 0)
  return _Blocks(group_P, start_P, jnp.where(is_used_P, stop_E[group_P], 0))


def _product(x_ND, w_EDF, sizes_E, *, transpose: bool, interpret: bool) -> jax.Array:
  N, F = len(x_ND), w_EDF.shape[1 if transpose else 2]
  x, w = _whole(_at_least(x_ND, _ROWS)), _whole(w_EDF)
  blocks = _blocks(sizes_E, len(x), _ROWS)
  width = w.shape[1 if transpose else 2]
  columns = _side(width, _COLUMNS)
  y = pl.pallas_call(
    functools.partial(
      _product_kernel, columns=columns, depth=_side(x.shape[1], _DEPTH), transpose=transpose
    ),
    out_shape=jax.ShapeDtypeStruct((len(x), width), x.dtype),
    # Programs that start one after the other share their rows, or their matrix, in the L2 cache.
    grid=(width // columns, len(blocks.group_P)),
    compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
    cost_estimate=_cost(x, w, width),
    interpret=interpret,
    name="grouped_product_transposed" if transpose else "grouped_product",
  )(*blocks, x, w)
  return y[:N, :F]


def _product_kernel(group, start, stop, x, w, y, *, columns: int, depth: int, transpose: bool):
  p = pl.program_id(1)
  column_slice = pl.ds(pl.program_id(0) * columns, columns)
  row_slice, is_row = _window(start[p], stop[p], _ROWS, x.shape[0])

  @pl.when(start[p] < stop[p])
  def _():
    def body(k, total):
      depth_slice = pl.ds(k * depth, depth)
      rows = x[row_slice, depth_slice]
      if transpose:
        return total + triton.dot(rows, w[group[p], column_slice, depth_slice], trans_b=True)
      return total + triton.dot(rows, w[group[p], depth_slice, column_slice])

    total = jnp.zeros((_ROWS, columns), jnp.float32)
    total = jax.lax.fori_loop(0, x.shape[1] // depth, body, total)
    triton.store(y.at[row_slice, column_slice], total.astype(y.dtype), mask=is_row)


def _weights_gradient(x_ND, dy_NF, sizes_E, dtype, *, interpret: bool) -> jax.Array:
  D, F = x_ND.shape[1], dy_NF.shape[1]
  x, dy = (_whole(_at_least(a, _DEPTH)) for a in (x_ND, dy_NF))
  stop_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
  widths = x.shape[1], dy.shape[1]
  sides = _side(widths[0], _COLUMNS), _side(widths[1], _COLUMNS)
  dw = pl.pallas_call(
    functools.partial(_gradient_kernel, sides=sides),
    out_shape=jax.ShapeDtypeStruct((len(sizes_E), *widths), dtype),
    grid=(widths[0] // sides[0], widths[1] // sides[1], len(sizes_E)),
    compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
    cost_estimate=_cost(x, dy, widths[1]),
    interpret=interpret,
    name="grouped_product_gradient",
  )(stop_E - sizes_E, stop_E, x, dy)
  return dw[:, :D, :F]


def _gradient_kernel(start, stop, x, dy, dw, *, sides: tuple[int, int]):
  e = pl.program_id(2)
  slices = tuple(pl.ds(pl.program_id(i) * side, side) for i, side in enumerate(sides))

  def body(block, total):
    first = start[e] + block * _DEPTH
    row_slice, is_row = _window(first, stop[e], _DEPTH, x.shape[0])
    before = jnp.where(is_row, x[row_slice, slices[0]], 0)
    after = jnp.where(is_row, dy[row_slice, slices[1]], 0)
    return total + triton.dot(before, after, trans_a=True)

  blocks = pl.cdiv(stop[e] - start[e], _DEPTH)
  total = jax.lax.fori_loop(0, blocks, body, jnp.zeros(sides, jnp.float32))
  dw[e, *slices] = total.astype(dw.dtype)


def _window(start, stop, rows: int, most: int):
  """`rows` rows that hold [start, stop), moved up where they would end past `most`; and which."""
  first = jnp.minimum(start, most - rows)
  row = first + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
  return pl.ds(first, rows), (row >= start) & (row < stop)


def _side(size: int, most: int) -> int:
  """The largest power of two up to `most` that divides a size."""
  return min(size & -size, most)


def _whole(x: jax.Array) -> jax.Array:
  """Pads widths, of rows [N, D] or of matrices [E, D, F], to what Triton multiplies."""
  first = 1 if x.ndim == 3 else x.ndim - 1
  pad = [(0, -size % _SMALLEST if axis >= first else 0) for axis, size in enumerate(x.shape)]
  return jnp.pad(x, pad)


def _at_least(x_ND: jax.Array, rows: int) -> jax.Array:
  return jnp.pad(x_ND, ((0, max(rows - len(x_ND), 0)), (0, 0)))


def _cost(x: jax.Array, other: jax.Array, width: int) -> pl.CostEstimate:
  rows, depth = x.shape
  return pl.CostEstimate(
    flops=2 * rows * depth * width,
    bytes_accessed=(x.size + other.size + rows * width) * x.dtype.itemsize,
    transcendentals=0,
  )


gpu_grouped_product = functools.partial(grouped_product, Kernels(_product, _weights_gradient))
