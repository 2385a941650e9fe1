"""One step of a run that train.py wrote, opened for reading: what its numbers mean, and its rows.

    with load_run(pathlib.Path("runs/tiny"), None, print) as run:
      for rows_nC in run.rows(layer): ...

Neither a table nor its optimizer's state is ever held whole.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from engram_jax.config import Config
from engram_jax.config.bounded import shorten
from engram_jax.core import manifest
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.rules import path_name
from engram_jax.core.run_directory import CHECKPOINTS, TOKENIZER, open_run
from engram_jax.core.saved_arrays import SavedArray
from engram_jax.errors import ConfigError, StorageError
from engram_jax.memory.compress import tokenizer_digest
from engram_jax.memory.hashing import HashLayout
from engram_jax.memory.table import draw_rows
from engram_jax.memory.vocabulary import Vocabulary, check_fingerprint, read_tokenizer
from engram_jax.tables.base import Tables
from engram_jax.tables.row_checkpoint import FOLDER, OPTIMIZERS, TABLES, holds_written_rows
from engram_jax.tables.row_schema import ROW, RowSchema, synced_records

BLOCK_BYTES = 16 << 20  # of float32 rows held at once


@dataclasses.dataclass(frozen=True)
class SavedRun:
  """A step of a run.

  path: of its folder. step: which was saved and is sound. meta: what the checkpoint carries, the
  fingerprint of its data among it. tokenizer: the one that the run was trained with.
  """

  path: pathlib.Path
  config: Config
  checkpoints: Checkpoints
  step: int
  meta: dict[str, Any]
  tokenizer: tokenizers.Tokenizer

  @functools.cached_property
  def layout(self) -> HashLayout | None:
    """The hash layout of its tables; None without a memory.

    Raises StorageError where it is none, or another than its config asks for.
    """
    stored, engram = self.meta["hash_layout"], self.config.model.engram
    where = f"{self.path} is damaged: hash_layout in its checkpoint's meta"
    if not stored:
      if engram.layers:
        raise StorageError(f"{where} is missing, but its config has model.engram.layers")
      return None
    try:
      layout = HashLayout.from_description(stored)
    except ValueError as error:
      raise StorageError(f"{where}: {error}") from None
    for name in ("dialect", "layers", "rows_per_head", "max_ngram", "heads", "seed"):
      if getattr(layout, name) != getattr(engram, name):
        raise StorageError(
          f"{where}: {name} is {shorten(getattr(layout, name))}, but its config has "
          f"{shorten(getattr(engram, name))}"
        )
    return layout

  @functools.cached_property
  def vocabulary(self) -> Vocabulary:
    """Rebuilt from its tokenizer and config; ConfigError where it is not what it was."""
    vocabulary = Vocabulary.build(self.config.model, self.tokenizer)
    if self.layout:
      digest = vocabulary.compressor.digest
      check_fingerprint(self.meta, {"token_map_digest": digest}, str(self.path))
    return dataclasses.replace(vocabulary, layout=self.layout)

  @functools.cached_property
  def tables(self) -> Tables:
    """Its tables, as they would lie on one device."""
    return Tables.of(self.config.on_device(), self.layout)

  @property
  def digest(self) -> str:
    """The checkpoint's: its manifest's, which holds those of all its files."""
    path = self.checkpoints.folder(self.step) / manifest.NAME
    return json.loads(path.read_bytes())["digest"]

  def rows(self, layer: int) -> Iterator[np.ndarray]:
    """The rows of a layer's table in order, without pad rows, as float32 [n, C] blocks.

    Rows that a lazy optimizer has left behind are brought up to date, as `Tables.flush` does, with
    those slices of the optimizer's state that belong to them.

    Raises StorageError if the checkpoint is damaged or its arrays do not fit the layout.
    """
    size = max(1, BLOCK_BYTES // (4 * self.tables.cfg.row_width))
    read = _written_rows if holds_written_rows(self.checkpoints, self.step) else _whole_rows
    for rows_nC in read(self, layer, size):
      yield rows_nC.astype(np.float32)


@contextlib.contextmanager
def load_run(
  path: pathlib.Path, step: int | None, log: Callable[[str], None], where: str | None = None
) -> Generator[SavedRun]:
  """Opens a step of a run: the one asked for, or the newest that is sound.

  Args:
    log: is told of checkpoints that cannot be used.
    where: what names the run, for messages; `--run` with its path if left out.

  Raises ConfigError for a folder that is no run, a step that is not saved, or a tokenizer.json that
  is missing or not the one it was trained with; StorageError for damaged files.
  """
  cfg = open_run(path)
  with Checkpoints(path / CHECKPOINTS, keep=None) as checkpoints:
    if step is None:
      step = checkpoints.newest_valid(log)
      if step is None:
        where = where or f"--run {path}"
        raise ConfigError(f"{where} holds no sound checkpoint yet; train it first")
    elif step not in (steps := checkpoints.steps()):
      raise ConfigError(f"--step {step} is not saved in {path}: {steps} are")
    if not (path / TOKENIZER).is_file():
      raise ConfigError(f"run {path}: no {TOKENIZER} there; put the one back that train.py wrote")
    meta, tokenizer = checkpoints.meta(step), read_tokenizer(path / TOKENIZER)
    digest = tokenizer_digest(tokenizer)
    check_fingerprint(meta, {"tokenizer_digest": digest}, str(path))
    yield SavedRun(path, cfg, checkpoints, step, meta, tokenizer)


def _whole_rows(run: SavedRun, layer: int, size: int) -> Iterator[np.ndarray]:
  """All rows of a table that was saved whole."""
  tables, checkpoints, step = run.tables, run.checkpoints, run.step
  index, rows, optimizer = tables.layers.index(layer), tables.row_counts[layer], tables.optimizer
  table = checkpoints.open_array(step, f"{TABLES}/{index}")
  flush, state = jax.jit(optimizer.flush), None
  if optimizer.is_lazy:
    state = _saved_state(run, f"{OPTIMIZERS}/{index}", table)
  for start in range(0, rows, size):
    stop = min(start + size, rows)
    some = table.read(start, stop)
    if state is not None:
      part = jax.tree.map(lambda x: _part(x, start, stop), state)  # noqa: B023 (used at once)
      some, _ = flush(some, part, first_row=np.int32(start))
    yield np.asarray(some)


def _saved_state(run: SavedRun, prefix: str, table: SavedArray) -> Any:
  """The state of a table's optimizer as a tree of unread arrays."""
  shape = jax.ShapeDtypeStruct(table.shape, jnp.dtype(table.dtype))
  like = jax.eval_shape(run.tables.optimizer.init, shape)
  return jax.tree_util.tree_map_with_path(
    lambda path, _: run.checkpoints.open_array(run.step, f"{prefix}/{path_name(path)}"), like
  )


