"""Touched rows of tables on one device: gathered before the model, updated after it, in place.

The same code serves a *row buffer* (tables/row_buffer.py): a batch's distinct rows as a small table
of their own, for tables that lie on the host. Its rows are those that `dedup` would give, in the
same order, so a step on it is the step on the whole table, sum for sum.

Local letter: U, distinct rows of a batch.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.memory.dedup import FILL, UniqueRows, dedup, gather_rows
from engram_jax.tables.table_optimizer import TableOptimizer

Arrays = tuple[jax.Array, ...]


class Fetched(NamedTuple):
  """The distinct rows of a batch, a tuple entry for each table.

  rows: [U, C]; on a mesh of P devices [P U, C], each device's own part. inverses: int32 [B, T, J],
  each id's position among the rows of its device. residuals: what the return of gradients needs.
  """

  rows: Arrays
  inverses: Arrays
  residuals: Any


class RowGrads(NamedTuple):
  """Gradients of the touched rows where the rows lie, a tuple entry for each table.

  ids_U: int32 rows of the shard. grads_UC: their summed gradients. local_UC: the gradients as they
  were given. norm_sq: float32, of all together. count: int32, distinct rows. rounds: int32,
  exchanges that it took there and back; 0 without any.
  """

  ids_U: Arrays
  grads_UC: Arrays
  local_UC: Arrays
  norm_sq: jax.Array
  count: Arrays
  rounds: jax.Array


class DeviceRows(NamedTuple):
  """Tables on one device.

  buffer_ids: int32 [U] for each table that is a row buffer: the row ids that its positions, which
  stand in place of row ids, mean.
  """

  optimizer: TableOptimizer
  buffer_ids: Arrays | None = None

  def fetch(self, tables: Arrays, states: tuple, row_ids: Arrays) -> tuple[Fetched, Arrays, tuple]:
    """(Fetched, tables, states): tables and states as they are once these rows are up to date."""
    if self.buffer_ids is None:
      unique = [dedup(ids, t.shape[0]) for ids, t in zip(row_ids, tables, strict=True)]
    else:
      unique = [_as_unique(p, len(t)) for p, t in zip(row_ids, tables, strict=True)]
    synced = [
      self.optimizer.sync(t, s, u.ids_U, first_row=first)
      for t, s, u, first in zip(tables, states, unique, self._first_rows(tables), strict=True)
    ]
    tables, states = tuple(t for t, _ in synced), tuple(s for _, s in synced)
    rows = tuple(gather_rows(t, u.ids_U) for t, u in zip(tables, unique, strict=True))
    residuals = tuple((u.ids_U, u.count) for u in unique)
    return Fetched(rows, tuple(u.inverse for u in unique), residuals), tables, states

  def reduce_grads(self, fetched: Fetched, grads: Arrays) -> RowGrads:
    """The gradients as they are: one device's are summed by distinct row already."""
    ids, count = zip(*fetched.residuals, strict=True) if grads else ((), ())
    return RowGrads(ids, grads, grads, norm_sq(grads), count, jnp.int32(0))

  def update(
    self,
    fetched: Fetched,
    grads: RowGrads,
    tables: Arrays,
    states: tuple,
    grad_scale: jax.Array,
    ok: jax.Array,
    **options: Any,
  ) -> tuple[Arrays, tuple]:
    """One step of the optimizer on `grad_scale` times the gradients, unless not `ok`.

    options: of `TableOptimizer.update`.
    """
    del fetched
    new = [
      self.optimizer.update(grad_scale * g, s, t, ids, ok, first_row=first, **options)
      for g, s, t, ids, first in zip(
        grads.grads_UC, states, tables, grads.ids_U, self._first_rows(tables), strict=True
      )
    ]
    return tuple(t for t, _ in new), tuple(s for _, s in new)

  def flush(self, tables: Arrays, states: tuple) -> tuple[Arrays, tuple]:
    """Brings every row up to date."""
    new = [self.optimizer.flush(t, s) for t, s in zip(tables, states, strict=True)]
    return tuple(t for t, _ in new), tuple(s for _, s in new)

  def _first_rows(self, tables: Arrays) -> list[Any]:
    """Offsets from positions to row ids, which the noise of bfloat16 is a function of."""
    if self.buffer_ids is None:
      return [0] * len(tables)
    return [i.astype(jnp.uint32) - jnp.arange(i.size, dtype=jnp.uint32) for i in self.buffer_ids]


def _as_unique(positions_BTJ: jax.Array, size: int) -> UniqueRows:
  """Positions in a buffer of `size` rows as `dedup` would give them: they are distinct already."""
  count = positions_BTJ.max() + 1
  ids_U = jnp.where(jnp.arange(size) < count, jnp.arange(size), FILL).astype(jnp.int32)
  return UniqueRows(ids_U, positions_BTJ, count)


def norm_sq(grads: Arrays) -> jax.Array:
  """The float32 sum of squares over all of them."""
  return sum((jnp.sum(jnp.square(g.astype(jnp.float32))) for g in grads), jnp.float32(0))
