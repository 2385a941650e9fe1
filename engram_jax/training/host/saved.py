"""Checkpoints of tables on the host, and any placement's checkpoint under any other.

Two forms. Tables in memory are saved whole, as those on a device are: leaf for leaf the same
arrays. Of tables in files, which may be larger than memory and disk, only rows that a step has
written are saved (training/host/written.py), beside Orbax's arrays and under the same manifest.
"""

from typing import Any

import jax
import numpy as np

from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.saved_arrays import SavedArray
from engram_jax.errors import StorageError
from engram_jax.memory.dialects import HashLayout
from engram_jax.training.host.host_rows import HostRows
from engram_jax.training.host.records import Records
from engram_jax.training.host.written import (
  FOLDER,
  blocks,
  holds_written_alone,
  write_written,
)
from engram_jax.training.state import Recipe, TrainState, logical_rows, state_shapes

_BLOCK = 1 << 16  # rows read at once


def save(
  checkpoints: Checkpoints,
  step: int,
  state: TrainState,
  meta: dict[str, Any],
  rows: HostRows | None,
) -> None:
  """`checkpoints.save` of the state together with the tables in `rows`, where there are such."""
  if rows is None:
    checkpoints.save(step, state, meta)
    return
  if rows.placement == "host":
    checkpoints.save(step, _whole(state, rows), meta)
    return
  rows.settle()
  state = state._replace(row_optimizers=_scalars_alone(rows, rows.scalars))
  write = lambda folder: write_written(rows.tables, folder)
  checkpoints.save(step, state, meta, files=write)


def restore(
  checkpoints: Checkpoints,
  step: int,
  recipe: Recipe,
  layout: HashLayout | None,
  rows: HostRows | None,
) -> TrainState:
  """The state of a step, saved under any placement; tables go into `rows` where it is given.

  What goes into `rows` is read block by block. Raises StorageError as `Checkpoints.restore` does.
  """
  like, of_written = state_shapes(recipe, layout), holds_written_alone(checkpoints.folder(step))
  if rows is None and not of_written:
    return checkpoints.restore(step, like, rows=logical_rows(layout))
  bare = checkpoints.restore(step, like._replace(tables=(), row_optimizers=()), partial=True)
  if rows is None:
    with HostRows(recipe, layout, checkpoints.directory, placement="host") as rows:
      _restore_written(checkpoints, step, rows)
      return _on_device(bare, like, rows)
  if of_written:
    _restore_written(checkpoints, step, rows)
  else:
    _restore_whole(checkpoints, step, rows)
  rows.forget()
  return bare


def _whole(state: TrainState, rows: HostRows) -> TrainState:
  """The state with all leaves of tables in memory; views of them."""
  leaves, forms = rows.whole(), [table.records for table in rows.tables]
  states = [f.tree(x[1:], n) for f, x, n in zip(forms, leaves, rows.scalars, strict=True)]
  return state._replace(tables=tuple(x[0] for x in leaves), row_optimizers=tuple(states))


def _on_device(bare: TrainState, like: TrainState, rows: HostRows) -> TrainState:
  """The whole state where `like` says, a table with as many pad rows as there."""

  def place(x: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    whole = np.zeros(like.shape, like.dtype)
    common = tuple(slice(min(n, m)) for n, m in zip(like.shape, x.shape, strict=True))
    whole[common] = np.asarray(x)[common]
    return jax.device_put(whole, like.sharding)

  whole = _whole(bare, rows)
  return bare._replace(
    tables=jax.tree.map(place, whole.tables, like.tables),
    row_optimizers=jax.tree.map(place, whole.row_optimizers, like.row_optimizers),
  )


def _scalars_alone(rows: HostRows, scalars: list[tuple]) -> tuple[Any, ...]:
  """The optimizers' states with nothing (None) for what each row has."""
  forms = [table.records for table in rows.tables]
  return tuple(
    f.tree((None,) * (len(f.leaves) - 1), n) for f, n in zip(forms, scalars, strict=True)
  )


def _restore_scalars(checkpoints: Checkpoints, step: int, rows: HostRows) -> None:
  like = {"row_optimizers": _scalars_alone(rows, rows.scalars)}
  found = checkpoints.restore(step, like, partial=True)["row_optimizers"]
  rows.scalars = [tuple(jax.tree.leaves(state)) for state in found]


def _restore_whole(checkpoints: Checkpoints, step: int, rows: HostRows) -> None:
  _restore_scalars(checkpoints, step, rows)
  for i, table in enumerate(rows.tables):
    form = table.records
    arrays = [
      _opened(checkpoints, step, f"tables/{i}" if j == 0 else f"row_optimizers/{i}/{name}", form, j)
      for j, (name, _, _) in enumerate(form.leaves)
    ]
    end = min(form.padded, arrays[0].shape[0])  # pad rows too: they have a state
    for start in range(0, end, _BLOCK):
      stop = min(start + _BLOCK, end)
      leaves = tuple(array.read(start, stop) for array in arrays)
      table.put(np.arange(start, stop), form.join(leaves))


def _opened(checkpoints: Checkpoints, step: int, path: str, form: Records, leaf: int) -> SavedArray:
  """An array to be read for a leaf; StorageError unless it is of that leaf's form."""
  array, (_, shape, dtype) = checkpoints.open_array(step, path), form.leaves[leaf]
  if array.dtype != dtype or array.shape[1:] != shape or array.shape[0] < form.rows:
    raise StorageError(
      f"{checkpoints.folder(step)} does not fit this state: {path} is {array.dtype} "
      f"{list(array.shape)} there, {dtype} {[form.padded, *shape]} here"
    )
  return array


def _restore_written(checkpoints: Checkpoints, step: int, rows: HostRows) -> None:
  _restore_scalars(checkpoints, step, rows)
  folder = checkpoints.folder(step) / FOLDER
  for i, table in enumerate(rows.tables):
    ids = blocks(folder / f"{i}.ids.npy", np.dtype(np.int32))
    records = blocks(folder / f"{i}.records.npy", table.records.dtype)
    for ids_n, records_n in zip(ids, records, strict=True):
      table.put(ids_n, records_n)
