"""HostCache: the rows asked for most, decoded, in host memory above a slower store.

A fixed number of bytes. Rows lie in sets of eight places; a row's id says which set. How often each
row was asked for, here or not, is counted approximately by a sketch of four rows of small counters
(count-min: Cormode and Muthukrishnan 2005), all of which are halved now and then. A row that was
missed takes the least used place of its set if it was asked for more often than the row there, so a
row asked for once displaces none that is asked for often (TinyLFU: arXiv 1512.00727). Everything is
NumPy over all rows of a fetch; a set takes in one row per fetch.
"""

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from engram_jax.inference.stores.base import RowStore

WAYS = 8
_EMPTY = -1
# Odd 64-bit numbers that spread ids (multiplicative hashing: Knuth, volume 3, section 6.4): the
# golden ratio's for the sets, one for each row of the sketch. The latter are primes of xxHash.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SALTS = np.array(
  [0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63], np.uint64
)
_AGE = 100  # rows asked for a place, between two halvings; 10 and 1,000 kept fewer of a real text's
_PLACE_BYTES = 8 + 1 + 4 * 8  # of a row's id, its count, and at most eight counters in each row
_HALF = np.uint64(32)


class HostCache(RowStore):
  """A RowStore over another one: the same rows, of which the frequent ones are at hand.

  Rows of the store below must not change while it is cached: a table file or host tables of a
  trained model. Closing it closes the store below.
  """

  level = "host_cache"

  def __init__(self, below: RowStore, budget_bytes: int):
    """Holds rows of `below` in at most `budget_bytes`, of which ids and counts are a part.

    Raises ValueError for a budget below eight rows.
    """
    super().__init__(below.layout, below.token_map_digest, below.width, below.dtype)
    place = below.width * below.dtype.itemsize + _PLACE_BYTES
    sets = budget_bytes // (place * WAYS)
    if sets < 1:
      raise ValueError(
        f"budget_bytes={budget_bytes} holds no {WAYS} rows of {place} bytes: {place * WAYS} or more"
      )
    self.below = below
    self._first = np.cumsum([0, *self.rows[:-1]], dtype=np.int64)  # a layer's first key
    self._keys_SW = np.full((sets, WAYS), _EMPTY, np.int64)
    self._uses_SW = np.zeros((sets, WAYS), np.uint8)
    self._rows_PC = np.empty((sets * WAYS, self.width), self.dtype)
    self._sketch = Sketch(self.places)
    self._lock = threading.Lock()

  @property
  def places(self) -> int:
    """Rows it has room for."""
    return len(self._rows_PC)

  def clear(self) -> None:
    """Forgets all rows, and how often they were asked for."""
    with self._lock:
      self._keys_SW[:], self._uses_SW[:] = _EMPTY, 0
      self._sketch = Sketch(self.places)

  def levels(self) -> dict[str, dict[str, Any]]:
    return super().levels() | self.below.levels()

  def close(self) -> None:
    super().close()
    self.below.close()

  def _read(
    self, ids_by_layer: Sequence[np.ndarray], outs: Sequence[np.ndarray], until: float | None
  ) -> None:
    keys = [
      ids.astype(np.int64) + first for ids, first in zip(ids_by_layer, self._first, strict=True)
    ]
    missed = [self._take(k, out) for k, out in zip(keys, outs, strict=True)]
    self.telemetry.add(hits=sum(int((~m).sum()) for m in missed))
    if not any(m.any() for m in missed):
      return
    begin = time.perf_counter()
    found = self.below._gather([i[m] for i, m in zip(ids_by_layer, missed, strict=True)], until)
    seconds = time.perf_counter() - begin
    for rows, k, out, m in zip(found, keys, outs, missed, strict=True):
      out[m] = rows
      self._admit(k[m], rows)
      self.telemetry.add(misses=len(rows), bytes=rows.nbytes)
    self.telemetry.add(seconds=seconds)

  def _take(self, keys_N: np.ndarray, out_NC: np.ndarray) -> np.ndarray:
    """Copies the rows that are here to `out_NC`; returns a bool [N] of those that are not."""
    sets_N = self._set(keys_N)
    with self._lock:
      uses_N, halved = self._sketch.add(keys_N)
      if halved:
        self._uses_SW >>= 1
      same_NW = self._keys_SW[sets_N] == keys_N[:, None]
      here_N = same_NW.any(axis=1)
      sets, ways = sets_N[here_N], same_NW[here_N].argmax(axis=1)
      self._uses_SW[sets, ways] = uses_N[here_N]
      if here_N.all():
        np.take(self._rows_PC, sets * WAYS + ways, axis=0, out=out_NC, mode="clip")
      else:
        out_NC[here_N] = self._rows_PC[sets * WAYS + ways]
    return ~here_N

  def _admit(self, keys_N: np.ndarray, rows_NC: np.ndarray) -> None:
    with self._lock:
      uses_N = self._sketch.uses(keys_N)
      order = np.argsort(-uses_N.astype(np.int16), kind="stable")  # a set takes in the most used
      sets_M, at_M = np.unique(self._set(keys_N[order]), return_index=True)
      which_M = order[at_M]
      keys_M, uses_M = keys_N[which_M], uses_N[which_M]
      ways_M = self._uses_SW[sets_M].argmin(axis=1)
      take_M = (self._uses_SW[sets_M, ways_M] < uses_M) & (
        self._keys_SW[sets_M] != keys_M[:, None]  # a thread may have been faster
      ).all(axis=1)
      sets, ways = sets_M[take_M], ways_M[take_M]
      self._keys_SW[sets, ways], self._uses_SW[sets, ways] = keys_M[take_M], uses_M[take_M]
      self._rows_PC[sets * WAYS + ways] = rows_NC[which_M[take_M]]

  def _set(self, keys_N: np.ndarray) -> np.ndarray:
    """Spread, then scaled from 32 bits to the number of sets."""
    spread = (keys_N.astype(np.uint64) * _GOLDEN) >> _HALF
    return ((spread * np.uint64(len(self._keys_SW))) >> _HALF).astype(np.int64)


