"""HostCache: the most frequent rows, decoded, in host memory above a slower store.

The cache is set-associative and has a fixed number of bytes: eight ways a set, chosen by a row's
id. A sketch of four rows of small counters (count-min: Cormode and Muthukrishnan 2005), all of
which are halved now and then, counts approximately how often each row was fetched, in the cache or
not. A missed row replaces the least used row of its set if it was fetched more often, so a row
fetched once evicts none that is fetched often (TinyLFU: arXiv 1512.00727). Everything is NumPy over
all rows of a fetch; a set admits one row per fetch.

Local letters: N, keys of one layer; S, sets; W, ways; E, entries (S times W); A, rows to admit.
"""

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from engram_jax.inference.stores.base import RowStore

WAYS = 8
_EMPTY = -1
# Odd 64-bit multipliers (multiplicative hashing: Knuth, volume 3, section 6.4): the golden ratio's
# for the sets, and one for each row of the sketch, which are primes of xxHash.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SALTS = np.array(
  [0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63], np.uint64
)
_HALVING = 100  # fetched rows an entry between two halvings; 10 and 1,000 had fewer hits on text
_OVERHEAD_BYTES = 8 + 1 + 4 * 8  # an entry's id, its count, and at most 8 counters a sketch row
_HASH_SHIFT = np.uint64(32)


class HostCache(RowStore):
  """A RowStore over another one: the same rows, of which the frequent ones are cached.

  Rows of the store below must not change while it is cached: a table file or host tables of a
  trained model. Closing it closes the store below.
  """

  level = "host_cache"

  def __init__(self, below: RowStore, budget_bytes: int):
    """Caches rows of `below` in at most `budget_bytes`, ids and counts included.

    Raises ValueError for a budget below eight rows.
    """
    super().__init__(below.layout, below.token_map_digest, below.width, below.dtype)
    size = below.width * below.dtype.itemsize + _OVERHEAD_BYTES
    sets = budget_bytes // (size * WAYS)
    if sets < 1:
      raise ValueError(
        f"budget_bytes={budget_bytes} holds no {WAYS} rows of {size} bytes: {size * WAYS} or more"
      )
    self.below = below
    self._first_key = np.cumsum([0, *self.rows[:-1]], dtype=np.int64)  # of each layer
    self._keys_SW = np.full((sets, WAYS), _EMPTY, np.int64)
    self._uses_SW = np.zeros((sets, WAYS), np.uint8)
    self._rows_EC = np.empty((sets * WAYS, self.width), self.dtype)
    self._sketch = Sketch(self.entries)
    self._lock = threading.Lock()

  @property
  def entries(self) -> int:
    """Number of rows that it can hold."""
    return len(self._rows_EC)

  def clear(self) -> None:
    """Drops all rows and counts."""
    with self._lock:
      self._keys_SW[:], self._uses_SW[:] = _EMPTY, 0
      self._sketch = Sketch(self.entries)

  def levels(self) -> dict[str, dict[str, Any]]:
    """See `RowStore`."""
    return super().levels() | self.below.levels()

  def close(self) -> None:
    """Closes the cache and the store below."""
    super().close()
    self.below.close()

  def _read(
    self, ids_by_layer: Sequence[np.ndarray], outs: Sequence[np.ndarray], until: float | None
  ) -> None:
    keys = [
      ids.astype(np.int64) + first for ids, first in zip(ids_by_layer, self._first_key, strict=True)
    ]
    misses = [self._copy_hits(k, out) for k, out in zip(keys, outs, strict=True)]
    self.telemetry.add(hits=sum(int((~miss_N).sum()) for miss_N in misses))
    if not any(miss_N.any() for miss_N in misses):
      return
    begin = time.perf_counter()
    missed_ids = [ids_N[miss_N] for ids_N, miss_N in zip(ids_by_layer, misses, strict=True)]
    missed_rows = self.below._fetch_by_layer(missed_ids, until)
    seconds = time.perf_counter() - begin
    for rows, keys_N, out_NC, miss_N in zip(missed_rows, keys, outs, misses, strict=True):
      out_NC[miss_N] = rows
      self._admit(keys_N[miss_N], rows)
      self.telemetry.add(misses=len(rows), bytes=rows.nbytes)
    self.telemetry.add(seconds=seconds)

  def _copy_hits(self, keys_N: np.ndarray, out_NC: np.ndarray) -> np.ndarray:
    """Copies the cached rows to `out_NC`; returns bool [N], True for the missed ones."""
    sets_N = self._set_index(keys_N)
    with self._lock:
      uses_N, halved = self._sketch.add(keys_N)
      if halved:
        self._uses_SW >>= 1
      same_NW = self._keys_SW[sets_N] == keys_N[:, None]
      hit_N = same_NW.any(axis=1)
      sets, ways = sets_N[hit_N], same_NW[hit_N].argmax(axis=1)
      self._uses_SW[sets, ways] = uses_N[hit_N]
      if hit_N.all():
        np.take(self._rows_EC, sets * WAYS + ways, axis=0, out=out_NC, mode="clip")
      else:
        out_NC[hit_N] = self._rows_EC[sets * WAYS + ways]
    return ~hit_N

  def _admit(self, keys_N: np.ndarray, rows_NC: np.ndarray) -> None:
    with self._lock:
      uses_N = self._sketch.uses(keys_N)
      order_N = np.argsort(-uses_N.astype(np.int16), kind="stable")  # a set admits the most used
      sets_A, first_A = np.unique(self._set_index(keys_N[order_N]), return_index=True)
      index_A = order_N[first_A]
      keys_A, uses_A = keys_N[index_A], uses_N[index_A]
      ways_A = self._uses_SW[sets_A].argmin(axis=1)
      admit_A = (self._uses_SW[sets_A, ways_A] < uses_A) & (
        self._keys_SW[sets_A] != keys_A[:, None]  # another thread may have been faster
      ).all(axis=1)
      sets, ways = sets_A[admit_A], ways_A[admit_A]
      self._keys_SW[sets, ways], self._uses_SW[sets, ways] = keys_A[admit_A], uses_A[admit_A]
      self._rows_EC[sets * WAYS + ways] = rows_NC[index_A[admit_A]]

  def _set_index(self, keys_N: np.ndarray) -> np.ndarray:
    """int64 [N]: 32 bits of a hash, scaled to the number of sets."""
    hash_N = (keys_N.astype(np.uint64) * _GOLDEN) >> _HASH_SHIFT
    return ((hash_N * np.uint64(len(self._keys_SW))) >> _HASH_SHIFT).astype(np.int64)


