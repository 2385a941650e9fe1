"""Row-wise Adagrad: a step size for every row, from one number of state a row.

Local letter: U, distinct rows of a step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.config import OptimizerConfig
from engram_jax.tables.table_optimizer import (
  STEP,
  LearningRate,
  TableOptimizer,
  put,
  put_rounded,
  rate_at,
  take,
  writable,
)


class RowAdagradState(NamedTuple):
  """State of `adagrad`: count, int32 steps taken; square_R, the float32 sum over steps of each
  row's mean squared gradient."""

  count: jax.Array
  square_R: jax.Array


def from_config(cfg: OptimizerConfig, learning_rate: LearningRate) -> TableOptimizer:
  """The optimizer of a config, at this learning rate."""
  return adagrad(learning_rate, cfg.eps)


def adagrad(learning_rate: LearningRate, eps: float = 1e-8) -> TableOptimizer:
  """Adagrad with one accumulator a row: 4 bytes of state beside the row's C numbers.

      square += mean(g^2);   row -= learning_rate * g / (sqrt(square) + eps)

  A row that is not touched has no gradient and does not move in dense row-wise Adagrad either, so
  this is that algorithm exactly. Its first step has an RMS of the learning rate, its n-th about
  1 / sqrt(n) of it. Known from recommendation models: `EXACT_ROWWISE_ADAGRAD` in FBGEMM, the usual
  choice with TorchRec; Duchi et al. (JMLR 2011) for Adagrad itself.

  Args:
    learning_rate: a number, or a function of the 0-based count of steps.
    eps: outside the root, as in FBGEMM.
  """

  def init(table_RC: jax.Array) -> RowAdagradState:
    return RowAdagradState(
      count=jnp.zeros((), jnp.int32), square_R=jnp.zeros(table_RC.shape[0], jnp.float32)
    )

  def update(
    grads_UC: jax.Array,
    state: RowAdagradState,
    table_RC: jax.Array,
    ids_U: jax.Array,
    ok: jax.typing.ArrayLike = True,
    *,
    first_row: jax.typing.ArrayLike = 0,
    axes: tuple[str, ...] = (),
    rate_scale: jax.typing.ArrayLike | None = None,
  ) -> tuple[jax.Array, RowAdagradState]:
    del axes
    ids_U = writable(ids_U, table_RC.shape[0], ok)
    grads_UC = grads_UC.astype(jnp.float32)
    square_U = take(state.square_R, ids_U) + (grads_UC**2).mean(axis=1)
    rate_U1 = rate_at(learning_rate, state.count, rate_scale) / (jnp.sqrt(square_U) + eps)[:, None]
    rows_UC = take(table_RC, ids_U).astype(jnp.float32) - rate_U1 * grads_UC

    where = {"step": state.count, "first_row": first_row, "stream": STEP}
    return put_rounded(table_RC, ids_U, rows_UC, **where), RowAdagradState(
      count=state.count + jnp.asarray(ok, jnp.int32),
      square_R=put(state.square_R, ids_U, square_U),
    )

  return TableOptimizer(init, update)
