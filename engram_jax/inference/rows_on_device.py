"""Rows for a decoder from tables that lie on the device: hashed and looked up inside jit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.inference.extend import Rows
from engram_jax.memory.hashing import HashLayout, hash_ids
from engram_jax.memory.table import lookup


class DeviceRows:
  """tables: one [R_padded, C] a memory. token_map: int32 [V], canonical id of each raw id."""

  def __init__(self, layout: HashLayout, token_map: np.ndarray, tables: tuple[jax.Array, ...]):
    self.tables, self.token_map = tables, jnp.asarray(token_map)

    def run(table_RC, token_map, layer, tokens_BT, history_BH):
      canonical_BT = token_map[tokens_BT]
      ids_BTJ = hash_ids(layout, layer, canonical_BT, history_BH=history_BH)
      return lookup(table_RC, ids_BTJ + jnp.asarray(layout.offsets[layer], jnp.int32))

    self._layers, self._run = layout.layers, jax.jit(run, static_argnums=2)

  def start(self, tokens_BT: Any, count_B: Any, history_BH: Any) -> Rows:
    """See `RowSource`."""
    del count_B
    return lambda i, _: self._run(
      self.tables[i], self.token_map, self._layers[i], tokens_BT, history_BH
    )

  on_demand = start  # nothing waits: the device computes rows in its turn
