"""The written rows of tables in a checkpoint: what a table off the device is saved as.

Rows that no step has written follow from the seed, so a folder of a checkpoint holds the others:

    rows/0.ids.npy       int32 [n], rising, of the first table's written rows
    rows/0.records.npy   [n] their records (training/host/records.py)

They are written and read block by block.
"""

import pathlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import Config
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.rules import path_name
from engram_jax.errors import StorageError
from engram_jax.memory.dialects import HashLayout
from engram_jax.training.host.caught_up import caught_up
from engram_jax.training.host.records import ROW, Records, records_of
from engram_jax.training.host.slab import draw
from engram_jax.training.rows.form import TouchedRows

FOLDER = "rows"
READ_AT_ONCE = 1 << 16  # records


class Written(Protocol):
  """A table whose written rows can be saved."""

  records: Records

  def written(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids int32 [n], records [n]) of them all, in rising order."""


def holds_written_alone(checkpoint: pathlib.Path) -> bool:
  """Whether a checkpoint's folder holds written rows, and no whole tables."""
  return (checkpoint / FOLDER).is_dir()


def write_written(tables: Sequence[Written], checkpoint: pathlib.Path) -> None:
  """Makes the folder; rows must not change meanwhile. Raises OSError."""
  folder = checkpoint / FOLDER
  folder.mkdir()
  for i, table in enumerate(tables):
    with (
      open(folder / f"{i}.ids.npy", "wb") as ids_file,
      open(folder / f"{i}.records.npy", "wb") as records_file,
    ):
      files, count = ((ids_file, np.dtype(np.int32)), (records_file, table.records.dtype)), 0
      ends = [_write_header(file, dtype, 0) for file, dtype in files]
      for ids, records in table.written():
        ids_file.write(ids.tobytes())
        records_file.write(records.tobytes())
        count += len(ids)
      for (file, dtype), end in zip(files, ends, strict=True):  # now it is known how many
        file.seek(0)
        assert _write_header(file, dtype, count) == end  # NumPy leaves room for any count


def _write_header(file: BinaryIO, dtype: np.dtype, count: int) -> int:
  """Where it ends."""
  descr = np.lib.format.dtype_to_descr(dtype)
  np.lib.format.write_array_header_2_0(
    file, {"descr": descr, "fortran_order": False, "shape": (count,)}
  )
  return file.tell()


def written_blocks(
  checkpoint: pathlib.Path, index: int, form: Records
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """(ids [n], records [n]) of a table, some at a time; StorageError if of another form."""
  folder = checkpoint / FOLDER
  ids = _blocks(folder / f"{index}.ids.npy", np.dtype(np.int32))
  return zip(ids, _blocks(folder / f"{index}.records.npy", form.dtype), strict=True)


def _blocks(path: pathlib.Path, dtype: np.dtype) -> Iterator[np.ndarray]:
  """The array of a .npy file, some at a time; StorageError if not whole, or of another form."""
  with open(path, "rb") as file:
    np.lib.format.read_magic(file)
    (count,), _, found = np.lib.format.read_array_header_2_0(file)
    if found != dtype:
      raise StorageError(f"{path} holds {found}, not {dtype}: another optimizer or row width")
    for start in range(0, count, READ_AT_ONCE):
      block = np.fromfile(file, dtype, min(READ_AT_ONCE, count - start))
      if len(block) < min(READ_AT_ONCE, count - start):
        raise StorageError(f"{path} ends after {start + len(block):,} of {count:,} records")
      yield block


def rows_of_written(
  checkpoints: Checkpoints,
  step: int,
  cfg: Config,
  layout: HashLayout,
  layer: int,
  optimizer: TouchedRows,
  size: int,
) -> Iterator[np.ndarray]:
  """All rows of a layer's table in order, [n, C] in its dtype, `size` at a time, up to date."""
  index, R = layout.layers.index(layer), layout.rows[layer]
  key = jax.random.fold_in(jax.random.key(jnp.uint32(cfg.train.seed)), 1 + layer)
  form = records_of(optimizer, cfg.model.engram, layout)[index]
  _, (width,), dtype = form.leaves[0]
  folder = checkpoints.folder(step) / FOLDER
  ids = np.load(folder / f"{index}.ids.npy", mmap_mode="r")
  records = np.load(folder / f"{index}.records.npy", mmap_mode="r")
  scalars = _scalars(checkpoints, step, index, form) if optimizer.lags else ()
  for start in range(0, R, size):
    stop = min(start + size, R)
    some = span(ids, start, stop)
    options = {"rows": R, "width": width, "std": cfg.model.init_std, "dtype": dtype}
    rows = np.array(draw(key, jnp.arange(start, stop), **options))
    ids_n, records_n = np.array(ids[some]), np.array(records[some])
    if optimizer.lags:
      records_n = caught_up(optimizer, form, scalars, ids_n, records_n, min(size, form.padded))
    rows[ids_n - start] = records_n[ROW].view(dtype)
    yield rows


def span(ids: np.ndarray, start: int, stop: int) -> slice:
  """Where the ids in [start, stop) stand among rising int32 `ids`."""
  # Bounds of another type would have the whole array converted, which may be larger than memory.
  return slice(*np.searchsorted(ids, np.array([start, stop], ids.dtype)))


def _scalars(checkpoints: Checkpoints, step: int, index: int, form: Records) -> tuple:
  return tuple(
    checkpoints.open_array(step, f"row_optimizers/{index}/{path_name(path)}").read()
    for path, x in jax.tree.leaves_with_path(form.state)
    if not x.ndim
  )
