"""Tables in a checkpoint: saved under any placement, restored under any other.

Two forms. Tables on devices are saved whole, by Orbax. Of tables on the host or in files, which may
be larger than memory and disk, only the rows that a step has written are saved, beside Orbax's
arrays and under the same manifest, so that a table is never held twice. The others follow from the
seed. A folder of a checkpoint then holds, for the i-th table,

    rows/i.ids.npy       int32 [n], rising, of its written rows
    rows/i.records.npy   [n] their records (tables/row_schema.py)

which are written and read block by block. The stored names are tables/i and row_optimizers/i.
"""

import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Protocol

import jax
import numpy as np

from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.mesh import replicated
from engram_jax.core.saved_arrays import SavedArray
from engram_jax.errors import StorageError
from engram_jax.tables.row_schema import RowSchema, padded
from engram_jax.tables.state import TableState

FOLDER = "rows"
TABLES, OPTIMIZERS = "tables", "row_optimizers"  # stored names
RECORDS_AT_ONCE = 1 << 16


class WrittenRows(Protocol):
  """A table whose written rows can be saved."""

  schema: RowSchema

  def written(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Gives (ids int32 [n], records [n]) of them all, in rising order."""


def save(
  checkpoints: Checkpoints,
  step: int,
  state: TableState,
  rest: Mapping[str, Any],
  meta: dict[str, Any],
  is_sound: bool = True,
) -> None:
  """Saves tables and the rest of a training state; see `Tables.save`."""
  tree = dict(rest) | stored_tables(state)
  if state.host is None:
    checkpoints.save(step, tree, meta, is_sound=is_sound)
    return
  state.host.settle()
  tables = _values(state.host.tables)
  files = lambda folder: write_written(tables, folder)
  checkpoints.save(step, tree, meta, files, is_sound)


def restore(
  checkpoints: Checkpoints, step: int, like: Mapping[str, Any], tables: Any, key: jax.Array
) -> tuple[TableState, dict[str, Any]]:
  """(tables, the rest) of a step; see `Tables.restore`."""
  has_written = holds_written_rows(checkpoints, step)
  if not tables.is_offloaded and not has_written:
    whole = stored_tables(tables.shapes)
    # A mesh whose devices do not divide 1,024 has more pad rows than another.
    counts = enumerate(tables.row_counts.values())
    rows = {f"{part}/{i}": R for i, R in counts for part in whole}
    found = checkpoints.restore(step, dict(like) | whole, rows=rows)
    by_layer = lambda part: dict(zip(tables.layers, found[part], strict=True))
    return TableState(by_layer(TABLES), by_layer(OPTIMIZERS)), {k: found[k] for k in like}
  rest = checkpoints.restore(step, dict(like), partial=True)
  scalars = _restore_scalars(checkpoints, step, tables)
  if not tables.is_offloaded:
    return _put_written(checkpoints, step, tables, key, scalars), rest
  state = tables.init(key)
  read = _written_records if has_written else _whole_records
  for i, table in enumerate(state.host.tables.values()):
    for ids, records in read(checkpoints, step, i, table.schema):
      table.put(ids, records)
  return state.host.state(dict(zip(tables.layers, scalars, strict=True))), rest


def stored_tables(state: TableState) -> dict[str, Any]:
  """Tables and their optimizer's states under the names that checkpoints have."""
  return {TABLES: _values(state.tables), OPTIMIZERS: _values(state.optimizer)}


def holds_written_rows(checkpoints: Checkpoints, step: int) -> bool:
  """Says whether a checkpoint holds written rows in place of complete tables."""
  return (checkpoints.folder(step) / FOLDER).is_dir()


def write_written(tables: Sequence[WrittenRows], checkpoint: pathlib.Path) -> None:
  """Makes the folder of written rows, which must not change meanwhile. Raises OSError."""
  folder = checkpoint / FOLDER
  folder.mkdir()
  for i, table in enumerate(tables):
    with (
      open(folder / f"{i}.ids.npy", "wb") as ids_file,
      open(folder / f"{i}.records.npy", "wb") as records_file,
    ):
      files, count = ((ids_file, np.dtype(np.int32)), (records_file, table.schema.dtype)), 0
      ends = [_write_header(file, dtype, 0) for file, dtype in files]
      for ids, records in table.written():
        ids_file.write(ids.tobytes())
        records_file.write(records.tobytes())
        count += len(ids)
      for (file, dtype), end in zip(files, ends, strict=True):  # now it is known how many
        file.seek(0)
        assert _write_header(file, dtype, count) == end  # NumPy leaves room for any count


def _write_header(file: BinaryIO, dtype: np.dtype, count: int) -> int:
  """Writes a .npy header; returns where it ends."""
  descr = np.lib.format.dtype_to_descr(dtype)
  np.lib.format.write_array_header_2_0(
    file, {"descr": descr, "fortran_order": False, "shape": (count,)}
  )
  return file.tell()


def _written_records(
  checkpoints: Checkpoints, step: int, index: int, schema: RowSchema
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """(ids [n], records [n]) of a table, some at a time; StorageError if of another schema."""
  folder = checkpoints.folder(step) / FOLDER
  ids = _blocks(folder / f"{index}.ids.npy", np.dtype(np.int32))
  return zip(ids, _blocks(folder / f"{index}.records.npy", schema.dtype), strict=True)


def _blocks(path: pathlib.Path, dtype: np.dtype) -> Iterator[np.ndarray]:
  """The array of a .npy file, some at a time; StorageError if cut off, or of another dtype."""
  with open(path, "rb") as file:
    np.lib.format.read_magic(file)
    (count,), _, found = np.lib.format.read_array_header_2_0(file)
    if found != dtype:
      raise StorageError(f"{path} holds {found}, not {dtype}: another optimizer or row width")
    for start in range(0, count, RECORDS_AT_ONCE):
      block = np.fromfile(file, dtype, min(RECORDS_AT_ONCE, count - start))
      if len(block) < min(RECORDS_AT_ONCE, count - start):
        raise StorageError(f"{path} ends after {start + len(block):,} of {count:,} records")
      yield block


def _whole_records(
  checkpoints: Checkpoints, step: int, index: int, schema: RowSchema
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """(ids [n], records [n]) of a table that was saved whole, some at a time."""
  paths = [f"{TABLES}/{index}", *(f"{OPTIMIZERS}/{index}/{n}" for n, _, _ in schema.leaves[1:])]
  arrays = [_open(checkpoints, step, path, schema, j) for j, path in enumerate(paths)]
  end = min(schema.padded, arrays[0].shape[0])  # pad rows too: they have a state
  for start in range(0, end, RECORDS_AT_ONCE):
    stop = min(start + RECORDS_AT_ONCE, end)
    leaves = tuple(array.read(start, stop) for array in arrays)
    yield np.arange(start, stop), schema.pack(leaves)


def _open(
  checkpoints: Checkpoints, step: int, path: str, schema: RowSchema, leaf: int
) -> SavedArray:
  """An array to be read for a leaf; StorageError unless it has that leaf's shape and dtype."""
  array, (_, shape, dtype) = checkpoints.open_array(step, path), schema.leaves[leaf]
  if array.dtype != dtype or array.shape[1:] != shape or array.shape[0] < schema.rows:
    raise StorageError(
      f"{checkpoints.folder(step)} does not fit this state: {path} is {array.dtype} "
      f"{list(array.shape)} there, {dtype} {[schema.padded, *shape]} here"
    )
  return array


def _put_written(
  checkpoints: Checkpoints, step: int, tables: Any, key: jax.Array, scalars: list[tuple]
) -> TableState:
  """Tables made on their devices as before the first step, then the written rows put in."""
  state = tables.init(key)
  made, optimizers = {}, {}
  for i, (n, schema) in enumerate(tables.schemas.items()):
    leaves = (state.tables[n], *schema.split_state(state.optimizer[n])[0])
    put = jax.jit(_put, donate_argnums=0, out_shardings=tuple(x.sharding for x in leaves))
    for ids, records in _written_records(checkpoints, step, i, schema):
      size = min(RECORDS_AT_ONCE, schema.padded)
      ids = padded(ids, size, np.iinfo(np.int32).max)  # which is past the end: dropped
      leaves = put(leaves, ids, tuple(padded(x, size) for x in schema.unpack(records)))
    old_scalars = schema.split_state(state.optimizer[n])[1]
    new = (jax.device_put(x, y.sharding) for x, y in zip(scalars[i], old_scalars, strict=True))
    made[n], optimizers[n] = leaves[0], schema.join_state(leaves[1:], tuple(new))
  return TableState(made, optimizers)


def _put(leaves: tuple[jax.Array, ...], ids: jax.Array, new: tuple[jax.Array, ...]) -> tuple:
  return tuple(
    x.at[ids].set(y, mode="drop", wrap_negative_indices=False)
    for x, y in zip(leaves, new, strict=True)
  )


def _restore_scalars(checkpoints: Checkpoints, step: int, tables: Any) -> list[tuple]:
  """The scalars of each table's optimizer state."""
  schemas = tables.schemas.values()
  like = {OPTIMIZERS: tuple(s.scalars_alone(s.first_scalars()) for s in schemas)}
  if tables.mesh is not None:  # else the step would be compiled again for what it returns
    place = functools.partial(jax.ShapeDtypeStruct, sharding=replicated(tables.mesh))
    like = jax.tree.map(lambda x: place(x.shape, x.dtype), like)
  found = checkpoints.restore(step, like, partial=True)[OPTIMIZERS]
  return [tuple(jax.tree.leaves(state)) for state in found]


def _values(by_layer: Mapping[int, Any]) -> tuple[Any, ...]:
  return tuple(by_layer[n] for n in sorted(by_layer))
