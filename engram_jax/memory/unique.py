"""The distinct rows of a batch: gathered once, differentiated once, updated once.

    unique = unique_rows(row_ids, table_RC.shape[0])
    rows_UC = take_rows(table_RC, unique.ids_U)            # differentiate with respect to these
    rows = expand(rows_UC, unique.inverse)                 # == lookup(table_RC, row_ids)

The gradient [U, C] is as large as the batch's ids, whatever the table's size, and holds one sum per
distinct id, which is what a touched-row optimizer needs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

FILL = 2**31 - 1  # past the end of every table, so scatters with mode="drop" pass over it


class UniqueRows(NamedTuple):
  """ids_U: int32, rising, then FILL. inverse: places in ids_U, shaped as the ids. count: scalar."""

  ids_U: jax.Array
  inverse: jax.Array
  count: jax.Array


def unique_rows(row_ids: jax.Array, rows: int) -> UniqueRows:
  """The distinct ids of a batch at the fixed size U = min(row_ids.size, rows), so none is lost.

  Args:
    row_ids: int32, any shape, in [0, rows).
    rows: of the table.
  """
  ids = row_ids.reshape(-1)
  # Ids sorted alone, then searched, are twice as fast on CPU as ids sorted with their places.
  sorted_ids = jnp.sort(ids)
  is_new = jnp.concatenate([jnp.zeros(1, jnp.int32), sorted_ids[1:] != sorted_ids[:-1]])
  rank = jnp.cumsum(is_new, dtype=jnp.int32)
  ids_U = jnp.full(min(ids.size, rows), FILL, jnp.int32)
  ids_U = ids_U.at[rank].set(sorted_ids, mode="drop", indices_are_sorted=True)
  inverse = jax.lax.platform_dependent(
    ids_U,
    ids,
    cpu=functools.partial(jnp.searchsorted, method="scan_unrolled"),
    default=functools.partial(jnp.searchsorted, method="sort"),
  )
  return UniqueRows(ids_U, inverse.reshape(row_ids.shape), rank[-1] + 1)


def take_rows(table_RC: jax.Array, ids_U: jax.Array) -> jax.Array:
  """Rows [U, C] of distinct rising ids. Ids outside the table, FILL among them, give NaN: nothing
  reads the rows of FILL, and a wrong id shows itself in the loss instead of reading another row."""
  return table_RC.at[ids_U].get(
    mode="fill", fill_value=jnp.nan, wrap_negative_indices=False, indices_are_sorted=True
  )


def expand(rows_UC: jax.Array, inverse: jax.Array) -> jax.Array:
  """Rows [*inverse.shape, C] from the distinct ones; its transpose sums the gradients of each."""
  return rows_UC.at[inverse].get(mode="promise_in_bounds")
