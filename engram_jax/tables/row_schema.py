"""A row beside its optimizer's state: one record, so that a row is one place to read and to write.

A record of zeros is a row that no step has written: its numbers are those `init_table` draws for
it, its state is the optimizer's first, which is zero. So a table begins as memory or as a file of
zeros, whatever its size, and costs what is written to it.

Local letter: U, records.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.tables.table_optimizer import TableOptimizer

ROW, WRITTEN = "row", "written"


@dataclasses.dataclass(frozen=True)
class RowSchema:
  """The layout of one table's records.

  rows: R, ids that stand for rows. padded: of the array, as `memory.table.padded_rows` says.
  leaves: (name, shape of one row's part, dtype) of the row and of each per-row leaf of the state,
  in the order of its tree. state: the state's tree with shapes, per row or scalars.
  """

  rows: int
  padded: int
  leaves: tuple[tuple[str, tuple[int, ...], np.dtype], ...]
  state: Any

  @classmethod
  def of(
    cls, optimizer: TableOptimizer, rows: int, padded: int, width: int, dtype: np.dtype
  ) -> "RowSchema":
    """The schema of a table [padded, width] trained by `optimizer`."""
    state = jax.eval_shape(optimizer.init, jax.ShapeDtypeStruct((padded, width), dtype))
    leaves = [(ROW, (width,), np.dtype(dtype))]
    for path, x in jax.tree.leaves_with_path(state):
      if x.ndim:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        leaves.append((name, x.shape[1:], np.dtype(x.dtype)))
    return cls(rows, padded, tuple(leaves), state)

  @property
  def dtype(self) -> np.dtype:
    """The dtype of one record. Numbers that NumPy has no name for (bfloat16) are kept as bits."""
    parts = [(name, _stored(dtype), shape) for name, shape, dtype in self.leaves]
    return np.dtype([*parts, (WRITTEN, np.uint32)])

  def unpack(self, records_U: np.ndarray) -> tuple[np.ndarray, ...]:
    """The leaves [U, ...] of records [U], as copies that stand alone."""
    return tuple(
      np.ascontiguousarray(records_U[name]).view(dtype) for name, _, dtype in self.leaves
    )

  def row(self, records_U: np.ndarray) -> np.ndarray:
    """The rows alone, [U, C], a copy."""
    name, _, dtype = self.leaves[0]
    return np.ascontiguousarray(records_U[name]).view(dtype)

  def pack(self, leaves: tuple[np.ndarray, ...]) -> np.ndarray:
    """Records [U] of leaves [U, ...], marked as written."""
    records_U = np.empty(len(leaves[0]), self.dtype)
    for (name, _, dtype), leaf in zip(self.leaves, leaves, strict=True):
      records_U[name] = np.asarray(leaf).view(_stored(dtype))
    records_U[WRITTEN] = 1
    return records_U

  def fresh_records(self, rows_UC: np.ndarray) -> np.ndarray:
    """Records [U] of rows [U, C] whose optimizer has not seen a gradient, marked as written."""
    name, _, dtype = self.leaves[0]
    records_U = np.zeros(len(rows_UC), self.dtype)
    records_U[name] = rows_UC.view(_stored(dtype))
    records_U[WRITTEN] = 1
    return records_U

  def join_state(self, per_row: tuple[Any, ...], scalars: tuple[Any, ...]) -> Any:
    """The optimizer's state of per-row leaves and scalars."""
    shapes, tree = jax.tree.flatten(self.state)
    rows, numbers = iter(per_row), iter(scalars)
    return jax.tree.unflatten(tree, [next(rows if x.ndim else numbers) for x in shapes])

  def split_state(self, state: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(per-row leaves, scalars) of a state: the inverse of `join_state`."""
    shapes, leaves = jax.tree.leaves(self.state), jax.tree.leaves(state)
    pairs = list(zip(shapes, leaves, strict=True))
    return tuple(x for s, x in pairs if s.ndim), tuple(x for s, x in pairs if not s.ndim)

  def scalars_alone(self, scalars: tuple[Any, ...]) -> Any:
    """The optimizer's state with nothing (None) for what each row has."""
    return self.join_state((None,) * (len(self.leaves) - 1), scalars)

  def first_scalars(self) -> tuple[jax.Array, ...]:
    """The scalars of a state before any step: zeros."""
    return tuple(jnp.zeros((), x.dtype) for x in jax.tree.leaves(self.state) if not x.ndim)


def synced_records(
  optimizer: TableOptimizer,
  schema: RowSchema,
  scalars: tuple,
  ids_n: np.ndarray,
  records_n: np.ndarray,
  size: int,
) -> np.ndarray:
  """Records [n] as `optimizer.flush` would leave them; n up to `size`, which compiles once.

  Args:
    scalars: of the optimizer's state.
    ids_n: int32, the records' row ids.
  """
  row, *rest = (padded(x, size) for x in schema.unpack(records_n))
  state = schema.join_state(tuple(rest), scalars)
  positions = np.arange(size, dtype=np.int32)
  first_row = padded(ids_n, size).astype(np.uint32) - positions.astype(np.uint32)
  row, state = _sync_program(optimizer)(row, state, positions, first_row)
  leaves = (row, *schema.split_state(state)[0])
  return schema.pack(tuple(np.asarray(x)[: len(ids_n)] for x in leaves))


def padded(x: np.ndarray, size: int, value: int = 0) -> np.ndarray:
  """[n, ...] -> [size, ...], `value` after what there is."""
  out = np.full((size, *x.shape[1:]), value, x.dtype)
  out[: len(x)] = x
  return out


@functools.lru_cache(maxsize=8)
def _sync_program(optimizer: TableOptimizer):
  def sync(row, state, positions, first_row):
    return optimizer.sync(jnp.asarray(row), state, positions, first_row=first_row)

  return jax.jit(sync)


def _stored(dtype: np.dtype) -> np.dtype:
  return dtype if dtype.kind in "fiu" else np.dtype(f"u{dtype.itemsize}")
