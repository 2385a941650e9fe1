"""Optimizers of memory tables: only the rows a batch touched are read, moved, or remembered.

A batch looks up a few thousand rows of a table that may have hundreds of millions, so gradients
arrive as [U, C], one summed gradient per distinct row id, and everything here costs by U. For that
the table and the state must be donated to the jitted step, and come out in the order they went in:
donation pairs arrays of one shape by their order, and a table paired with a moment is copied.

Micro-batches: concatenate their row ids *before* taking the distinct ones, so that a row met by
several of them has one entry whose gradient is the sum. Two entries for one row would be two
steps of Adam from the same old moments.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class RowAdamState(NamedTuple):
  """count: i32, steps taken. touched_R: i32, steps that touched each row. mu, nu: f32 moments."""

  count: jax.Array
  touched_R: jax.Array
  mu_RC: jax.Array
  nu_RC: jax.Array


class TouchedRows(NamedTuple):
  """`init(table_RC) -> state`; `update(grads_UC, state, table_RC, ids_U, ok=True) -> (table_RC,
  state)`. An optax transformation whose updates are applied where they belong, in place."""

  init: Callable
  update: Callable


def touched_row_adam(
  learning_rate: float | Callable[[jax.Array], jax.Array],
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
) -> TouchedRows:
  """Adam in which every row is a run of its own: it steps when touched and else stands still.

  `update` takes grads_UC (any float dtype), ids_U (int32, distinct; entries outside the table fill
  the array up and are dropped), and `ok`, a bool scalar: where False the table and the whole state,
  count included, come back bit for bit as they were. No weight decay: the paper trains tables
  without.

  Moments are corrected by how often *this row* was touched, because that is how many gradients
  they hold: a row met at steps S moves exactly as `optax.adam` would on the gradients of S. With
  the global step count instead (torch's SparseAdam) the correction is over long before a rare row
  is met, and its first step is (1 - b1) / sqrt(1 - b2) of the learning rate: 0.45 for b2 = 0.95,
  3.2 for 0.999. Neither is dense Adam, where an untouched row keeps gliding on its momentum.

  Args:
    learning_rate: a number, or a function of the 0-based count of steps.
    b1, b2, eps: as in `optax.adam` (Kingma and Ba, arXiv 1412.6980).
  """

  def init(table_RC: jax.Array) -> RowAdamState:
    return RowAdamState(
      count=jnp.zeros((), jnp.int32),
      touched_R=jnp.zeros(table_RC.shape[0], jnp.int32),
      mu_RC=jnp.zeros(table_RC.shape, jnp.float32),
      nu_RC=jnp.zeros(table_RC.shape, jnp.float32),
    )

  def update(
    grads_UC: jax.Array,
    state: RowAdamState,
    table_RC: jax.Array,
    ids_U: jax.Array,
    ok: jax.typing.ArrayLike = True,
  ) -> tuple[jax.Array, RowAdamState]:
    ids_U = _writable(ids_U, table_RC.shape[0], ok)
    grads_UC = grads_UC.astype(jnp.float32)
    touched_U = _take(state.touched_R, ids_U) + 1
    mu_UC = b1 * _take(state.mu_RC, ids_U) + (1 - b1) * grads_UC
    nu_UC = b2 * _take(state.nu_RC, ids_U) + (1 - b2) * grads_UC**2

    times_U1 = touched_U[:, None].astype(jnp.float32)
    mean_UC = mu_UC / (1 - b1**times_U1)
    square_UC = nu_UC / (1 - b2**times_U1)
    rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
    step_UC = -rate * mean_UC / (jnp.sqrt(square_UC) + eps)
    rows_UC = (_take(table_RC, ids_U) + step_UC).astype(table_RC.dtype)

    return _put(table_RC, ids_U, rows_UC), RowAdamState(
      count=state.count + jnp.asarray(ok, jnp.int32),
      touched_R=_put(state.touched_R, ids_U, touched_U),
      mu_RC=_put(state.mu_RC, ids_U, mu_UC),
      nu_RC=_put(state.nu_RC, ids_U, nu_UC),
    )

  return TouchedRows(init, update)


def _writable(ids_U: jax.Array, rows: int, ok: jax.typing.ArrayLike) -> jax.Array:
  """The ids, with those not to be written (fill, or all of them unless `ok`) past the table's end.

  Each of these points at a place of its own, so the ids stay distinct, which scatter relies on;
  uint32, because R + U may pass the largest int32.
  """
  past_U = jnp.uint32(rows) + jnp.arange(ids_U.shape[0], dtype=jnp.uint32)
  return jnp.where((ids_U < rows) & ok, ids_U.astype(jnp.uint32), past_U)


def _take(x_RC: jax.Array, ids_U: jax.Array) -> jax.Array:
  return x_RC.at[ids_U].get(mode="fill", fill_value=0, unique_indices=True)


def _put(x_RC: jax.Array, ids_U: jax.Array, rows_UC: jax.Array) -> jax.Array:
  return x_RC.at[ids_U].set(rows_UC, mode="drop", unique_indices=True)
