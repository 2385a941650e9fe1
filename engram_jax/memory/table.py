"""Tables of memory rows: a layer's heads end to end, looked up by row id.

A layer has as many rows as its heads' primes add up to, a number that divides by nothing. The
stored array is padded to a multiple of 1,024 that no mesh changes, so a table's shape on disk does
not depend on the devices it was trained on. Pad rows are zero and no id points at them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PAD_MULTIPLE = 1024
MAX_ROWS = 2**31 - 1  # row ids are int32


def padded_rows(rows: int) -> int:
  """Rows of the stored array: the next multiple of 1,024.

  Raises ValueError for a table whose rows have no int32 ids.
  """
  if not 0 < rows <= MAX_ROWS:
    raise ValueError(f"a table of {rows:,} rows has no int32 row ids: give 1 to {MAX_ROWS:,}")
  return -(-rows // PAD_MULTIPLE) * PAD_MULTIPLE


@functools.partial(jax.jit, static_argnames=("rows", "width", "std", "dtype"))
def init_table(
  key: jax.Array, rows: int, width: int, *, std: float, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
  """A table [R_padded, C]: `rows` rows drawn from N(0, std^2), then zeros.

  To make it sharded from the start, jit a call of it with `out_shardings=table_sharding(mesh)`.
  """
  shape = (padded_rows(rows), width)
  values_RC = std * jax.random.normal(key, shape, jnp.float32)
  return jnp.where(jnp.arange(shape[0])[:, None] < rows, values_RC, 0).astype(dtype)


def table_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over all axes of the mesh, flattened; every device holds whole rows."""
  return NamedSharding(mesh, PartitionSpec(mesh.axis_names, None))


def lookup(table_RC: jax.Array, row_ids: jax.Array, *, mesh: Mesh | None = None) -> jax.Array:
  """Rows [*row_ids.shape, C] of the table, in its dtype; differentiable in the table.

  Args:
    table_RC: [R_padded, C].
    row_ids: integers, offsets included (`hash ids + layout.offsets[layer]`).
    mesh: where the table is sharded by `table_sharding`. Its gradient is then sharded as it is:
      left alone, XLA would sum it whole on every device. The gather itself is the partitioner's.

  An id outside the array gives a row of NaN, never a neighbour's row; `check_row_ids` refuses such
  ids on the host, where they enter.
  """
  if mesh is not None:
    table_RC = jax.lax.with_sharding_constraint(table_RC, table_sharding(mesh))
  return table_RC.at[row_ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def lookup_reference(table_RC: jax.Array, row_ids: jax.Array) -> jax.Array:
  """`lookup` for ids that are inside the table, as plain indexing."""
  return jnp.take(table_RC, row_ids, axis=0)


def check_row_ids(row_ids: np.ndarray, rows: int) -> None:
  """Raises ValueError, naming the first offending id, unless all are integers in [0, rows)."""
  row_ids = np.asarray(row_ids)
  if not np.issubdtype(row_ids.dtype, np.integer):
    raise ValueError(f"row ids are integers, not {row_ids.dtype}")
  if row_ids.size == 0 or (row_ids.min() >= 0 and row_ids.max() < rows):
    return
  where = np.argwhere((row_ids < 0) | (row_ids >= rows))[0]
  raise ValueError(
    f"row id {row_ids[tuple(where)]} at {where.tolist()} is outside the table: 0 to {rows - 1}"
  )
