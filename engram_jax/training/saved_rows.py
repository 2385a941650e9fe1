"""Rows of a run's tables as its checkpoint has them, a block at a time."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import Config
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.rules import path_name
from engram_jax.core.saved_arrays import SavedArray
from engram_jax.memory.hashing import HashLayout
from engram_jax.training.host.written import holds_written_alone, rows_of_written
from engram_jax.training.rows.choose import row_optimizer
from engram_jax.training.schedule import learning_rate

BLOCK_BYTES = 16 << 20  # of float32 rows held at once


def saved_rows(
  checkpoints: Checkpoints, step: int, cfg: Config, layout: HashLayout, layer: int
) -> Iterator[np.ndarray]:
  """The rows of a layer's table after `step` steps, in order, as float32 [n, C] blocks.

  Pad rows are left out. Rows that their optimizer has left behind are brought up to date, as
  `up_to_date` does for a whole state, with those slices of the optimizer's state that belong to
  them. Neither table nor state is ever held whole.

  Raises StorageError if the checkpoint is damaged or its arrays do not fit the layout.
  """
  index, rows = layout.layers.index(layer), layout.rows[layer]
  size = max(1, BLOCK_BYTES // (4 * cfg.model.engram.row_width))
  optimizer = row_optimizer(
    cfg.train.optimizer,
    learning_rate(cfg.train.schedule, cfg.train.optimizer.learning_rate, cfg.train.steps),
  )
  if holds_written_alone(checkpoints.folder(step)):
    of_written = rows_of_written(checkpoints, step, cfg, layout, layer, optimizer, size)
    yield from (some.astype(np.float32) for some in of_written)
    return
  table = checkpoints.open_array(step, f"tables/{index}")
  flush, state = jax.jit(optimizer.flush), None
  if optimizer.lags:
    state = _saved_state(checkpoints, step, f"row_optimizers/{index}", optimizer, table)
  for start in range(0, rows, size):
    stop = min(start + size, rows)
    some = table.read(start, stop)
    if state is not None:
      part = jax.tree.map(lambda x: _part(x, start, stop), state)  # noqa: B023 (used at once)
      some, _ = flush(some, part, first_row=np.int32(start))
    yield np.asarray(some).astype(np.float32)


def _saved_state(checkpoints, step: int, prefix: str, optimizer, table: SavedArray):
  """The state of a table's optimizer as a tree of unread arrays."""
  like = jax.eval_shape(optimizer.init, jax.ShapeDtypeStruct(table.shape, jnp.dtype(table.dtype)))
  return jax.tree_util.tree_map_with_path(
    lambda path, _: checkpoints.open_array(step, f"{prefix}/{path_name(path)}"), like
  )


def _part(array: SavedArray, start: int, stop: int) -> np.ndarray:
  return array.read(start, stop) if array.shape else array.read()
