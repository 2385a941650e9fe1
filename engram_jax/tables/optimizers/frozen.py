"""Rows that stay as they were drawn: a control that says what training them is worth.

Local letter: U, distinct rows of a step.
"""

import jax

from engram_jax.config import OptimizerConfig
from engram_jax.tables.table_optimizer import LearningRate, TableOptimizer


def from_config(cfg: OptimizerConfig, learning_rate: LearningRate) -> TableOptimizer:
  """The optimizer of a config; the learning rate moves nothing."""
  del cfg, learning_rate
  return frozen()


def frozen() -> TableOptimizer:
  """No update at all, and no state."""

  def init(table_RC: jax.Array) -> tuple[()]:
    del table_RC
    return ()

  def update(grads_UC, state, table_RC, ids_U, ok=True, *, first_row=0, axes=(), rate_scale=None):
    del grads_UC, ids_U, ok, first_row, axes, rate_scale
    return table_RC, state

  return TableOptimizer(init, update)
