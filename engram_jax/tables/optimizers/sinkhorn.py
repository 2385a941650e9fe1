"""Momentum and Sinkhorn balancing, as DeepSeek-V4.1 trains its tables: one moment, not two.

Local letter: U, distinct rows of a step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.config import OptimizerConfig
from engram_jax.tables.table_optimizer import (
  MOMENTUM,
  STEP,
  LearningRate,
  TableOptimizer,
  put_rounded,
  rate_at,
  take,
  writable,
)

NORMALISATIONS = 11  # rows, columns, rows, ..., rows
ACTIVE = 1e-3  # of the RMS over all touched rows
ADAM_RMS = 0.18  # of an Adam update, in learning rates


class RowSinkhornState(NamedTuple):
  """State of `sinkhorn`: count, int32 steps taken; mu_RC, momentum in the table's dtype."""

  count: jax.Array
  mu_RC: jax.Array


def from_config(cfg: OptimizerConfig, learning_rate: LearningRate) -> TableOptimizer:
  """The optimizer of a config, at this learning rate."""
  return sinkhorn(learning_rate, cfg.momentum)


def sinkhorn(learning_rate: LearningRate, momentum: float = 0.95) -> TableOptimizer:
  """Nesterov momentum, balanced so that all rows, and all columns, move equally far.

      mu = momentum * mu + g;   x = momentum * mu + g
      11 times, alternately: every row of x, every column of x, is divided by its RMS
      row -= learning_rate * 0.18 * x

  The matrix that is balanced has the step's touched rows, of all shards in `axes`; an untouched row
  keeps its momentum as it is. Our readings of a short report: the 11 count rows and columns
  separately and begin and end with rows, so that every active row moves 0.18 learning rates in RMS;
  a row is active unless its RMS is below 1e-3 of the RMS over all touched rows, because a bound on
  the norm itself would depend on how many tokens share one mean loss; an inactive row does not
  move, and is counted in no column. No weight decay.

  Columns are the only statistic over devices: one sum of C numbers for each of the five column
  normalisations, and one of two scalars. Momentum in bfloat16 is rounded stochastically like the
  table. The balancing is that of SinkGD (arXiv 2502.06742).

  Args:
    learning_rate: a number, or a function of the 0-based count of steps.
    momentum: in [0, 1).
  """

  def init(table_RC: jax.Array) -> RowSinkhornState:
    return RowSinkhornState(count=jnp.zeros((), jnp.int32), mu_RC=jnp.zeros_like(table_RC))

  def update(
    grads_UC: jax.Array,
    state: RowSinkhornState,
    table_RC: jax.Array,
    ids_U: jax.Array,
    ok: jax.typing.ArrayLike = True,
    *,
    first_row: jax.typing.ArrayLike = 0,
    axes: tuple[str, ...] = (),
    rate_scale: jax.typing.ArrayLike | None = None,
  ) -> tuple[jax.Array, RowSinkhornState]:
    ids_U = writable(ids_U, table_RC.shape[0], ok)
    grads_UC = grads_UC.astype(jnp.float32)
    mu_UC = momentum * take(state.mu_RC, ids_U).astype(jnp.float32) + grads_UC
    touched_U = ids_U < table_RC.shape[0]
    step_UC = _balanced(momentum * mu_UC + grads_UC, touched_U, axes)
    rate = ADAM_RMS * rate_at(learning_rate, state.count, rate_scale)
    rows_UC = take(table_RC, ids_U).astype(jnp.float32) - rate * step_UC

    where = {"step": state.count, "first_row": first_row}
    table_RC = put_rounded(table_RC, ids_U, rows_UC, stream=STEP, **where)
    return table_RC, RowSinkhornState(
      count=state.count + jnp.asarray(ok, jnp.int32),
      mu_RC=put_rounded(state.mu_RC, ids_U, mu_UC, stream=MOMENTUM, **where),
    )

  return TableOptimizer(init, update, is_joint=True)


def _balanced(x_UC: jax.Array, touched_U: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Active rows with RMS 1, and columns nearly so; zeros elsewhere.

  Normalising rows and columns in turn multiplies every row and every column by a factor, so only
  the squared factors are carried along: x is read eleven times and written once.
  """
  columns = x_UC.shape[1]
  square_UC = jnp.where(touched_U[:, None], x_UC * x_UC, 0)
  touched = _count(touched_U, axes)
  mean = _total(square_UC.mean(axis=1).sum(), axes) / touched
  active_U = (square_UC.mean(axis=1) >= ACTIVE**2 * mean) & touched_U & (mean > 0)
  square_UC = jnp.where(active_U[:, None], square_UC / jnp.where(mean > 0, mean, 1), 0)
  active = _count(active_U, axes)

  factor_C = jnp.ones(columns, jnp.float32)
  for turn in range(NORMALISATIONS):
    if turn % 2 == 0:
      factor_U = _reciprocal((square_UC * factor_C).mean(axis=1))
    else:
      factor_C = _reciprocal(_total((square_UC * factor_U[:, None]).sum(axis=0), axes) / active)
  factor_UC = jnp.sqrt(factor_U / jnp.where(mean > 0, mean, 1))[:, None] * jnp.sqrt(factor_C)
  return jnp.where(active_U[:, None], x_UC * factor_UC, 0)


def _total(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  return jax.lax.psum(x, axes) if axes else x


def _count(rows_U: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """The number of rows, or 1 where there are none, so that it divides."""
  return jnp.maximum(_total(rows_U.sum(), axes), 1).astype(jnp.float32)


def _reciprocal(x: jax.Array) -> jax.Array:
  return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)
