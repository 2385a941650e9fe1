"""Tables on the host, trained through slabs: rows of the next step are read while one runs.

    with HostRows(recipe, layout, folder) as rows:
      for batch in rows.ahead(batches):            row_ids become places in the step's slabs
        state, metrics = rows.step(state, batch)

One thread reads and writes, in this order, so that a read knows what it sees: rows of step t + 1
are read after those of step t - 1 were written, while step t runs. What step t itself changes of
them is not taken from there but, on the device, from its result. So every step gets the rows it
would find in a table on the device, and waits for none that was read in time.

A `TrainState` between such steps has no tables and no state of theirs: they are here.
"""

import concurrent.futures
import functools
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.memory.dialects import HashLayout
from engram_jax.training.host.caught_up import caught_up
from engram_jax.training.host.fetch import Came, Table, came_for, filled, fresh_rows
from engram_jax.training.host.records import WRITTEN, records_of
from engram_jax.training.host.slab import draw_fresh, first_rows, make_slab, make_slab_step
from engram_jax.training.host.table import AT_ONCE, FileTable, HostTable
from engram_jax.training.state import Recipe, TrainState

_POLL_SECONDS = 1e-3


class HostRows:
  """The tables of a run on its host; a context manager. Errors of its thread, such as a
  StorageError, are raised by the next call."""

  def __init__(self, recipe: Recipe, layout: HashLayout, folder: pathlib.Path):
    """Tables as `init_table` makes them, and optimizers before their first step.

    Args:
      recipe: of one device.
      layout: of the tables.
      folder: there already, on the disk for the files of the placement "file".
    """
    cfg = recipe.config
    self.optimizer, self._std = recipe.rows.optimizer, cfg.model.init_std
    engram, key = cfg.model.engram, jax.random.key(jnp.uint32(cfg.train.seed))
    self._keys = [jax.random.fold_in(key, 1 + layer) for layer in layout.layers]
    make = HostTable if engram.placement == "host" else functools.partial(FileTable, folder)
    self.tables: list[Table] = [make(f) for f in records_of(self.optimizer, engram, layout)]
    self.scalars = [table.records.first_scalars() for table in self.tables]
    self._program = make_slab_step(recipe)
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "rows")
    self._next: tuple[dict, concurrent.futures.Future] | None = None  # read ahead
    self._ready: list[Came] | None = None  # for the step that comes
    self._latest: list[tuple] | None = None  # leaves of the last step's slabs
    self._last_ids: list[np.ndarray] | None = None  # of the last read; the thread's own
    self._writing: concurrent.futures.Future | None = None
    self._loss: jax.Array | None = None
    self._reset_counts()

  def __enter__(self) -> "HostRows":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    self._thread.shutdown(cancel_futures=kind is not None)
    for table in self.tables:
      table.close()
    if kind is None:
      self.settle()

  # --- a step ------------------------------------------------------------------------------

  def ahead(self, batches: Iterable[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """The batches, `row_ids` replaced by places; the one after is read, its rows too."""
    for batch in batches:
      now, self._next = self._next, (batch, self._thread.submit(self._read, batch["row_ids"]))
      if now is not None:
        yield self._arrived(*now)
    if self._next is not None:
      now, self._next = self._next, None
      yield self._arrived(*now)

  def step(self, state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, dict]:
    """`make_train_step`'s step on a batch of `ahead`; the state's buffers are donated."""
    came, self._ready = self._ready, None
    assert came is not None, "each batch of ahead() is for one step"
    slabs = [self._slab(i, c) for i, c in enumerate(came)]
    states = [
      t.records.tree(s[1:], n) for t, s, n in zip(self.tables, slabs, self.scalars, strict=True)
    ]
    full = state._replace(tables=tuple(s[0] for s in slabs), row_optimizers=tuple(states))
    new, metrics = self._program(full, batch, tuple(c.padded for c in came))
    parts = [t.records.apart(s) for t, s in zip(self.tables, new.row_optimizers, strict=True)]
    self.scalars = [scalars for _, scalars in parts]
    self._latest = [(t, *rows) for t, (rows, _) in zip(new.tables, parts, strict=True)]
    self._loss = metrics["loss"]
    self._write_back(came)
    return new._replace(tables=(), row_optimizers=()), metrics

  def _slab(self, i: int, came: Came) -> tuple[jax.Array, ...]:
    """The leaves [U, ...] of a table's slab."""
    row, *rest = came.leaves
    if came.fresh is not None:
      rows = self.tables[i].records.rows
      row = draw_fresh(row, self._keys[i], came.fresh, rows=rows, std=self._std)
    before = None if came.source is None else self._latest[i]
    return make_slab((row, *rest), came.source, before, size=came.padded.size)

  def _write_back(self, came: list[Came]) -> None:
    """Starts the way back; the copies are made before another step can be ahead of them."""
    back = [
      first_rows(leaves, size=c.leaves[0].shape[0])
      for c, leaves in zip(came, self._latest, strict=True)
    ]
    for x in jax.tree.leaves(back):
      x.copy_to_host_async()
      self._from_device += x.nbytes
    self._check_writing()
    self._writing = self._thread.submit(self._write, [c.ids for c in came], back, self._writing)

  def _arrived(self, batch: dict, future: concurrent.futures.Future) -> dict:
    self._ready, places_LBTJ = self._wait(future)
    self._to_device += sum(x.nbytes for c in self._ready for x in jax.tree.leaves(c[1:]))
    return batch | {"row_ids": places_LBTJ}

  def _wait(self, future: concurrent.futures.Future) -> Any:
    """The result; time in which the device has nothing to do counts as waited."""
    while not future.done():
      idle, begin = self._loss is None or self._loss.is_ready(), time.perf_counter()
      concurrent.futures.wait([future], timeout=_POLL_SECONDS)
      if idle:
        self._waited += time.perf_counter() - begin
    return future.result()

  # --- the thread --------------------------------------------------------------------------

  def _read(self, row_ids_LBTJ: np.ndarray, alone: bool = False) -> tuple[list[Came], np.ndarray]:
    """(a slab's content for each table, places [L, B, T, J]). alone: the step before wrote all."""
    distinct = [np.unique(ids, return_inverse=True) for ids in row_ids_LBTJ]
    before = [None] * len(self.tables) if alone or self._last_ids is None else self._last_ids
    self._last_ids = [ids for ids, _ in distinct]
    came = [
      came_for(self.tables[i], ids, last, row_ids_LBTJ[i].size)
      for i, (ids, last) in enumerate(zip(self._last_ids, before, strict=True))
    ]
    places = [p.reshape(row_ids_LBTJ.shape[1:]).astype(np.int32) for _, p in distinct]
    return came, np.stack(places)

  def _write(
    self, ids: list[np.ndarray], back: list, before: concurrent.futures.Future | None
  ) -> None:
    if before is not None:
      before.result()  # what failed once has left rows that nothing may be built on
    for table, ids_n, leaves in zip(self.tables, ids, back, strict=True):
      table.put(ids_n, table.records.join(tuple(np.asarray(x)[: len(ids_n)] for x in leaves)))

  def _check_writing(self) -> None:
    if self._writing is not None and self._writing.done():
      self._writing.result()

  # --- between steps -----------------------------------------------------------------------

  def settle(self) -> None:
    """Returns once all that was computed is in the tables."""
    if self._writing is not None:
      self._writing.result()

  def read(self, row_ids_LBTJ: np.ndarray) -> tuple[tuple[jax.Array, ...], np.ndarray]:
    """(rows [U, C] of each table, places [L, B, T, J]): `lookup` there is `lookup` in a table."""
    self.settle()
    slabs, places = [], []
    for i, row_ids in enumerate(np.asarray(row_ids_LBTJ)):
      ids, inverse = np.unique(row_ids, return_inverse=True)
      table = self.tables[i]
      records_n = table.take(ids)
      U = min(row_ids.size, table.records.padded)
      fresh = fresh_rows(np.flatnonzero(records_n[WRITTEN] == 0), ids, U)
      row = jnp.asarray(filled(table.records.row(records_n), U))
      if fresh is not None:
        row = draw_fresh(row, self._keys[i], fresh, rows=table.records.rows, std=self._std)
      slabs.append(row)
      places.append(inverse.reshape(row_ids.shape).astype(np.int32))
    return tuple(slabs), np.stack(places)

  def evaluating(self, step: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A step of `make_eval_step` that reads its rows here."""

    def run(params: Any, biases: Any, tables: tuple, batch: dict) -> jax.Array:
      del tables
      slabs, places = self.read(batch["row_ids"])
      return step(params, biases, slabs, batch | {"row_ids": places})

    return run

  def completing(self, next_logits: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function of `make_next_logits` that reads its rows here."""

    def run(params, biases, tables, tokens_BT, row_ids_LBTJ, last_B) -> jax.Array:
      del tables
      slabs, places = self.read(row_ids_LBTJ)
      return next_logits(params, biases, slabs, tokens_BT, places, last_B)

    return run

  def up_to_date(self, state: TrainState) -> TrainState:
    """The state, every row here as its optimizer means it now: `training.state.up_to_date`."""
    if self.optimizer.lags:
      self._flush()
    return state

  def _flush(self) -> None:
    """Rows that no step has written have nothing to catch up with."""
    self.settle()
    for table, scalars in zip(self.tables, self.scalars, strict=True):
      size = min(AT_ONCE, table.records.padded)
      for ids, records in table.written():
        table.put(ids, caught_up(self.optimizer, table.records, scalars, ids, records, size))
    self.forget()

  def forget(self) -> None:
    """To be called when tables were changed from outside: what was read ahead is read again."""
    self._latest = self._last_ids = None
    if self._next is not None:
      batch, future = self._next
      future.result()
      self._next = batch, self._thread.submit(self._read, batch["row_ids"], alone=True)

  # --- what it cost ------------------------------------------------------------------------

  def counts(self) -> dict[str, float]:
    """Since the last call: seconds that the device stood waiting for rows, bytes that travelled."""
    values = {
      "rows/wait_seconds": self._waited,
      "rows/bytes_to_device": self._to_device,
      "rows/bytes_from_device": self._from_device,
    }
    self._reset_counts()
    return values

  def _reset_counts(self) -> None:
    self._waited, self._to_device, self._from_device = 0.0, 0, 0
