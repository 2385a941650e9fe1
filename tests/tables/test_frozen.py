"""Frozen rows stay as they were drawn, whatever their gradients are."""

import jax
import numpy as np

from engram_jax.config import EngramConfig
from engram_jax.memory.compress import TokenCompressor
from engram_jax.memory.hashing import HashLayout, row_ids
from engram_jax.tables import Tables
from engram_jax.tables.optimizers.frozen import frozen


def test_no_row_moves():
  cfg = EngramConfig(layers=(1,), heads=2, row_width=4, rows_per_head=31)
  layout = HashLayout.of(cfg, TokenCompressor.identity(50))
  tables = Tables(cfg, layout, frozen())
  state = tables.init(jax.random.key(0))
  before = np.asarray(state.tables[1])
  touched = tables.fetch(state, {1: row_ids(layout, 1, np.array([[5, 8, 13, 21]]))})
  state = tables.update(state, touched, {1: np.ones_like(touched.rows[1])})
  np.testing.assert_array_equal(state.tables[1], before)
  assert before[: layout.rows[1]].std() > 0
