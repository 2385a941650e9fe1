"""DeviceCache: the hottest rows on the accelerator; only the others are sent to it.

    cache = DeviceCache(store, hot_ids(counts, 100_000))
    rows_LBTJC = cache.fetch(row_ids_LBTJ)                   a jax array

A fetch has a half on the host and one on the device, which callers may overlap, or fuse the second
into a program of their own:

    lookup = cache.lookup(row_ids_LBTJ)                      slots and missed rows, sent
    rows_LBTJC = assemble(cache.hot_HC, *lookup)             inside jit

Local letters: L, layers with a memory; X, any shape; N, ids; U, distinct ids; H, hot rows; P,
missed rows with padding.
"""

import functools
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.inference.stores.base import NO_IDS, LevelTelemetry, RowStore, absolute_deadline
from engram_jax.memory.compress import check_ids

MIN_SENT_ROWS = 64  # from there powers of two, so that few shapes are compiled
_PUT_BYTES = 64 << 20  # hot rows read and sent at a time
_MERGE_IDS = 1 << 20  # fewer counted ids are not worth a merge


class CacheLookup(NamedTuple):
  """The host's half of a fetch, on the device.

  slots_LX: int32 index of each row in the hot rows [H, C] followed by missed_PC, which is padded
  with zeros.
  """

  slots_LX: jax.Array
  missed_PC: jax.Array