class Sketch:
  """About how often each of any number of keys was seen lately, up to 255 times.

  Never below the truth, but for halvings: a key's count is the smallest of four counters, which it
  shares with other keys.
  """

  def __init__(self, places: int):
    """Counters for a cache of `places` rows: four rows of four to eight times as many."""
    bits = (4 * places - 1).bit_length()
    self._counters = np.zeros((len(_SALTS), 1 << bits), np.uint8)
    self._shift = np.uint64(64 - bits)
    self._limit, self._seen = _AGE * places, 0

  def add(self, keys_N: np.ndarray) -> tuple[np.ndarray, bool]:
    """Counts these keys once each; returns uint8 [N] counts, and whether all were halved before."""
    self._seen += len(keys_N)
    halved = self._seen > self._limit
    if halved:
      self._counters >>= 1
      self._seen = len(keys_N)
    at_4N = self._at(keys_N)
    found_4N = np.stack([c[at_N] for c, at_N in zip(self._counters, at_4N, strict=True)])
    uses_N = found_4N.min(axis=0)
    uses_N += uses_N < 255
    for counters, at_N, found_N in zip(self._counters, at_4N, found_4N, strict=True):
      counters[at_N] = np.maximum(found_N, uses_N)  # those above it count other keys
    return uses_N, halved

  def uses(self, keys_N: np.ndarray) -> np.ndarray:
    """uint8 [N]."""
    found = [c[at_N] for c, at_N in zip(self._counters, self._at(keys_N), strict=True)]
    return np.minimum.reduce(found)

  def _at(self, keys_N: np.ndarray) -> np.ndarray:
    return (keys_N.astype(np.uint64) * _SALTS[:, None]) >> self._shift
