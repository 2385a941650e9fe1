"""The written rows of tables in a checkpoint: what a table in a file is saved as.

Rows that no step has written follow from the seed, so a folder of a checkpoint holds the others:

    rows/0.ids.npy       int32 [n], rising, of the first table's written rows
    rows/0.records.npy   [n] their records (training/host/records.py)

They are written and read block by block.
"""

import pathlib
from collections.abc import Iterator
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import Config
from engram_jax.errors import StorageError
from engram_jax.memory.dialects import HashLayout
from engram_jax.training.host.records import ROW
from engram_jax.training.host.slab import draw
from engram_jax.training.host.table import FileTable

FOLDER = "rows"
_BLOCK = 1 << 16  # records read at once


def holds_written_alone(checkpoint: pathlib.Path) -> bool:
  """Whether a checkpoint's folder holds written rows, and no whole tables."""
  return (checkpoint / FOLDER).is_dir()


def write_written(tables: list[FileTable], checkpoint: pathlib.Path) -> None:
  """Makes the folder; rows must not change meanwhile. Raises OSError."""
  folder = checkpoint / FOLDER
  folder.mkdir()
  for i, table in enumerate(tables):
    count = sum(len(ids) for ids, _ in table.written())
    with (
      open(folder / f"{i}.ids.npy", "wb") as ids_file,
      open(folder / f"{i}.records.npy", "wb") as records_file,
    ):
      _write_header(ids_file, np.dtype(np.int32), count)
      _write_header(records_file, table.records.dtype, count)
      for ids, records in table.written():
        ids_file.write(ids.tobytes())
        records_file.write(records.tobytes())


def _write_header(file: BinaryIO, dtype: np.dtype, count: int) -> None:
  descr = np.lib.format.dtype_to_descr(dtype)
  np.lib.format.write_array_header_2_0(
    file, {"descr": descr, "fortran_order": False, "shape": (count,)}
  )


def blocks(path: pathlib.Path, dtype: np.dtype) -> Iterator[np.ndarray]:
  """The array of a .npy file, some at a time; StorageError if not whole, or of another form."""
  with open(path, "rb") as file:
    np.lib.format.read_magic(file)
    (count,), _, found = np.lib.format.read_array_header_2_0(file)
    if found != dtype:
      raise StorageError(f"{path} holds {found}, not {dtype}: another optimizer or row width")
    for start in range(0, count, _BLOCK):
      block = np.fromfile(file, dtype, min(_BLOCK, count - start))
      if len(block) < min(_BLOCK, count - start):
        raise StorageError(f"{path} ends after {start + len(block):,} of {count:,} records")
      yield block


def rows_of_written(
  checkpoint: pathlib.Path, cfg: Config, layout: HashLayout, layer: int, size: int
) -> Iterator[np.ndarray]:
  """All rows of a layer's table in order, [n, C] in its dtype, `size` at a time."""
  engram, index = cfg.model.engram, layout.layers.index(layer)
  key = jax.random.fold_in(jax.random.key(jnp.uint32(cfg.train.seed)), 1 + layer)
  dtype = jnp.dtype(engram.table_dtype)
  options = {"rows": layout.rows[layer], "width": engram.row_width, "dtype": dtype}
  ids = np.load(checkpoint / FOLDER / f"{index}.ids.npy", mmap_mode="r")
  records = np.load(checkpoint / FOLDER / f"{index}.records.npy", mmap_mode="r")
  for start in range(0, layout.rows[layer], size):
    stop = min(start + size, layout.rows[layer])
    first, end = np.searchsorted(ids, [start, stop])
    rows = np.array(draw(key, jnp.arange(start, stop), std=cfg.model.init_std, **options))
    rows[ids[first:end] - start] = records[ROW][first:end].view(dtype)
    yield rows