class DeviceCache:
  """Exactly the rows of a store, as arrays on one device, which holds the hottest already.

  Attributes:
    hot_HC: the rows that stay, in the store's dtype.
    telemetry: of this level; its bytes are those of missed rows, without padding.
    layout, layers, rows, width, dtype, digest: as in the store.
  """

  def __init__(
    self,
    store: RowStore,
    hot: Sequence[np.ndarray],
    *,
    device: jax.Device | jax.sharding.Sharding | None = None,
  ):
    """Reads and sends the rows of `hot`, distinct ids of each layer, as `hot_ids` returns them.

    device: or a replicated sharding. Default: the first device.

    Raises ValueError for ids that are out of range or not distinct; StorageError.
    """
    if len(hot) != len(store.layers):
      raise ValueError(f"hot ids of {len(hot)} layers, but the store has {len(store.layers)}")
    self.store, self.telemetry = store, LevelTelemetry()
    self.layout, self.layers = store.layout, store.layers
    self.rows, self.width = store.rows, store.width
    self.dtype, self.digest = store.dtype, store.digest
    self._device = device or jax.local_devices()[0]
    self._hot = [
      np.sort(check_ids(ids, R, f"layer {n}: row id", "N").astype(np.int64))
      for n, R, ids in zip(self.layers, self.rows, hot, strict=True)
    ]
    if any((ids[1:] == ids[:-1]).any() for ids in self._hot):
      raise ValueError("an id is among the hot ones twice")
    self._first_slot = np.cumsum([0, *map(len, self._hot)])  # of each layer
    self.hot_HC = self._load_hot_rows()

  def fetch(self, row_ids_LX: np.ndarray, *, deadline: float | None = None) -> jax.Array:
    """Rows [L, *X, C] on the device; raises like the store's `fetch`."""
    ids_LX = self.store.check_ids(row_ids_LX)
    return self._fetch(dict(enumerate(ids_LX)), absolute_deadline(deadline))

  def levels(self) -> dict[str, dict[str, Any]]:
    """The telemetry of this cache and of the stores below it, by level, as JSON values."""
    return {"device_cache": self.telemetry.as_dict()} | self.store.levels()

  def fetch_layer(
    self, layer: int, row_ids_X: np.ndarray, *, deadline: float | None = None
  ) -> jax.Array:
    """Rows [*X, C] of one layer on the device; raises like the store's `fetch_layer`."""
    i, ids_X = self.store.check_layer(layer, row_ids_X)
    return self._fetch({i: ids_X}, absolute_deadline(deadline))[0]

  def lookup(self, row_ids_LX: np.ndarray, *, deadline: float | None = None) -> CacheLookup:
    """The host's half: finds the hot rows, reads the others from the store and sends them."""
    ids_LX = self.store.check_ids(row_ids_LX)
    return self._lookup(dict(enumerate(ids_LX)), absolute_deadline(deadline))

  def _fetch(self, ids_by_index: dict[int, np.ndarray], until: float | None) -> jax.Array:
    return assemble(self.hot_HC, *self._lookup(ids_by_index, until))

  def _lookup(self, ids_by_index: dict[int, np.ndarray], until: float | None) -> CacheLookup:
    """`lookup` of checked ids of some layers, by their index; all ids of one shape X."""
    slots_LX, missed, slot, hits = [], [NO_IDS] * len(self.layers), len(self.hot_HC), 0
    for i, ids_X in ids_by_index.items():
      ids_U, inverse = np.unique(ids_X, return_inverse=True)
      slots_U, is_hot_U = self._hot_slots(i, ids_U)
      missed[i] = ids_U[~is_hot_U]
      slots_U[~is_hot_U] = slot + np.arange(len(missed[i]))
      slots_LX.append(slots_U[inverse.reshape(ids_X.shape)])
      slot, hits = slot + len(missed[i]), hits + int(is_hot_U.sum())
    begin, misses = time.perf_counter(), slot - len(self.hot_HC)
    rows = self.store._fetch_by_layer(missed, until) if misses else []
    self.telemetry.add(hits, misses, sum(r.nbytes for r in rows), time.perf_counter() - begin)
    slots = np.stack(slots_LX).astype(np.int32)
    return CacheLookup(*jax.device_put((slots, self._pad(rows, misses)), self._device))

  def close(self) -> None:
    """Closes the store."""
    self.store.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _hot_slots(self, i: int, ids_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slots int64 [U] of rising ids of layer i, and bool [U], True for hot ones; the slots of
    others mean nothing."""
    hot = self._hot[i]
    if len(hot) == 0:
      return np.zeros(len(ids_U), np.int64), np.zeros(len(ids_U), bool)
    index_U = np.searchsorted(hot, ids_U).clip(max=len(hot) - 1)
    return self._first_slot[i] + index_U, hot[index_U] == ids_U

  def _pad(self, rows: Sequence[np.ndarray], count: int) -> np.ndarray:
    size = MIN_SENT_ROWS if count <= MIN_SENT_ROWS else 1 << (count - 1).bit_length()
    padded_PC = np.zeros((size, self.width), self.dtype)
    if count:
      np.concatenate(rows, out=padded_PC[:count])
    return padded_PC

  def _load_hot_rows(self) -> jax.Array:
    """The hot rows of all layers in order, on the device; a row of zeros if there are none."""
    size = max(1, _PUT_BYTES // (self.width * self.dtype.itemsize))
    shape = (max(1, int(self._first_slot[-1])), self.width)  # a gather needs a row
    hot_HC, slot = jnp.zeros(shape, self.dtype, device=self._device), 0
    for i, ids in enumerate(self._hot):
      for start in range(0, len(ids), size):
        rows = self.store.fetch_layer(self.layers[i], ids[start : start + size])
        hot_HC = _write_rows(hot_HC, jax.device_put(rows, self._device), slot)
        slot += len(rows)
    return hot_HC


@functools.partial(jax.jit, donate_argnums=0)
def _write_rows(hot_HC: jax.Array, rows_NC: jax.Array, start: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(hot_HC, rows_NC, start, axis=0)


@jax.jit
def assemble(hot_HC: jax.Array, slots_LX: jax.Array, missed_PC: jax.Array) -> jax.Array:
  """Rows [L, *X, C] at slots of the hot rows followed by the missed ones.

  Two gathers and a select: a concatenation would copy all hot rows each time.
  """
  H = hot_HC.shape[0]
  hot_LXC = hot_HC.at[jnp.minimum(slots_LX, H - 1)].get(mode="promise_in_bounds")
  missed_LXC = missed_PC.at[jnp.maximum(slots_LX - H, 0)].get(mode="promise_in_bounds")
  return jnp.where((slots_LX < H)[..., None], hot_LXC, missed_LXC)


class IdCounts(NamedTuple):
  """Counts of one layer's ids: rising ids int64 [U], and how often each occurred, int64 [U]."""

  ids: np.ndarray
  counts: np.ndarray


def count_ids(row_ids: Iterable[np.ndarray], layers: int) -> list[IdCounts]:
  """Counts each row in batches of row ids [L, ...]; holds only the ids that occur.

  Raises ValueError for ids that are no integers or negative, and for another L than `layers`.
  """
  parts_by_layer = [[IdCounts(np.zeros(0, np.int64), np.zeros(0, np.int64))] for _ in range(layers)]
  for row_ids_LX in row_ids:
    row_ids_LX = check_ids(row_ids_LX, 2**63, "row id")
    if row_ids_LX.shape[:1] != (layers,):
      raise ValueError(f"row ids are [L={layers}, ...], not of shape {row_ids_LX.shape}")
    for parts, ids in zip(parts_by_layer, row_ids_LX, strict=True):
      parts.append(IdCounts(*np.unique(ids, return_counts=True)))
      # The sum so far is sorted again only when as many ids were added: not for every batch.
      if sum(len(part.ids) for part in parts[1:]) > max(len(parts[0].ids), _MERGE_IDS):
        parts[:] = [_merge(parts)]
  return [_merge(parts) for parts in parts_by_layer]


def hot_ids(counts: Sequence[IdCounts], budget_rows: int) -> list[np.ndarray]:
  """The most frequent ids of all layers together, at most `budget_rows`: rising int64 per layer.

  Of equal counts, earlier layers and lower ids come first, so the result is deterministic.
  """
  if budget_rows < 0:
    raise ValueError(f"budget_rows={budget_rows} must not be negative")
  layer = np.repeat(np.arange(len(counts)), [len(c.ids) for c in counts])
  ids = np.concatenate([c.ids for c in counts])
  order = np.argsort(-np.concatenate([c.counts for c in counts]), kind="stable")[:budget_rows]
  return [np.sort(ids[order][layer[order] == i]) for i in range(len(counts))]


def _merge(parts: Sequence[IdCounts]) -> IdCounts:
  ids_U, inverse = np.unique(np.concatenate([part.ids for part in parts]), return_inverse=True)
  counts_U = np.zeros(len(ids_U), np.int64)
  np.add.at(counts_U, inverse, np.concatenate([part.counts for part in parts]))
  return IdCounts(ids_U.astype(np.int64), counts_U)
