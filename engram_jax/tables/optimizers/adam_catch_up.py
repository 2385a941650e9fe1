"""Adam equal to dense Adam, at the cost of the rows touched.

In dense Adam a row without a gradient still moves: its moments decay and it goes on by them. Nobody
sees where it is until it is read again, so the updates that it missed are made then, one by one
because each has a learning rate and a bias correction of its own.

Local letter: U, distinct rows of a step.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.config import OptimizerConfig
from engram_jax.tables.table_optimizer import (
  STEP,
  SYNC,
  LearningRate,
  TableOptimizer,
  put,
  put_rounded,
  take,
  writable,
)

FLUSH_ROWS = 1 << 14  # at once: a few temporaries of FLUSH_ROWS x C float32


class CatchUpState(NamedTuple):
  """State of `adam_catch_up`.

  count: int32 steps taken. last_R: int32, how many of them each row has made. mu_RC, nu_RC: float32
  moments as they were after those.
  """

  count: jax.Array
  last_R: jax.Array
  mu_RC: jax.Array
  nu_RC: jax.Array


def from_config(cfg: OptimizerConfig, learning_rate: LearningRate) -> TableOptimizer:
  """The optimizer of a config, at this learning rate."""
  return adam_catch_up(learning_rate, cfg.beta1, cfg.beta2, cfg.eps)


def adam_catch_up(
  learning_rate: LearningRate, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8
) -> TableOptimizer:
  """`optax.adam` with a gradient of zero for every row not touched (Kingma and Ba, 1412.6980).

  `sync` must come before a forward pass reads the rows, or its gradients are of rows that are
  behind dense Adam's; `update` itself catches up with whatever was not synced. A step that is not
  `ok` was none: no row moves for it. Rows that `sync` brought up to date before it stay so.

  A row makes at most `decay_steps(b1, b2)` of the updates it missed, 272 with these defaults; the
  rest are too small together to be seen. The loop is as long as the longest absence in the batch.

  Args:
    learning_rate: a number, or a function of the 0-based count of steps.
    b1, b2, eps: as in `optax.adam`; eps is added to the root.
  """
  rates_at = _rates(learning_rate)

  def init(table_RC: jax.Array) -> CatchUpState:
    return CatchUpState(
      count=jnp.zeros((), jnp.int32),
      last_R=jnp.zeros(table_RC.shape[0], jnp.int32),
      mu_RC=jnp.zeros(table_RC.shape, jnp.float32),
      nu_RC=jnp.zeros(table_RC.shape, jnp.float32),
    )

  def move_UC(step_U: jax.Array, mu_UC: jax.Array, nu_UC: jax.Array) -> jax.Array:
    """The amount that the 1-based step `step_U` subtracts; the moments are those after it."""
    step_U1 = step_U[:, None]
    mean_UC = mu_UC / (1 - b1**step_U1)
    square_UC = nu_UC / (1 - b2**step_U1)
    return rates_at(step_U - 1)[:, None] * mean_UC / (jnp.sqrt(square_UC) + eps)

  def made(state: CatchUpState, ids_U: jax.Array, step: jax.Array) -> jax.Array:
    """Returns last_R with `step`, the latest of all, for these rows."""
    # The maximum changes nothing; through it the rows written depend on those read. XLA copies an
    # array whole that it might write to before it reads it.
    return put(state.last_R, ids_U, jnp.maximum(take(state.last_R, ids_U), step))

  def current(table_RC, state: CatchUpState, ids_U) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (rows, mu, nu), float32 [U, C], as dense Adam has them after `count` steps."""
    rows_UC = take(table_RC, ids_U).astype(jnp.float32)
    mu_UC, nu_UC = take(state.mu_RC, ids_U), take(state.nu_RC, ids_U)
    last_U = take(state.last_R, ids_U)
    missed_U = state.count - last_U
    # Rows that no step has touched have no momentum, and must not lengthen the loop.
    longest = jnp.where((mu_UC != 0).any(axis=1), missed_U, 0).max(initial=0)

    def decay(k: jax.Array, rows_UC: jax.Array) -> jax.Array:
      moved_UC = rows_UC - move_UC(last_U + k, mu_UC * b1**k, nu_UC * b2**k)
      return jnp.where(k <= missed_U[:, None], moved_UC, rows_UC)

    end = jnp.minimum(longest, decay_steps(b1, b2)) + 1
    rows_UC = jax.lax.fori_loop(1, end, decay, rows_UC)
    missed_U1 = missed_U[:, None]
    return rows_UC, mu_UC * b1**missed_U1, nu_UC * b2**missed_U1

  def sync(
    table_RC: jax.Array,
    state: CatchUpState,
    ids_U: jax.Array,
    *,
    first_row: jax.typing.ArrayLike = 0,
  ) -> tuple[jax.Array, CatchUpState]:
    ids_U = writable(ids_U, table_RC.shape[0])
    rows_UC, mu_UC, nu_UC = current(table_RC, state, ids_U)
    where = {"step": state.count, "first_row": first_row, "stream": SYNC}
    return put_rounded(table_RC, ids_U, rows_UC, **where), CatchUpState(
      count=state.count,
      last_R=made(state, ids_U, state.count),
      mu_RC=put(state.mu_RC, ids_U, mu_UC),
      nu_RC=put(state.nu_RC, ids_U, nu_UC),
    )

  def update(
    grads_UC: jax.Array,
    state: CatchUpState,
    table_RC: jax.Array,
    ids_U: jax.Array,
    ok: jax.typing.ArrayLike = True,
    *,
    first_row: jax.typing.ArrayLike = 0,
    axes: tuple[str, ...] = (),
    rate_scale: jax.typing.ArrayLike | None = None,
  ) -> tuple[jax.Array, CatchUpState]:
    del axes
    if rate_scale is not None:
      raise ValueError(
        "adam_catch_up takes no scale: rows make the updates they missed later, and the scale of "
        "those steps is not kept; give a learning rate that is a function of the step"
      )
    ids_U = writable(ids_U, table_RC.shape[0], ok)
    grads_UC = grads_UC.astype(jnp.float32)
    rows_UC, mu_UC, nu_UC = current(table_RC, state, ids_U)
    mu_UC = b1 * mu_UC + (1 - b1) * grads_UC
    nu_UC = b2 * nu_UC + (1 - b2) * grads_UC**2
    step_U = jnp.broadcast_to(state.count + 1, ids_U.shape)
    rows_UC = rows_UC - move_UC(step_U, mu_UC, nu_UC)

    where = {"step": state.count, "first_row": first_row, "stream": STEP}
    return put_rounded(table_RC, ids_U, rows_UC, **where), CatchUpState(
      count=state.count + jnp.asarray(ok, jnp.int32),
      last_R=made(state, ids_U, state.count + 1),
      mu_RC=put(state.mu_RC, ids_U, mu_UC),
      nu_RC=put(state.nu_RC, ids_U, nu_UC),
    )

  def flush(
    table_RC: jax.Array, state: CatchUpState, *, first_row: jax.typing.ArrayLike = 0
  ) -> tuple[jax.Array, CatchUpState]:
    rows = table_RC.shape[0]
    some = jnp.arange(min(rows, FLUSH_ROWS), dtype=jnp.int32)
    # The last turn may meet rows of the one before it: they are up to date by then, and stay so.
    ids_U = lambda i: jnp.minimum(i * some.size, rows - some.size) + some
    turn = lambda i, both: sync(*both, ids_U(i), first_row=first_row)
    return jax.lax.fori_loop(0, -(-rows // some.size), turn, (table_RC, state))

  return TableOptimizer(init, update, sync, flush)


@functools.cache
def decay_steps(b1: float, b2: float) -> int:
  """Steps without a gradient after which a row of Adam's stands still, in float32.

  The k-th missed move is learning_rate * b1^k |mu| / c1 / (sqrt(b2^k nu / c2) + eps). By Cauchy and
  Schwarz over the gradients that mu and nu hold, |mu| <= q sqrt(nu) with
  q = (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)); c1 >= 1 - b1, c2 <= 1 and eps >= 0. So with
  r = b1 / sqrt(b2) < 1 the moves after the k-th add up to less than r^k q / ((1 - b1) (1 - r))
  learning rates, and the limit is where that is 2^-24: what float32 rounds off one full step.

  Where r >= 1 moves shrink only when eps outweighs the root, and the limit is where mu itself is
  gone: b1^k takes the largest float32 below the smallest in 277 halvings.
  """
  if b1 == 0:
    return 0
  gone = math.ceil(277 * math.log(2) / -math.log(b1))
  if b1 * b1 >= b2:
    return gone
  ratio = b1 / math.sqrt(b2)
  tail = 1 / (math.sqrt((1 - b2) * (1 - ratio**2)) * (1 - ratio))
  return min(gone, math.ceil((math.log(tail) + 24 * math.log(2)) / -math.log(ratio)))


def _rates(learning_rate: LearningRate) -> Callable[[jax.Array], jax.Array]:
  if callable(learning_rate):
    return jax.vmap(lambda step: jnp.asarray(learning_rate(step), jnp.float32))
  return lambda steps_U: jnp.full(steps_U.shape, learning_rate, jnp.float32)
