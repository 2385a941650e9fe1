"""A row beside its optimizer's state: one record, so that a row is one place to read and to write.

A record of zeros is a row that nothing has written yet: its numbers are those `init_table` draws
for it, its state is the optimizer's first, which is zero. So a table begins as memory or as a file
of zeros, whatever its size, and costs what is written to it.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from engram_jax.config import EngramConfig
from engram_jax.memory.dialects import HashLayout
from engram_jax.memory.table import padded_rows
from engram_jax.training.rows.form import TouchedRows

ROW, WRITTEN = "row", "written"


@dataclasses.dataclass(frozen=True)
class Records:
  """How the records of one table are laid out.

  rows: R, ids that stand for rows. padded: of the array, as `memory.table.padded_rows` says.
  leaves: (name, shape of one row's part, dtype) of the row and of each per-row leaf of the state,
  in the order of its tree. state: the state's tree with shapes, per row or scalars.
  """

  rows: int
  padded: int
  leaves: tuple[tuple[str, tuple[int, ...], np.dtype], ...]
  state: Any

  @property
  def dtype(self) -> np.dtype:
    """Of one record. Numbers that NumPy has no name for (bfloat16) are stored as their bits."""
    parts = [(name, _stored(dtype), shape) for name, shape, dtype in self.leaves]
    return np.dtype([*parts, (WRITTEN, np.uint32)])

  def split(self, records_U: np.ndarray) -> tuple[np.ndarray, ...]:
    """The leaves [U, ...] of records [U], as copies that stand alone."""
    return tuple(
      np.ascontiguousarray(records_U[name]).view(dtype) for name, _, dtype in self.leaves
    )

  def row(self, records_U: np.ndarray) -> np.ndarray:
    """The rows alone, [U, C], a copy."""
    name, _, dtype = self.leaves[0]
    return np.ascontiguousarray(records_U[name]).view(dtype)

  def begun(self, rows_UC: np.ndarray) -> np.ndarray:
    """Records [U] of rows [U, C] whose optimizer has not seen a gradient, marked as written."""
    name, _, dtype = self.leaves[0]
    records_U = np.zeros(len(rows_UC), self.dtype)
    records_U[name] = rows_UC.view(_stored(dtype))
    records_U[WRITTEN] = 1
    return records_U

  def join(self, leaves: tuple[np.ndarray, ...]) -> np.ndarray:
    """Records [U] of leaves [U, ...], marked as written."""
    records_U = np.empty(len(leaves[0]), self.dtype)
    for (name, _, dtype), leaf in zip(self.leaves, leaves, strict=True):
      records_U[name] = np.asarray(leaf).view(_stored(dtype))
    records_U[WRITTEN] = 1
    return records_U

  def tree(self, per_row: tuple[Any, ...], scalars: tuple[Any, ...]) -> Any:
    """The optimizer's state of per-row leaves and scalars."""
    shapes, tree = jax.tree.flatten(self.state)
    per_row, scalars = iter(per_row), iter(scalars)
    return jax.tree.unflatten(tree, [next(per_row if x.ndim else scalars) for x in shapes])

  def apart(self, state: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(per-row leaves, scalars) of a state: the inverse of `tree`."""
    shapes, leaves = jax.tree.leaves(self.state), jax.tree.leaves(state)
    pairs = list(zip(shapes, leaves, strict=True))
    return tuple(x for s, x in pairs if s.ndim), tuple(x for s, x in pairs if not s.ndim)

  def scalars_alone(self, scalars: tuple[Any, ...]) -> Any:
    """The optimizer's state with nothing (None) for what each row has."""
    return self.tree((None,) * (len(self.leaves) - 1), scalars)

  def first_scalars(self) -> tuple[jax.Array, ...]:
    """Before any step: zeros."""
    return tuple(jax.numpy.zeros((), x.dtype) for x in jax.tree.leaves(self.state) if not x.ndim)


def make_records(
  optimizer: TouchedRows, rows: int, padded: int, width: int, dtype: np.dtype
) -> Records:
  """The records of a table [padded, width] trained by `optimizer`."""
  table = jax.ShapeDtypeStruct((padded, width), dtype)
  state = jax.eval_shape(optimizer.init, table)
  leaves = [(ROW, (width,), np.dtype(dtype))]
  for path, x in jax.tree.leaves_with_path(state):
    if x.ndim:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      leaves.append((name, x.shape[1:], np.dtype(x.dtype)))
  return Records(rows, padded, tuple(leaves), state)


def records_of(optimizer: TouchedRows, engram: EngramConfig, layout: HashLayout) -> list[Records]:
  """Of each of a model's tables."""
  dtype = jax.numpy.dtype(engram.table_dtype)
  counts = [layout.rows[layer] for layer in layout.layers]
  return [make_records(optimizer, R, padded_rows(R), engram.row_width, dtype) for R in counts]


def _stored(dtype: np.dtype) -> np.dtype:
  return dtype if dtype.kind in "fiu" else np.dtype(f"u{dtype.itemsize}")
