"""Rows for a decoder from a store off the device, fetched while earlier layers run.

Row ids depend on tokens alone. Tokens that are known ahead, the next chunk of a prompt, are hashed
on the host by a thread, their rows read in the order of the layers and sent to the device while the
chunk before runs. For a token that has just been chosen there is nothing ahead: the caller fetches
its rows, memory by memory, when the device has been given all that comes before.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.inference.extend import Rows
from engram_jax.inference.stores.base import RowStore
from engram_jax.memory.compress import TokenCompressor
from engram_jax.memory.hashing import HashLayout, row_ids
from engram_jax.memory.table import lookup


@dataclasses.dataclass
class Telemetry:
  """Of all fetches so far. Seconds are of the clock, not of the processor.

  busy: hashing, reading and sending. waited: the device stood still for rows (exposed), at most: a
  fetch that ends after the device has become idle counts as a whole. What is busy and not waited
  for was hidden behind the model."""

  fetches: int = 0
  rows: int = 0
  bytes: int = 0
  busy_seconds: float = 0.0
  waited_seconds: float = 0.0

  @property
  def hidden_seconds(self) -> float:
    return max(self.busy_seconds - self.waited_seconds, 0.0)

  def as_dict(self) -> dict[str, float]:
    """Every figure by name."""
    return dataclasses.asdict(self) | {"hidden_seconds": self.hidden_seconds}


class StoreRows:
  """A `RowSource`. A context manager that owns a thread, not the store.

  prefetch: False reads everything before any stage of a pass: what offloading costs if nothing
    overlaps.
  deadline: seconds that one memory's read may take; StorageError after that.
  """

  def __init__(
    self,
    store: RowStore,
    compressor: TokenCompressor,
    *,
    prefetch: bool = True,
    deadline: float | None = None,
  ):
    self.store, self.compressor, self.deadline = store, compressor, deadline
    self.telemetry = Telemetry()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "prefetch") if prefetch else None

  def start(self, tokens_BT: Any, count_B: Any, history_BH: Any) -> Rows:
    """See `RowSource`; errors of a read are raised where its rows are asked for."""
    each = self._each(tokens_BT, count_B, history_BH)
    if self._thread is None:
      begin = time.perf_counter()
      ready = list(each)
      self.telemetry.waited_seconds += time.perf_counter() - begin
      return lambda i, _: ready[i]
    futures = [self._thread.submit(next, each) for _ in self.store.layers]  # one thread: in order
    return lambda i, x: self._idle(futures[i].result, x)

  def on_demand(self, tokens_BT: Any, count_B: Any, history_BH: Any) -> Rows:
    """See `RowSource`."""
    if self._thread is None:
      return self.start(tokens_BT, count_B, history_BH)
    each = self._each(tokens_BT, count_B, history_BH, send=False)
    return lambda i, x: self._idle(lambda: next(each), x)

  def _each(
    self, tokens_BT: Any, count_B: Any, history_BH: Any, *, send: bool = True
  ) -> Iterator[jax.Array | np.ndarray]:
    """Rows [B, T, J, C] of each memory as they come; send: on their way to the device. A jitted
    stage that needs them at once takes them there itself, and sooner than a call of its own."""
    begin = time.perf_counter()
    layout = self.store.layout
    canonical_BT, history_BH = self.compressor(np.asarray(tokens_BT)), np.asarray(history_BH)
    real_BT1 = (np.arange(canonical_BT.shape[1]) < np.asarray(count_B)[:, None])[..., None]
    for layer in layout.layers:
      ids_BTJ = row_ids(layout, layer, canonical_BT, history_BH=history_BH)
      ids_BTJ = np.where(real_BT1, ids_BTJ, ids_BTJ.flat[0])  # padding: a row that is read anyway
      rows = self.store.layer(layer).fetch(ids_BTJ, deadline=self.deadline)
      self.telemetry.fetches += 1
      self.telemetry.rows += ids_BTJ.size
      self.telemetry.bytes += rows.nbytes
      rows = jax.device_put(rows) if send else rows
      self.telemetry.busy_seconds += time.perf_counter() - begin
      yield rows
      begin = time.perf_counter()

  def _idle(self, fetch: Callable[[], jax.Array], x: jax.Array) -> jax.Array:
    """What `fetch` gives; its time counts as waited for unless the device is still at `x`."""
    begin = time.perf_counter()
    rows = fetch()
    if x.is_ready():
      self.telemetry.waited_seconds += time.perf_counter() - begin
    return rows

  def close(self) -> None:
    """Ends the thread when it is done with what it was given."""
    if self._thread is not None:
      self._thread.shutdown()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


class DeviceRows:
  """tables: one [R_padded, C] a memory. token_map: int32 [V], canonical id of each raw id."""

  def __init__(self, layout: HashLayout, token_map: np.ndarray, tables: tuple[jax.Array, ...]):
    self.tables, self.token_map = tables, jnp.asarray(token_map)

    def run(table_RC, token_map, layer, tokens_BT, history_BH):
      canonical_BT = token_map[tokens_BT]
      return lookup(table_RC, row_ids(layout, layer, canonical_BT, history_BH=history_BH))

    self._layers, self._run = layout.layers, jax.jit(run, static_argnums=2)

  def start(self, tokens_BT: Any, count_B: Any, history_BH: Any) -> Rows:
    """See `RowSource`."""
    del count_B
    return lambda i, _: self._run(
      self.tables[i], self.token_map, self._layers[i], tokens_BT, history_BH
    )

  on_demand = start  # nothing waits: the device computes rows in its turn
