"""Adam on touched rows, each with its own count of steps (the paper's optimizer of tables).

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


class RowAdamState(NamedTuple):
  """State of `adam`.

  count: int32 steps taken. touched_R: int32 steps that touched each row. mu_RC, nu_RC: float32
  moments.
  """

  count: jax.Array
  touched_R: jax.Array
  mu_RC: jax.Array
  nu_RC: jax.Array


def from_config(cfg: OptimizerConfig, learning_rate: LearningRate) -> TableOptimizer:
  """The optimizer of a config, at this learning rate."""
  return adam(learning_rate, cfg.beta1, cfg.beta2, cfg.eps)


def adam(
  learning_rate: LearningRate, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8
) -> TableOptimizer:
  """Adam in which a row is updated when it is touched and else stands still.

  No weight decay: the paper trains tables without. Moments are corrected by how often *this row*
  was touched, because that is how many gradients they hold: a row met at steps S moves exactly as
  `optax.adam` would on the gradients of S. With the global step count instead (torch's SparseAdam)
  the correction is over long before a rare row is met, and its first step is
  (1 - b1) / sqrt(1 - b2) of the learning rate: 0.45 for b2 = 0.95, 3.2 for 0.999. Neither is dense
  Adam, where an untouched row keeps moving on its momentum: `adam_catch_up` is.

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
    *,
    first_row: jax.typing.ArrayLike = 0,
    axes: tuple[str, ...] = (),
    rate_scale: jax.typing.ArrayLike | None = None,
  ) -> tuple[jax.Array, RowAdamState]:
    del axes
    ids_U = writable(ids_U, table_RC.shape[0], ok)
    grads_UC = grads_UC.astype(jnp.float32)
    touched_U = take(state.touched_R, ids_U) + 1
    mu_UC = b1 * take(state.mu_RC, ids_U) + (1 - b1) * grads_UC
    nu_UC = b2 * take(state.nu_RC, ids_U) + (1 - b2) * grads_UC**2

    times_U1 = touched_U[:, None].astype(jnp.float32)
    mean_UC = mu_UC / (1 - b1**times_U1)
    square_UC = nu_UC / (1 - b2**times_U1)
    step_UC = (
      -rate_at(learning_rate, state.count, rate_scale) * mean_UC / (jnp.sqrt(square_UC) + eps)
    )
    rows_UC = take(table_RC, ids_U).astype(jnp.float32) + step_UC

    where = {"step": state.count, "first_row": first_row, "stream": STEP}
    return put_rounded(table_RC, ids_U, rows_UC, **where), RowAdamState(
      count=state.count + jnp.asarray(ok, jnp.int32),
      touched_R=put(state.touched_R, ids_U, touched_U),
      mu_RC=put(state.mu_RC, ids_U, mu_UC),
      nu_RC=put(state.nu_RC, ids_U, nu_UC),
    )

  return TableOptimizer(init, update)
