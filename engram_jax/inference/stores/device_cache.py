"""DeviceCache: the hottest rows on the accelerator; only the others travel to it.

    cache = DeviceCache(store, hot_ids(counts, 100_000))
    rows_LBTJC = cache.fetch(row_ids_LBTJ)                   a jax array

What a fetch does falls into a half for the host and one for the device, for those who overlap them
or fuse the second into a program of their own:

    wanted = cache.look_up(row_ids_LBTJ)                     places and missed rows, sent
    rows_LBTJC = assemble(cache.hot_HC, *wanted)             inside jit
"""

import functools
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.inference.stores.base import LayerRows, RowStore, Telemetry, ends_at

SMALLEST = 64  # rows sent at once; from there powers of two, so that few shapes are compiled
_NONE = np.zeros(0, np.int64)
_PUT_BYTES = 64 << 20  # hot rows read and sent at a time


Place = jax.Device | jax.sharding.Sharding


class Wanted(NamedTuple):
  """at_LX: int32, places of the rows asked for, in the hot rows [H, C] and then in missed_PC, which
  are padded with zeros. On the device."""

  at_LX: jax.Array
  missed_PC: jax.Array


class DeviceCache:
  """Exactly the rows of a store, as arrays on one device, where the hottest already are.

  Attributes:
    hot_HC: the rows that stay, in the store's dtype. telemetry: of this level; its bytes are
      those of missed rows, without padding. layout, layers, rows, width, dtype, digest: as in the
      store.
  """

  def __init__(self, store: RowStore, hot: Sequence[np.ndarray], *, device: Place | None = None):
    """Reads and sends the rows of `hot`, distinct ids of each layer (cache_counts.hot_ids).

    device: or a sharding that holds whole arrays on each of its devices. Default: the first.

    Raises ValueError for ids that are out of range or not distinct; StorageError.
    """
    if len(hot) != len(store.layers):
      raise ValueError(f"hot ids of {len(hot)} layers, but the store has {len(store.layers)}")
    self.store, self.telemetry = store, Telemetry()
    self.layout, self.layers = store.layout, store.layers
    self.rows, self.width = store.rows, store.width
    self.dtype, self.digest = store.dtype, store.digest
    self._device = device or jax.local_devices()[0]
    self._hot = [np.sort(np.asarray(ids, np.int64)) for ids in hot]
    if any((ids[1:] == ids[:-1]).any() for ids in self._hot):
      raise ValueError("an id is among the hot ones twice")
    self._first = np.cumsum([0, *map(len, self._hot)])  # a layer's first place
    self.hot_HC = self._filled()

  def fetch(self, row_ids_LX: np.ndarray, *, deadline: float | None = None) -> jax.Array:
    """Rows [L, *X, C] on the device; raises like the store's `fetch`."""
    ids_LX = self.store.checked(row_ids_LX)
    return self._fetch(dict(enumerate(ids_LX)), ends_at(deadline))

  def levels(self) -> dict[str, dict[str, Any]]:
    """The telemetry of this cache and of the stores below it, by level, as JSON values."""
    return {"device_cache": self.telemetry.as_dict()} | self.store.levels()

  def layer(self, layer: int) -> "DeviceLayer":
    """The rows of one layer, by its id in the model."""
    return DeviceLayer(self, self.store.layer(layer))

  def look_up(self, row_ids_LX: np.ndarray, *, deadline: float | None = None) -> Wanted:
    """The host's half: what is hot, and the rest read from the store and sent."""
    ids_LX = self.store.checked(row_ids_LX)
    return self._look_up(dict(enumerate(ids_LX)), ends_at(deadline))

  def _fetch(self, ids_by_index: dict[int, np.ndarray], until: float | None) -> jax.Array:
    return assemble(self.hot_HC, *self._look_up(ids_by_index, until))

  def _look_up(self, ids_by_index: dict[int, np.ndarray], until: float | None) -> Wanted:
    """Of some layers, by their place among all; ids of one shape X that are in range."""
    at_LX, missed, count, hits = [], [_NONE] * len(self.layers), len(self.hot_HC), 0
    for i, ids_X in ids_by_index.items():
      ids_U, inverse = np.unique(ids_X, return_inverse=True)
      places_U, hot_U = self._places(i, ids_U)
      missed[i] = ids_U[~hot_U]
      places_U[~hot_U] = count + np.arange(len(missed[i]))
      at_LX.append(places_U[inverse.reshape(ids_X.shape)])
      count, hits = count + len(missed[i]), hits + int(hot_U.sum())
    begin, misses = time.perf_counter(), count - len(self.hot_HC)
    rows = self.store._gather(missed, until) if misses else []
    self.telemetry.add(hits, misses, sum(r.nbytes for r in rows), time.perf_counter() - begin)
    places = np.stack(at_LX).astype(np.int32)
    return Wanted(*jax.device_put((places, self._padded(rows, misses)), self._device))

  def close(self) -> None:
    """Closes the store."""
    self.store.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _places(self, i: int, ids_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(place, whether it is hot) of distinct, rising ids of layer i; any place where it is not."""
    hot = self._hot[i]
    if len(hot) == 0:
      return np.zeros(len(ids_U), np.int64), np.zeros(len(ids_U), bool)
    at = np.searchsorted(hot, ids_U).clip(max=len(hot) - 1)
    return self._first[i] + at, hot[at] == ids_U

  def _padded(self, rows: Sequence[np.ndarray], count: int) -> np.ndarray:
    size = SMALLEST if count <= SMALLEST else 1 << (count - 1).bit_length()
    out = np.zeros((size, self.width), self.dtype)
    if count:
      np.concatenate(rows, out=out[:count])
    return out

  def _filled(self) -> jax.Array:
    """The hot rows of all layers, one below the other; a row of zeros where there are none."""
    size = max(1, _PUT_BYTES // (self.width * self.dtype.itemsize))
    at = 0
    shape = (max(1, int(self._first[-1])), self.width)  # a gather needs a row
    hot_HC = jnp.zeros(shape, self.dtype, device=self._device)
    for i, ids in enumerate(self._hot):
      for start in range(0, len(ids), size):
        some = [ids[start : start + size] if j == i else _NONE for j in range(len(self._hot))]
        rows = jax.device_put(self.store.gather(some)[i], self._device)
        hot_HC, at = _overwritten(hot_HC, rows, at), at + len(rows)
    return hot_HC


class DeviceLayer(NamedTuple):
  """One layer of a cache on the device, in the form of a store's layer."""

  cache: DeviceCache
  layer: LayerRows

  @property
  def rows(self) -> int:
    return self.layer.rows

  @property
  def width(self) -> int:
    return self.layer.width

  def fetch(self, row_ids_X: np.ndarray, *, deadline: float | None = None) -> jax.Array:
    """Rows [*X, C] on the device of integer ids [*X]; raises like the store's."""
    ids_X = self.layer.checked(row_ids_X)
    return self.cache._fetch({self.layer.index: ids_X}, ends_at(deadline))[0]


@functools.partial(jax.jit, donate_argnums=0)
def _overwritten(hot_HC: jax.Array, rows_NC: jax.Array, at: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(hot_HC, rows_NC, at, axis=0)


@jax.jit
def assemble(hot_HC: jax.Array, at_LX: jax.Array, missed_PC: jax.Array) -> jax.Array:
  """Rows [L, *X, C] at places of the hot rows or, counted on, of the missed ones.

  Two gathers and a choice: putting the two arrays together would copy all hot rows each time.
  """
  H = hot_HC.shape[0]
  hot = hot_HC.at[jnp.minimum(at_LX, H - 1)].get(mode="promise_in_bounds")
  missed = missed_PC.at[jnp.maximum(at_LX - H, 0)].get(mode="promise_in_bounds")
  return jnp.where((at_LX < H)[..., None], hot, missed)


_FEW = 1 << 20  # ids that are not worth adding up yet


class IdCounts(NamedTuple):
  """Of one layer: ids int64 [n], rising, and how often each was asked for, int64 [n]."""

  ids: np.ndarray
  counts: np.ndarray


def count_ids(row_ids: Iterable[np.ndarray], layers: int) -> list[IdCounts]:
  """How often each row occurs in batches of row ids [L, ...]; holds only the ids that occur."""
  found = [[IdCounts(np.zeros(0, np.int64), np.zeros(0, np.int64))] for _ in range(layers)]
  for row_ids_LX in row_ids:
    for parts, ids in zip(found, row_ids_LX, strict=True):
      parts.append(IdCounts(*np.unique(ids, return_counts=True)))
      # The sum so far is sorted anew only when as much has come: not for each of many batches.
      if sum(len(part.ids) for part in parts[1:]) > max(len(parts[0].ids), _FEW):
        parts[:] = [_sum(parts)]
  return [_sum(parts) for parts in found]


def hot_ids(counts: Sequence[IdCounts], budget_rows: int) -> list[np.ndarray]:
  """The most frequent ids of all layers together, at most `budget_rows`: rising int64 per layer.

  Where counts are equal, earlier layers and lower ids come first, so the choice is always the same.
  """
  if budget_rows < 0:
    raise ValueError(f"budget_rows={budget_rows} must not be negative")
  layer = np.repeat(np.arange(len(counts)), [len(c.ids) for c in counts])
  ids = np.concatenate([c.ids for c in counts])
  order = np.argsort(-np.concatenate([c.counts for c in counts]), kind="stable")[:budget_rows]
  return [np.sort(ids[order][layer[order] == i]) for i in range(len(counts))]


def _sum(parts: Sequence[IdCounts]) -> IdCounts:
  ids, at = np.unique(np.concatenate([part.ids for part in parts]), return_inverse=True)
  counts = np.zeros(len(ids), np.int64)
  np.add.at(counts, at, np.concatenate([part.counts for part in parts]))
  return IdCounts(ids.astype(np.int64), counts)
