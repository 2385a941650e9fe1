"""The interface of a table's optimizer, and reads and writes of rows by id.

`TableOptimizer` is optax's form (`init`, `update`) with the update applied where the rows lie. The
functions below read and write rows in place where the buffers are donated.

A bfloat16 table has no float32 master: an update far smaller than a row's spacing would be lost to
rounding every time. So a new row is rounded stochastically, up with the probability of how far up
it is, and is right on average (arXiv 1502.02551). The noise is a hash of (step, stream, row of the
whole table, column) and of nothing else, so it does not depend on how the table is divided, on U,
or on the other rows of the batch. The hash adds each of the four in turn and mixes with the 32-bit
finaliser of MurmurHash3, in which every bit of the input moves every bit of the output half of the
time; two multiplications a number, where threefry would take ten times the work.

On TPU both dtypes are written in place. XLA's CPU backend has no scatter of bfloat16: there, and
only there, an update of a bfloat16 table makes a float32 copy of it.

Local letter: U, distinct rows of a step.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.config import OptimizerConfig
from engram_jax.errors import ConfigError

LearningRate = float | Callable[[jax.Array], jax.Array]


def _unchanged(
  table_RC: jax.Array, state: Any, ids_U: jax.Array | None = None, *, first_row: Any = 0
) -> tuple[jax.Array, Any]:
  del ids_U, first_row
  return table_RC, state


class TableOptimizer(NamedTuple):
  """Four functions of one device's shard of a table, [R, C] in float32 or bfloat16.

  They run on one device as they are, or on each device of a mesh inside `shard_map`, where rows
  and state are divided alike: a leaf of the state has a leading axis of R, divided like the table,
  or is a scalar, the same on all devices.

  init(table_RC) -> state
  update(grads_UC, state, table_RC, ids_U, ok=True, *, first_row=0, axes=(), rate_scale=None)
      -> (table_RC, state)
    One step. grads_UC: any float dtype, the sum of each row's gradients. ids_U: int32, distinct,
    counted from the shard's first row; entries outside [0, R) fill the array up and are dropped.
    ok: bool scalar; where False everything comes back bit for bit as it was, the count of steps
    included. first_row: which row of the whole table is the shard's row 0 (the noise of bfloat16 is
    a function of it). axes: the mesh axes whose shards make up the table, for statistics over all.
    rate_scale: multiplies the learning rate of this step; None is 1.
  sync(table_RC, state, ids_U, *, first_row=0) -> (table_RC, state)
    Brings the rows ids_U up to date; to be called before a forward pass reads them.
  flush(table_RC, state, *, first_row=0) -> (table_RC, state)
    Brings every row up to date: before evaluation, or before a table is written by itself. The one
    function here whose cost grows with R.

  An optimizer whose rows are always up to date leaves `sync` and `flush` out. is_joint: whether
  `update` must see all rows of a step at once, because it compares them.
  """

  init: Callable
  update: Callable
  sync: Callable = _unchanged
  flush: Callable = _unchanged
  is_joint: bool = False

  @property
  def is_lazy(self) -> bool:
    """Says whether rows may be behind until `sync` or `flush` brings them up to date."""
    return self.sync is not _unchanged


def table_optimizer(cfg: OptimizerConfig, schedule: Callable[[Any], jax.Array]) -> TableOptimizer:
  """The optimizer `cfg.table`, at `cfg.table_rate` times the schedule's learning rate."""
  module = importlib.import_module(f"engram_jax.tables.optimizers.{cfg.table}")
  if not hasattr(module, "from_config"):
    raise ConfigError(f"{module.__file__} must define from_config(cfg, learning_rate)")
  return module.from_config(cfg, lambda step: cfg.table_rate * schedule(step))


def rate_at(
  learning_rate: LearningRate, step: jax.Array, scale: jax.typing.ArrayLike | None = None
) -> jax.Array | float:
  """The learning rate of a 0-based step, times `scale`."""
  rate: Any = learning_rate(step) if callable(learning_rate) else learning_rate
  return rate if scale is None else rate * scale


# Streams of noise: two draws for one (step, row, column) must not be the same draw.
STEP, SYNC, MOMENTUM = range(3)


def writable(ids_U: jax.Array, rows: int, ok: jax.typing.ArrayLike = True) -> jax.Array:
  """The ids, with those not to be written (fill, or all of them unless `ok`) past the table's end.

  Each of these points at a place of its own, so the ids stay distinct, which scatter relies on;
  uint32, because R + U may pass the largest int32.
  """
  past_U = jnp.uint32(rows) + jnp.arange(ids_U.shape[0], dtype=jnp.uint32)
  return jnp.where((ids_U >= 0) & (ids_U < rows) & ok, ids_U.astype(jnp.uint32), past_U)


def take(x_RC: jax.Array, ids_U: jax.Array) -> jax.Array:
  """Rows [U, C] (or numbers [U] of an [R]); zeros for ids past the end."""
  return x_RC.at[ids_U].get(mode="fill", fill_value=0, unique_indices=True)


def put(x_RC: jax.Array, ids_U: jax.Array, rows_UC: jax.Array) -> jax.Array:
  """The array with these rows replaced; rows with ids past the end are dropped."""
  return x_RC.at[ids_U].set(rows_UC, mode="drop", unique_indices=True)


def put_rounded(
  table_RC: jax.Array,
  ids_U: jax.Array,
  rows_UC: jax.Array,
  *,
  step: jax.Array,
  first_row: jax.typing.ArrayLike,
  stream: int,
) -> jax.Array:
  """`put` of float32 rows into a table of float32 (as they are) or bfloat16 (rounded by noise)."""
  assert table_RC.dtype in (jnp.float32, jnp.bfloat16), table_RC.dtype
  if table_RC.dtype == jnp.bfloat16:
    rows_of_all_U = ids_U + jnp.asarray(first_row).astype(jnp.uint32)
    rows_UC = round_by(rows_UC, noise(step, stream, rows_of_all_U, rows_UC.shape[1]))
  return put(table_RC, ids_U, rows_UC)


def noise(step: jax.Array, stream: int, rows_U: jax.Array, columns: int) -> jax.Array:
  """uint32 [U, C], uniform, a function of step, stream, row (uint32) and column alone."""
  key = _mix(_mix(jnp.asarray(step).astype(jnp.uint32)) + jnp.uint32(stream))
  key_U1 = _mix(key + rows_U)[:, None]
  return _mix(key_U1 + jnp.arange(columns, dtype=jnp.uint32))


def round_by(x: jax.Array, noise: jax.Array) -> jax.Array:
  """float32 to bfloat16, towards or away from zero as the noise (uniform uint32) decides.

  A bfloat16 is the upper half of a float32. Sixteen uniform bits added to the lower half carry into
  the upper with a probability of lower / 2^16, which is how far x is from the one neighbour to the
  other. A number that has no lower half stays; infinities and NaN do too.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (noise >> 16)
  upper = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
  return jnp.where(jnp.isfinite(x), upper, x.astype(jnp.bfloat16))


def _mix(x: jax.Array) -> jax.Array:
  x = x + jnp.uint32(0x9E3779B9)  # zero would stay zero
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
