"""The distinct rows of a batch: gathered once, differentiated once, updated once.

    unique = dedup(row_ids, table_RC.shape[0])
    rows_UC = gather_rows(table_RC, unique.ids_U)          # differentiate with respect to these
    rows = expand(rows_UC, unique.inverse)                 # == lookup(table_RC, row_ids)

The gradient [U, C] is as large as the batch's ids, whatever the table's size, and holds one sum per
distinct id, which is what a touched-row optimizer needs.

Local letter: U, distinct ids.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

FILL = 2**31 - 1  # past the end of every table, so scatters with mode="drop" pass over it


class UniqueRows(NamedTuple):
  """Distinct ids. ids_U: int32, rising, then FILL. inverse: int32 positions in ids_U, shaped as the
  ids. count: int32, how many there are."""

  ids_U: jax.Array
  inverse: jax.Array
  count: jax.Array


def dedup(row_ids: jax.Array, rows: int) -> UniqueRows:
  """The distinct ids of a batch at the fixed size U = min(row_ids.size, rows), so none is lost.

  Args:
    row_ids: int32, any shape, in [0, rows). The caller sees to that: others count among the
      distinct ones, and where these are then more than U, the last ones get wrong positions.
    rows: of the table.
  """
  size = min(row_ids.size, rows)
  unique = jax.lax.platform_dependent(
    row_ids.reshape(-1),
    cpu=functools.partial(_search_sorted_ids, size=size),
    default=functools.partial(_sort_with_positions, size=size),
  )
  return unique._replace(inverse=unique.inverse.reshape(row_ids.shape))


def _search_sorted_ids(ids: jax.Array, size: int) -> UniqueRows:
  # Ids sorted alone, then searched, are twice as fast on CPU as ids sorted with their positions.
  sorted_ids = jnp.sort(ids)
  ids_U, rank = _distinct(sorted_ids, size)
  inverse = jnp.searchsorted(ids_U, ids, method="scan_unrolled")
  return UniqueRows(ids_U, inverse, rank[-1] + 1)


def _sort_with_positions(ids: jax.Array, size: int) -> UniqueRows:
  # One sort in all: a TPU's compiler takes seconds for each.
  positions = jax.lax.iota(jnp.int32, ids.size)
  sorted_ids, positions = jax.lax.sort((ids, positions), num_keys=1, is_stable=False)
  ids_U, rank = _distinct(sorted_ids, size)
  inverse = (
    jnp.zeros_like(rank).at[positions].set(rank, unique_indices=True, mode="promise_in_bounds")
  )
  return UniqueRows(ids_U, inverse, rank[-1] + 1)


def _distinct(sorted_ids: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
  """Returns each id once, then FILL; and each sorted id's position among them."""
  is_new = jnp.concatenate([jnp.zeros(1, jnp.int32), sorted_ids[1:] != sorted_ids[:-1]])
  rank = jnp.cumsum(is_new, dtype=jnp.int32)
  ids_U = jnp.full(size, FILL, jnp.int32)
  return ids_U.at[rank].set(sorted_ids, mode="drop", indices_are_sorted=True), rank


def gather_rows(table_RC: jax.Array, ids_U: jax.Array) -> jax.Array:
  """Rows [U, C] of distinct rising ids. Ids outside the table, FILL among them, give NaN: no token
  reads the row of FILL, and a wrong id shows itself in the loss instead of reading another row."""
  return table_RC.at[ids_U].get(
    mode="fill", fill_value=jnp.nan, wrap_negative_indices=False, indices_are_sorted=True
  )


def expand(rows_UC: jax.Array, inverse: jax.Array) -> jax.Array:
  """Rows [*inverse.shape, C] from the distinct ones; its transpose sums the gradients of each."""
  return rows_UC.at[inverse].get(mode="promise_in_bounds")