class Sketch:
  """Approximate counts, up to 255, of how often each of any number of keys was seen lately.

  A count is never too low, but for halvings: it is the smallest of four counters, which a key
  shares with other keys.
  """

  def __init__(self, entries: int):
    """Counters for a cache of `entries` rows: four rows of four to eight times as many."""
    bits = (4 * entries - 1).bit_length()
    self._counters = np.zeros((len(_SALTS), 1 << bits), np.uint8)
    self._shift = np.uint64(64 - bits)
    self._limit, self._since_halving = _HALVING * entries, 0

  def add(self, keys_N: np.ndarray) -> tuple[np.ndarray, bool]:
    """Counts these keys once each; returns uint8 [N], and True if all were halved before."""
    self._since_halving += len(keys_N)
    halved = self._since_halving > self._limit
    if halved:
      self._counters >>= 1
      self._since_halving = len(keys_N)
    index_4N = self._index(keys_N)
    counts_4N = np.stack([c[i_N] for c, i_N in zip(self._counters, index_4N, strict=True)])
    uses_N = counts_4N.min(axis=0)
    uses_N += uses_N < 255
    for counters, i_N, counts_N in zip(self._counters, index_4N, counts_4N, strict=True):
      counters[i_N] = np.maximum(counts_N, uses_N)  # larger ones count other keys
    return uses_N, halved

  def uses(self, keys_N: np.ndarray) -> np.ndarray:
    """Counts of these keys, uint8 [N]."""
    counts = [c[i_N] for c, i_N in zip(self._counters, self._index(keys_N), strict=True)]
    return np.minimum.reduce(counts)

  def _index(self, keys_N: np.ndarray) -> np.ndarray:
    return (keys_N.astype(np.uint64) * _SALTS[:, None]) >> self._shift
