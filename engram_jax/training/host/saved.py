"""Checkpoints of tables on the host, and any placement's checkpoint under any other.

Two forms. Tables on devices are saved whole, by Orbax. Of tables on the host or in files, which may
be larger than memory and disk, only rows that a step has written are saved
(training/host/written.py), beside Orbax's arrays and under the same manifest: a table is never held
twice.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.saved_arrays import SavedArray
from engram_jax.errors import StorageError
from engram_jax.memory.dialects import HashLayout
from engram_jax.memory.table import init_table
from engram_jax.training.host.fetch import filled
from engram_jax.training.host.host_rows import HostRows
from engram_jax.training.host.records import Records, records_of
from engram_jax.training.host.written import (
  READ_AT_ONCE,
  holds_written_alone,
  write_written,
  written_blocks,
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
  rows.settle()
  forms = [table.records for table in rows.tables]
  state = state._replace(row_optimizers=_scalars_alone(forms, rows.scalars))
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
    return _restore_on_device(checkpoints, step, recipe, layout, bare, like)
  if of_written:
    _restore_written(checkpoints, step, rows)
  else:
    _restore_whole(checkpoints, step, rows)
  rows.forget()
  return bare


def _restore_on_device(
  checkpoints: Checkpoints,
  step: int,
  recipe: Recipe,
  layout: HashLayout,
  bare: TrainState,
  like: TrainState,
) -> TrainState:
  """Tables made where `like` says as before the first step, then the written rows put in."""
  cfg, optimizer = recipe.config, recipe.rows.optimizer
  engram, key = cfg.model.engram, jax.random.key(jnp.uint32(cfg.train.seed))
  forms = records_of(optimizer, engram, layout)
  scalars = _restored_scalars(checkpoints, step, forms)
  tables, states = [], []
  for i, (layer, form) in enumerate(zip(layout.layers, forms, strict=True)):
    where = like.tables[i], *form.apart(like.row_optimizers[i])[0]
    places = tuple(x.sharding for x in where)

    def start(layer=layer, form=form) -> tuple[jax.Array, ...]:
      own = {"std": cfg.model.init_std, "dtype": form.leaves[0][2], "mesh": recipe.spread}
      table = init_table(jax.random.fold_in(key, 1 + layer), form.rows, engram.row_width, **own)
      return table, *form.apart(optimizer.init(table))[0]

    leaves = jax.jit(start, out_shardings=places)()
    put = jax.jit(_put, donate_argnums=0, out_shardings=places)
    for ids, records in written_blocks(checkpoints.folder(step), i, form):
      size = min(READ_AT_ONCE, form.padded)
      ids = filled(ids, size, np.iinfo(np.int32).max)  # which is past the end: dropped
      leaves = put(leaves, ids, tuple(filled(x, size) for x in form.split(records)))
    alone = form.apart(like.row_optimizers[i])[1]
    counted = (jax.device_put(x, y.sharding) for x, y in zip(scalars[i], alone, strict=True))
    tables.append(leaves[0])
    states.append(form.tree(leaves[1:], tuple(counted)))
  return bare._replace(tables=tuple(tables), row_optimizers=tuple(states))


def _put(leaves: tuple[jax.Array, ...], ids: jax.Array, new: tuple[jax.Array, ...]) -> tuple:
  return tuple(
    x.at[ids].set(y, mode="drop", wrap_negative_indices=False)
    for x, y in zip(leaves, new, strict=True)
  )


def _scalars_alone(forms: list[Records], scalars: list[tuple]) -> tuple[Any, ...]:
  """The optimizers' states with nothing (None) for what each row has."""
  return tuple(form.scalars_alone(n) for form, n in zip(forms, scalars, strict=True))


def _restored_scalars(checkpoints: Checkpoints, step: int, forms: list[Records]) -> list[tuple]:
  first = [form.first_scalars() for form in forms]
  like = {"row_optimizers": _scalars_alone(forms, first)}
  found = checkpoints.restore(step, like, partial=True)["row_optimizers"]
  return [tuple(jax.tree.leaves(state)) for state in found]


def _restore_whole(checkpoints: Checkpoints, step: int, rows: HostRows) -> None:
  rows.scalars = _restored_scalars(checkpoints, step, [table.records for table in rows.tables])
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
  rows.scalars = _restored_scalars(checkpoints, step, [table.records for table in rows.tables])
  for i, table in enumerate(rows.tables):
    for ids, records in written_blocks(checkpoints.folder(step), i, table.records):
      table.put(ids, records)
