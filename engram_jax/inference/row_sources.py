"""Sources of the rows that a decoder looks up: tables on the device, or a store off the device.

Row ids depend on tokens alone. Tokens that are known ahead, the next chunk of a prompt, are hashed
on the host by a thread, their rows read in the order of the layers and sent to the device while the
chunk before runs. A token that has just been sampled leaves nothing to prefetch: the caller fetches
its rows, memory by memory, when the stages before each have been dispatched.

Local letter: H, canonical ids of history.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.inference.extend import RowsFn
from engram_jax.inference.stores.base import RowStore
from engram_jax.inference.stores.device_cache import DeviceCache
from engram_jax.memory.compress import TokenCompressor, check_ids, check_visible_ids
from engram_jax.memory.hash_layout import HashLayout
from engram_jax.memory.hashing import row_ids
from engram_jax.memory.table import lookup


@dataclasses.dataclass
class FetchTelemetry:
  """Counts and wall-clock seconds of all fetches so far.

  busy_seconds: hashing, reading and sending. waited_seconds: the device stood still for rows
  (exposed), at most: a fetch that ends after the device has become idle counts in full. Seconds
  that are busy and not waited for were hidden behind the model."""

  fetches: int = 0
  rows: int = 0
  bytes: int = 0
  busy_seconds: float = 0.0
  waited_seconds: float = 0.0

  @property
  def hidden_seconds(self) -> float:
    """Seconds of fetching during which the device was busy."""
    return max(self.busy_seconds - self.waited_seconds, 0.0)

  def as_dict(self) -> dict[str, float]:
    """Every figure by name."""
    return dataclasses.asdict(self) | {"hidden_seconds": self.hidden_seconds}


class StoreRowSource:
  """A `RowSource` over a store. A context manager that closes its thread, not the store.

  overlap: False reads everything before any stage of a pass: the cost of offloading if nothing
    overlaps.
  deadline: seconds that one memory's read may take; StorageError after that.
  """

  def __init__(
    self,
    store: RowStore | DeviceCache,
    compressor: TokenCompressor,
    *,
    overlap: bool = True,
    deadline: float | None = None,
  ):
    self.store, self.compressor, self.deadline = store, compressor, deadline
    self.telemetry = FetchTelemetry()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "prefetch") if overlap else None

  def prefetch(self, tokens_BT: Any, count_B: Any, history_BH: Any) -> RowsFn:
    """See `RowSource`; errors of a read are raised when its rows are asked for."""
    reads = self._read_layers(tokens_BT, count_B, history_BH)
    if self._thread is None:
      begin = time.perf_counter()
      rows = list(reads)
      self.telemetry.waited_seconds += time.perf_counter() - begin
      return lambda i, _: rows[i]
    # One thread: they are read in order.
    futures = [self._thread.submit(reads.__next__) for _ in self.store.layers]
    return lambda i, x: self._timed(futures[i].result, x)

  def on_demand(self, tokens_BT: Any, count_B: Any, history_BH: Any) -> RowsFn:
    """See `RowSource`."""
    if self._thread is None:
      return self.prefetch(tokens_BT, count_B, history_BH)
    reads = self._read_layers(tokens_BT, count_B, history_BH, send=False)
    return lambda i, x: self._timed(lambda: next(reads), x)

  def _read_layers(
    self, tokens_BT: Any, count_B: Any, history_BH: Any, *, send: bool = True
  ) -> Iterator[jax.Array | np.ndarray]:
    """Yields rows [B, T, J, C] of each memory; send: on their way to the device. A jitted stage
    that needs them at once takes them there itself, and sooner than a call of its own."""
    begin = time.perf_counter()
    layout = self.store.layout
    check_ids(tokens_BT, len(self.compressor.table), "token id", "BT")
    canonical_BT, history_BH = self.compressor(np.asarray(tokens_BT)), np.asarray(history_BH)
    is_token_BT1 = (np.arange(canonical_BT.shape[1]) < np.asarray(count_B)[:, None])[..., None]
    for layer in layout.layers:
      ids_BTJ = np.asarray(row_ids(layout, layer, canonical_BT, history_BH=history_BH))
      read_anyway = ids_BTJ[:1, :1, :1]
      ids_BTJ = np.where(is_token_BT1, ids_BTJ, read_anyway)  # on padding
      rows = self.store.fetch_layer(layer, ids_BTJ, deadline=self.deadline)
      self.telemetry.fetches += 1
      self.telemetry.rows += ids_BTJ.size
      self.telemetry.bytes += rows.nbytes
      rows = jax.device_put(rows) if send else rows
      self.telemetry.busy_seconds += time.perf_counter() - begin
      yield rows
      begin = time.perf_counter()

  def _timed(
    self, fetch: Callable[[], jax.Array | np.ndarray], x: jax.Array
  ) -> jax.Array | np.ndarray:
    """Returns fetch(); its time counts as waited for unless the device still computes `x`."""
    begin = time.perf_counter()
    rows = fetch()
    if x.is_ready():  # ty: ignore[missing-attribute] (jax.Array's stub lacks it)
      self.telemetry.waited_seconds += time.perf_counter() - begin
    return rows

  def close(self) -> None:
    """Ends the thread when it has finished the reads submitted to it."""
    if self._thread is not None:
      self._thread.shutdown()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


class DeviceRowSource:
  """A `RowSource` over tables on the device: hashing and lookup are one jitted function.

  token_map: int32 [V], canonical id of each raw id. tables: one [R_padded, C] a memory.
  """

  def __init__(self, layout: HashLayout, token_map: np.ndarray, tables: tuple[jax.Array, ...]):
    self.tables, self.token_map = tables, jnp.asarray(token_map)

    def run(table_RC, token_map, layer, tokens_BT, history_BH):
      canonical_BT = token_map[tokens_BT]
      ids_BTJ = row_ids(layout, layer, canonical_BT, history_BH=history_BH)
      return lookup(table_RC, jnp.asarray(ids_BTJ))

    self._layers, self._run = layout.layers, jax.jit(run, static_argnums=2)

  def prefetch(self, tokens_BT: Any, count_B: Any, history_BH: Any) -> RowsFn:
    """See `RowSource`. Raises ValueError for a token id in a NumPy array that is none; those of a
    jax array the caller has sampled or checked."""
    del count_B
    tokens_BT = check_visible_ids(tokens_BT, self.token_map.shape[0], "token id", "BT")
    return lambda i, _: self._run(
      self.tables[i], self.token_map, self._layers[i], tokens_BT, history_BH
    )

  on_demand = prefetch  # nothing waits: the device computes rows in its turn
