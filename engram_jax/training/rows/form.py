"""The form of a touched-row optimizer: optax's, with updates applied where they belong."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

LearningRate = float | Callable[[jax.Array], jax.Array]


def _as_they_are(
  table_RC: jax.Array, state: Any, ids_U: jax.Array | None = None, *, first_row: Any = 0
) -> tuple[jax.Array, Any]:
  del ids_U, first_row
  return table_RC, state


class TouchedRows(NamedTuple):
  """Four functions of one device's shard of a table, [R, C] in float32 or bfloat16.

  They run on one device as they are, or on each device of a mesh inside `shard_map`, where rows
  and state are divided alike: a leaf of the state has a leading axis of R, divided like the table,
  or is a scalar, the same on all devices.

  init(table_RC) -> state
  update(grads_UC, state, table_RC, ids_U, ok=True, *, first_row=0, axes=()) -> (table_RC, state)
    One step. grads_UC: any float dtype, the sum of each row's gradients. ids_U: int32, distinct,
    counted from the shard's first row; entries outside [0, R) fill the array up and are dropped.
    ok: bool scalar; where False everything comes back bit for bit as it was, the count of steps
    included. first_row: which row of the whole table is the shard's row 0 (bfloat16's noise is a
    function of it). axes: the mesh axes whose shards make up the table, for statistics over all.
  prepare(table_RC, state, ids_U, *, first_row=0) -> (table_RC, state)
    To be called before the rows ids_U are read, for the values a forward pass should see.
  flush(table_RC, state, *, first_row=0) -> (table_RC, state)
    Likewise for every row: before evaluation, or before a table is written by itself. The one
    function here whose cost grows with R.

  An optimizer whose rows are always up to date leaves `prepare` and `flush` out.
  """

  init: Callable
  update: Callable
  prepare: Callable = _as_they_are
  flush: Callable = _as_they_are

  @property
  def lags(self) -> bool:
    """Whether rows may be behind until `prepare` or `flush` brings them up to date."""
    return self.prepare is not _as_they_are


def rate_at(learning_rate: LearningRate, step: jax.Array) -> jax.Array | float:
  """The learning rate of a 0-based step."""
  return learning_rate(step) if callable(learning_rate) else learning_rate
