"""A batch's distinct rows as a small table of their own: what the device sees of a table elsewhere.

A row buffer has the U = min(ids, R) rows that `dedup` would give of the batch's row ids, in the
same order, so a step on it is the step on the whole table, sum for sum: only where rows are read
from and written to differs. Positions in the buffer stand for row ids.

It is made of the records of host tables (tables/host_table.py), of rows that no step has written,
which are drawn as `init_table` draws them, and of the buffer of the step before, whose rows are
newer than what was read from the host while that step ran.

Local letters: U, rows of a row buffer; F, rows to be drawn; n and u, rows read and sent.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.memory.table import draw_rows
from engram_jax.tables.device import Arrays
from engram_jax.tables.host_table import Table
from engram_jax.tables.row_schema import WRITTEN, padded

_PARTS = 4  # sizes in which rows travel: quarters of a buffer, so that few programs are compiled


class UninitializedRows(NamedTuple):
  """Rows that no step has written. positions: int32 [F] in the buffer, past its end to fill up.
  ids: int32 [F]."""

  positions: Any
  ids: Any


class Prefetched(NamedTuple):
  """Rows of one table, read for one step.

  ids: int32 [n], distinct, rising. padded_ids: int32 [U], these and then -1. leaves: [u, ...] on
  the device, n <= u <= U. source: int32 [u], positions in the buffer before, or -1; None without.
  uninitialized: rows to be drawn; None without any.
  """

  ids: np.ndarray
  padded_ids: jax.Array
  leaves: Arrays
  source: jax.Array | None
  uninitialized: UninitializedRows | None

  @property
  def nbytes(self) -> int:
    """Bytes that went to the device."""
    return sum(x.nbytes for x in jax.tree.leaves(self[1:]))


def read_rows(
  table: Table, ids: np.ndarray, last: np.ndarray | None, requested: int, device: Any = None
) -> Prefetched:
  """Reads the rows of rising distinct `ids` and sends them to the device.

  Args:
    last: int32, the distinct ids of the step before, whose rows may be newer in its buffer.
    requested: row ids of the batch, before the distinct ones were taken.
    device: or sharding to send to; the default device if None.
  """
  U = min(requested, table.schema.padded)
  u = sent_rows(len(ids), U)
  records_n = table.take(ids)
  leaves = tuple(padded(x, u) for x in table.schema.unpack(records_n))
  source = None if last is None else _positions_in(last, ids)
  is_known = records_n[WRITTEN] != 0
  is_new = ~(is_known if source is None else is_known | (source >= 0))
  fresh = uninitialized_rows(np.flatnonzero(is_new), ids, u)
  padded_source = None if source is None else padded(source, u, -1)
  sent = (padded(ids.astype(np.int32), U, -1), leaves, padded_source, fresh)
  return Prefetched(ids, *jax.device_put(sent, device))


def sent_rows(count: int, size: int) -> int:
  """u: rows that travel for `count` rows of a buffer of `size`, one of a few numbers."""
  part = -(-size // _PARTS)
  return min(size, -(-count // part) * part)


def uninitialized_rows(
  positions: np.ndarray, ids: np.ndarray, size: int
) -> UninitializedRows | None:
  """The rows at these positions, filled up to a power of four: few programs are compiled."""
  if not positions.size:
    return None
  count = 64
  while count < positions.size:
    count *= 4
  return UninitializedRows(
    padded(positions.astype(np.int32), count, size), padded(ids[positions].astype(np.int32), count)
  )


@functools.partial(jax.jit, static_argnames=("rows", "std"))
def initialize_rows(
  rows_UC: jax.Array, key: jax.Array, fresh: UninitializedRows, *, rows: int, std: float
) -> jax.Array:
  """`rows_UC` with its uninitialized rows as `init_table` makes them; rows: R of the table."""
  drawn = draw_rows(key, fresh.ids, rows, rows_UC.shape[1], std=std, dtype=rows_UC.dtype)
  return rows_UC.at[fresh.positions].set(drawn, mode="drop")


@functools.partial(jax.jit, static_argnames="size")
def make_buffer(read: Arrays, source_u: Any, before: Arrays | None, *, size: int) -> Arrays:
  """Leaves [U, ...] of what was read from the host, [u, ...] with u <= U = size, and zeros.

  source_u: int32, for each row its position in the leaves `before` of the buffer of the step
  before, which are newer than what the host had; negative where it has none.
  """

  def one(read: jax.Array, before: jax.Array | None) -> jax.Array:
    if before is not None:
      is_newer = source_u.reshape(-1, *(1,) * (read.ndim - 1)) >= 0
      read = jnp.where(is_newer, before.at[source_u].get(mode="clip"), read)
    return jnp.pad(read, [(0, size - len(read))] + [(0, 0)] * (read.ndim - 1))

  return tuple(one(x, y) for x, y in zip(read, before or (None,) * len(read), strict=True))


@functools.partial(jax.jit, static_argnames="size")
def copy_first_rows(leaves: Arrays, *, size: int) -> Arrays:
  """The leading `size` rows, as copies: the buffer's own may be used up by another program."""
  return tuple(jnp.copy(x[:size]) for x in leaves)


def _positions_in(last: np.ndarray, ids: np.ndarray) -> np.ndarray:
  """int32: where each of the rising `ids` stands in the rising `last`; -1 where it does not."""
  at = np.minimum(np.searchsorted(last, ids), len(last) - 1)
  return np.where(last[at] == ids, at, -1).astype(np.int32)
