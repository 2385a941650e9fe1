"""Tables in host memory or in files, trained through row buffers: one step's rows at a time.

One thread reads and writes, in this order, so that a read knows what it sees: rows of step t + 1
are read after those of step t - 1 were written, while step t runs. What step t itself changes of
them is not taken from there but, on the device, from its result. So every step gets the rows it
would find in a table on the device, and waits for none that was read in time.

Local letters: L, layers with a table; U, rows of a row buffer.
"""

import concurrent.futures
import functools
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.memory.compress import as_integers, check_ids
from engram_jax.tables.host_table import AT_ONCE, FileTable, HostTable, Table
from engram_jax.tables.row_buffer import (
  Prefetched,
  copy_first_rows,
  initialize_rows,
  make_buffer,
  read_rows,
  sent_rows,
  uninitialized_rows,
)
from engram_jax.tables.row_schema import WRITTEN, RowSchema, padded, synced_records
from engram_jax.tables.state import SLOTS, TableState
from engram_jax.tables.table_optimizer import TableOptimizer

_POLL_SECONDS = 1e-3


@jax.tree_util.register_static
class OffloadedTables:
  """The tables of a model off its device. Static in a pytree: a `TableState` carries it along.

  Errors of its thread, such as a StorageError, are raised by the next call.

  Attributes:
    tables: by layer.
  """

  def __init__(
    self,
    optimizer: TableOptimizer,
    schemas: Mapping[int, RowSchema],
    keys: Mapping[int, jax.Array],
    *,
    init_std: float,
    folder: pathlib.Path | None = None,
    device: Any = None,
  ):
    """Makes tables as `init_table` does with these keys, and optimizers before their first step.

    Args:
      folder: there already, on the disk for the files; None keeps the tables in host memory.
      device: or sharding of the row buffers; the default device if None.
    """
    self._optimizer, self._keys, self._init_std = optimizer, dict(keys), init_std
    self._device = device
    make = HostTable if folder is None else functools.partial(FileTable, folder)
    self.tables: dict[int, Table] = {layer: make(schema) for layer, schema in schemas.items()}
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "rows")
    self._next: tuple[dict, concurrent.futures.Future] | None = None  # read ahead
    self._ready: dict[int, Prefetched] | None = None  # for the step that comes
    self._latest: dict[int, tuple] | None = None  # leaves of the last step's buffers
    self._last_ids: dict[int, np.ndarray] | None = None  # of the last read; the thread's own
    self._writing: concurrent.futures.Future | None = None
    self._in_flight: Any = None  # an array that the last step computes
    self._reset_counts()

  def first_state(self) -> TableState:
    """The state before any step."""
    scalars = {n: t.schema.first_scalars() for n, t in self.tables.items()}
    return self.state(jax.device_put(scalars, self._device))

  def state(self, scalars: Mapping[int, tuple]) -> TableState:
    """The state outside a step: scalars of the optimizers' states, and this object."""
    alone = {n: t.schema.scalars_alone(scalars[n]) for n, t in self.tables.items()}
    return TableState({}, alone, host=self)

  def close(self) -> None:
    """Ends the thread and gives the tables back."""
    self._thread.shutdown(cancel_futures=True)
    for table in self.tables.values():
      table.close()

  # --- a step ------------------------------------------------------------------------------

  def prefetch(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The batches, `row_ids` replaced by `slots` of the step's row buffers; the batch after is
    read already, its rows too."""
    for batch in batches:
      now, self._next = self._next, (batch, self._thread.submit(self._read, batch["row_ids"]))
      if now is not None:
        yield self._arrived(*now)
    if self._next is not None:
      now, self._next = self._next, None
      yield self._arrived(*now)

  def buffers(self, state: TableState) -> tuple[TableState, dict[int, np.ndarray]]:
    """(row buffers, their row ids) for the batch that `prefetch` gave last, once."""
    read, self._ready = self._ready, None
    assert read is not None, "each batch of prefetch() is for one step"
    return self._buffers(state, read), {n: r.ids for n, r in read.items()}

  def stage(
    self, state: TableState, row_ids: Mapping[int, np.ndarray]
  ) -> tuple[TableState, dict[int, np.ndarray]]:
    """(row buffers, slots) of row ids [B, T, J] by layer, read now."""
    self._check_writing()
    ids = np.stack([np.asarray(row_ids[n]) for n in self.tables])
    future = self._thread.submit(self._read, ids, alone=True)
    read, slots_LBTJ = self._wait(future)
    return self._buffers(state, read), dict(zip(self.tables, slots_LBTJ, strict=True))

  def _buffers(self, state: TableState, read: dict[int, Prefetched]) -> TableState:
    tables, states = {}, {}
    for n, table in self.tables.items():
      row, *rest = self._buffer(n, read[n])
      tables[n] = row
      states[n] = table.schema.join_state(tuple(rest), tuple(jax.tree.leaves(state.optimizer[n])))
    return TableState(tables, states, {n: r.padded_ids for n, r in read.items()})

  def _buffer(self, n: int, read: Prefetched) -> tuple[jax.Array, ...]:
    """The leaves [U, ...] of a table's row buffer."""
    row, *rest = read.leaves
    if read.uninitialized is not None:
      rows = self.tables[n].schema.rows
      row = initialize_rows(row, self._keys[n], read.uninitialized, rows=rows, std=self._init_std)
    before = None if read.source is None or self._latest is None else self._latest[n]
    return make_buffer((row, *rest), read.source, before, size=read.padded_ids.size)

  def write_back(self, new: TableState, ids: Mapping[int, np.ndarray]) -> TableState:
    """The state after a step that left these row buffers, which are on their way to the host.

    Copies are made before another step can be ahead of them.

    ids: int32 [n], the row ids of the buffers' leading rows, by layer.
    """
    parts = {n: t.schema.split_state(new.optimizer[n]) for n, t in self.tables.items()}
    self._latest = {n: (new.tables[n], *rows) for n, (rows, _) in parts.items()}
    back = {
      n: copy_first_rows(leaves, size=sent_rows(len(ids[n]), len(leaves[0])))
      for n, leaves in self._latest.items()
    }
    for x in jax.tree.leaves(back):
      x.copy_to_host_async()
      self._from_device += x.nbytes
    self._check_writing()
    self._writing = self._thread.submit(self._write, dict(ids), back, self._writing)
    self._in_flight = jax.tree.leaves(back)[0]
    return self.state({n: scalars for n, (_, scalars) in parts.items()})

  def _arrived(self, batch: dict, future: concurrent.futures.Future) -> dict:
    self._ready, slots_LBTJ = self._wait(future)
    self._to_device += sum(read.nbytes for read in self._ready.values())
    rest = {name: x for name, x in batch.items() if name != "row_ids"}
    return rest | {SLOTS: slots_LBTJ}

  def _wait(self, future: concurrent.futures.Future) -> Any:
    """The result; time in which the device has nothing to do counts as waited."""
    while not future.done():
      is_idle = self._in_flight is None or self._in_flight.is_ready()
      begin = time.perf_counter()
      concurrent.futures.wait([future], timeout=_POLL_SECONDS)
      if is_idle:
        self._waited += time.perf_counter() - begin
    return future.result()

  # --- the thread --------------------------------------------------------------------------

  def _read(
    self, row_ids_LBTJ: np.ndarray, alone: bool = False
  ) -> tuple[dict[int, Prefetched], np.ndarray]:
    """(what a buffer is made of by layer, slots int32 [L, B, T, J]); alone: the step before has
    written everything, so nothing is newer on the device."""
    row_ids_LBTJ = self._check(row_ids_LBTJ)
    distinct = [np.unique(ids, return_inverse=True) for ids in row_ids_LBTJ]
    before = {} if alone or self._last_ids is None else self._last_ids
    self._last_ids = {n: ids for n, (ids, _) in zip(self.tables, distinct, strict=True)}
    read = {
      n: read_rows(table, self._last_ids[n], before.get(n), row_ids_LBTJ[i].size, self._device)
      for i, (n, table) in enumerate(self.tables.items())
    }
    slots = [inverse.reshape(row_ids_LBTJ.shape[1:]).astype(np.int32) for _, inverse in distinct]
    return read, np.stack(slots)

  def _check(self, row_ids_LBTJ: np.ndarray) -> np.ndarray:
    """The ids as an array; ValueError for one outside its table: a host table would wrap or clip
    it, and another row would be read and trained."""
    most = max(table.schema.rows for table in self.tables.values())
    row_ids_LBTJ = as_integers(row_ids_LBTJ, most, "row id", "LBTJ")
    if len(row_ids_LBTJ) != len(self.tables):
      raise ValueError(f"row ids of {len(row_ids_LBTJ)} layers for {len(self.tables)} tables")
    for (n, table), ids in zip(self.tables.items(), row_ids_LBTJ, strict=True):
      check_ids(ids, table.schema.rows, f"layer {n}: row id")
    return row_ids_LBTJ

  def _write(
    self, ids: dict[int, np.ndarray], back: dict, before: concurrent.futures.Future | None
  ) -> None:
    if before is not None:
      before.result()  # what failed once has left rows that nothing may be built on
    for n, table in self.tables.items():
      leaves = tuple(np.asarray(x)[: len(ids[n])] for x in back[n])
      table.put(ids[n], table.schema.pack(leaves))

  def _check_writing(self) -> None:
    if self._writing is not None and self._writing.done():
      self._writing.result()

  # --- between steps -----------------------------------------------------------------------

  def settle(self) -> None:
    """Returns once all that was computed is in the tables."""
    if self._writing is not None:
      self._writing.result()

  def lookup(self, row_ids: Mapping[int, np.ndarray]) -> dict[int, jax.Array]:
    """Rows [*, C] of row ids [*] by layer, as `memory.table.lookup` gives them of a table.

    Raises ValueError for an id outside its table.
    """
    self.settle()
    found = {}
    for n, ids in row_ids.items():
      table = self.tables[n]
      ids = check_ids(ids, table.schema.rows, f"layer {n}: row id")
      unique, inverse = np.unique(ids, return_inverse=True)
      records_n = table.take(unique)
      U = min(ids.size, table.schema.padded)
      fresh = uninitialized_rows(np.flatnonzero(records_n[WRITTEN] == 0), unique, U)
      row = jax.device_put(padded(table.schema.row(records_n), U), self._device)
      if fresh is not None:
        rows = table.schema.rows
        row = initialize_rows(row, self._keys[n], fresh, rows=rows, std=self._init_std)
      found[n] = jnp.take(row, inverse.reshape(ids.shape).astype(np.int32), axis=0, mode="clip")
    return found

  def flush(self, state: TableState) -> TableState:
    """Brings every row up to date; rows that no step has written have nothing to catch up with."""
    if not self._optimizer.is_lazy:
      return state
    self.settle()
    for n, table in self.tables.items():
      size = min(AT_ONCE, table.schema.padded)
      scalars = tuple(jax.tree.leaves(state.optimizer[n]))
      for ids, records in table.written():
        table.put(ids, synced_records(self._optimizer, table.schema, scalars, ids, records, size))
    self.forget()
    return state

  def forget(self) -> None:
    """Reads again what was read ahead; to be called when tables were changed from outside."""
    self._latest = self._last_ids = None
    if self._next is not None:
      batch, future = self._next
      future.result()
      self._next = batch, self._thread.submit(self._read, batch["row_ids"], alone=True)

  # --- what it cost ------------------------------------------------------------------------

  def counts(self) -> dict[str, float]:
    """Metrics since the last call: seconds the device waited for rows, bytes that travelled."""
    values = {
      "rows/wait_seconds": self._waited,
      "rows/bytes_to_device": self._to_device,
      "rows/bytes_from_device": self._from_device,
    }
    self._reset_counts()
    return values

  def _reset_counts(self) -> None:
    self._waited, self._to_device, self._from_device = 0.0, 0, 0
