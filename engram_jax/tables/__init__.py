"""Memory tables for a training loop: sharded, offloaded, updated by touched rows.

    from engram_jax.tables import Tables, adam
    tables = Tables(cfg, layout, optimizer=adam(1e-3))

A reader starts here, in this order: `base` (the interface), `state` (its pytrees), `device` (the
stages on one device), `sharded` (the same over a mesh), `offload` (rows on the host or in a file),
`table_optimizer` (how rows are updated). docs/own_loop.md shows a loop that uses them.
"""

from engram_jax.tables.base import Tables
from engram_jax.tables.device import RowGrads
from engram_jax.tables.optimizers.adagrad import adagrad
from engram_jax.tables.optimizers.adam import adam
from engram_jax.tables.optimizers.adam_catch_up import adam_catch_up
from engram_jax.tables.optimizers.sinkhorn import sinkhorn
from engram_jax.tables.state import TableState, Touched
from engram_jax.tables.table_optimizer import TableOptimizer

__all__ = [
  "RowGrads",
  "TableOptimizer",
  "TableState",
  "Tables",
  "Touched",
  "adagrad",
  "adam",
  "adam_catch_up",
  "sinkhorn",
]