def _part(array: SavedArray, start: int, stop: int) -> np.ndarray:
  return array.read(start, stop) if array.shape else array.read()


def _written_rows(run: SavedRun, layer: int, size: int) -> Iterator[np.ndarray]:
  """All rows of a table of which the checkpoint holds the written ones."""
  tables = run.tables
  index, R, schema = tables.layers.index(layer), tables.row_counts[layer], tables.schemas[layer]
  _, (width,), dtype = schema.leaves[0]
  folder, is_lazy = run.checkpoints.folder(run.step) / FOLDER, tables.optimizer.is_lazy
  ids = np.load(folder / f"{index}.ids.npy", mmap_mode="r")
  records = np.load(folder / f"{index}.records.npy", mmap_mode="r")
  scalars = _scalars(run, index, schema) if is_lazy else ()
  key = tables.key_of(tables.key(run.config), layer)
  for start in range(0, R, size):
    stop = min(start + size, R)
    some = span(ids, start, stop)
    options: dict[str, Any] = {"rows": R, "width": width, "std": tables.init_std, "dtype": dtype}
    rows = np.array(_draw(key, jnp.arange(start, stop), **options))
    ids_n, records_n = np.array(ids[some]), np.array(records[some])
    if is_lazy:
      args = (tables.optimizer, schema, scalars, ids_n, records_n)
      records_n = synced_records(*args, min(size, schema.padded))
    rows[ids_n - start] = records_n[ROW].view(dtype)
    yield rows


_draw = jax.jit(draw_rows, static_argnames=("rows", "width", "std", "dtype"))


def span(ids: np.ndarray, start: int, stop: int) -> slice:
  """The slice of rising int32 `ids` that lies in [start, stop)."""
  # Bounds of another dtype would have the whole array converted, which may be larger than memory.
  return slice(*np.searchsorted(ids, np.array([start, stop], ids.dtype)))


def _scalars(run: SavedRun, index: int, schema: RowSchema) -> tuple:
  return tuple(
    run.checkpoints.open_array(run.step, f"{OPTIMIZERS}/{index}/{path_name(path)}").read()
    for path, x in jax.tree.leaves_with_path(schema.state)
    if not x.ndim
  )
