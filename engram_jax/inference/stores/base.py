"""RowStore: rows of all Engram layers by their ids, in any storage.

    with FileRows("table.engram") as store:
      rows_LBTJC = store.fetch(row_ids_LBTJ)

A fetch returns the rows of exactly these ids or raises; its array is new and never written again,
so a read that ends too late can spoil nothing.

Local letters: L, layers with a memory; X, any shape; N, ids of one layer; U, distinct ones of them.
"""

import abc
import hashlib
import json
import threading
import time
from collections.abc import Sequence
from typing import Any, Self

import ml_dtypes
import numpy as np

from engram_jax.errors import ConfigError, StorageError
from engram_jax.memory.compress import as_integers, check_ids
from engram_jax.memory.hash_layout import HashLayout

DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
NO_IDS = np.zeros(0, np.int64)


def store_digest(layout: HashLayout, token_map_digest: str) -> str:
  """SHA-256 (hex) over every constant that leads from a text to row ids."""
  return hashlib.sha256(json.dumps([layout.digest, token_map_digest]).encode()).hexdigest()


class RowStore(abc.ABC):
  """The rows of a model's Engram layers. A context manager; safe to use from several threads.

  Attributes:
    layout: the hash that addresses these rows.
    token_map_digest: of the TokenCompressor before it.
    layers: their ids, in the order of a fetch's leading axis.
    rows: the number of rows of each.
    width: C.
    dtype: of fetched rows, float32 or bfloat16.
    digest: SHA-256 of layout and token map: equal digests mean equal row ids for every text.
    level: the name of this kind of store in `levels`.
    telemetry: counts of the rows it served.
  """

  level: str

  def __init__(
    self,
    layout: HashLayout,
    token_map_digest: str,
    width: int,
    dtype: np.typing.DTypeLike,
  ):
    if np.dtype(dtype) not in DTYPES:
      raise ValueError(f"dtype={dtype} of fetched rows must be float32 or bfloat16")
    self.layout, self.token_map_digest = layout, token_map_digest
    self.layers = layout.layers
    self.rows = tuple(layout.rows[layer] for layer in layout.layers)
    self.width, self.dtype = width, np.dtype(dtype)
    self.digest = store_digest(layout, token_map_digest)
    self.telemetry = LevelTelemetry()
    self._closed = False

  def fetch(self, row_ids_LX: np.ndarray, *, deadline: float | None = None) -> np.ndarray:
    """Rows [L, *X, C] of integer ids [L, *X], offsets included.

    Args:
      deadline: seconds from now after which the fetch gives up. None waits as long as it takes.

    Raises:
      ValueError: an id outside its layer's table (naming both), another leading axis, or a deadline
        that is not positive. Nothing was read.
      StorageError: the rows could not be read, or not in time.
    """
    row_ids_LX = self.check_ids(row_ids_LX)
    ids_LN = row_ids_LX.reshape(len(self.layers), -1)
    rows_LNC = np.empty((*ids_LN.shape, self.width), self.dtype)
    self._read_distinct(list(ids_LN), list(rows_LNC), absolute_deadline(deadline))
    return rows_LNC.reshape(*row_ids_LX.shape, self.width)

  def fetch_by_layer(
    self, ids_by_layer: Sequence[np.ndarray], *, deadline: float | None = None
  ) -> list[np.ndarray]:
    """Rows [N, C] of ids [N] of each layer, with an N of its own; raises like `fetch`."""
    if len(ids_by_layer) != len(self.layers):
      raise ValueError(f"ids of {len(ids_by_layer)} layers, but the store has {len(self.layers)}")
    ids = [self._check_layer_ids(i, x).reshape(-1) for i, x in enumerate(ids_by_layer)]
    return self._fetch_by_layer(ids, absolute_deadline(deadline))

  def fetch_layer(
    self, layer: int, row_ids_X: np.ndarray, *, deadline: float | None = None
  ) -> np.ndarray:
    """Rows [*X, C] of integer ids [*X] of the layer with this id; raises like `fetch`."""
    i, ids_X = self.check_layer(layer, row_ids_X)
    ids = [NO_IDS] * len(self.layers)
    ids[i] = ids_X.reshape(-1)
    outs = [np.empty((len(ids_N), self.width), self.dtype) for ids_N in ids]
    self._read_distinct(ids, outs, absolute_deadline(deadline))
    return outs[i].reshape(*ids_X.shape, self.width)

  def require(self, layout: HashLayout, token_map_digest: str, name: str = "the table") -> None:
    """Raises ConfigError unless these rows are addressed by this hash and this token map."""
    if self.layout != layout:
      theirs, ours = self.layout.describe(), layout.describe()
      key = next(key for key in theirs if theirs[key] != ours[key])
      raise ConfigError(
        f"{name} has another hash layout: {key} {theirs[key]} there, {ours[key]} here"
      )
    if self.token_map_digest != token_map_digest:
      raise ConfigError(
        f"{name} belongs to another tokenizer: token map {self.token_map_digest} there, "
        f"{token_map_digest} here"
      )

  def levels(self) -> dict[str, dict[str, Any]]:
    """The telemetry of this store and of those below it, by level, as JSON values."""
    return {self.level: self.telemetry.as_dict()}

  def close(self) -> None:
    """Releases what the store holds; a later fetch raises ValueError. May be called again."""
    self._closed = True

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def check_ids(self, row_ids_LX: np.ndarray) -> np.ndarray:
    """Returns the ids as an array if `fetch` would take them; ValueError otherwise."""
    row_ids_LX, L = as_integers(row_ids_LX, max(self.rows), "row id"), len(self.layers)
    if row_ids_LX.ndim < 1 or row_ids_LX.shape[0] != L:
      raise ValueError(f"row ids are [L={L}, ...], not of shape {row_ids_LX.shape}")
    for i, ids_X in enumerate(row_ids_LX):
      self._check_layer_ids(i, ids_X)
    return row_ids_LX

  def check_layer(self, layer: int, row_ids_X: np.ndarray) -> tuple[int, np.ndarray]:
    """The layer's index and the ids if `fetch_layer` would take them; ValueError otherwise."""
    if layer not in self.layers:
      raise ValueError(f"layer={layer} has no table here: the layers are {list(self.layers)}")
    i = self.layers.index(layer)
    return i, self._check_layer_ids(i, row_ids_X)

  def _check_layer_ids(self, i: int, ids: Any) -> np.ndarray:
    self._require_open()
    return check_ids(ids, self.rows[i], f"layer {self.layers[i]}: row id")

  def _require_open(self) -> None:
    if self._closed:
      raise ValueError("the store is closed")

  @abc.abstractmethod
  def _read(
    self, ids_by_layer: Sequence[np.ndarray], outs: Sequence[np.ndarray], until: float | None
  ) -> None:
    """Writes the rows of each layer's checked ids [N] to outs[i] [N, C], all of them or raises.

    until: an absolute deadline, as `absolute_deadline` returns it.
    """

  def _reads_distinct(self) -> bool:
    """Returns True if reading a row costs more than finding its id's duplicates."""
    return True

  def _read_distinct(
    self, ids_by_layer: Sequence[np.ndarray], outs: Sequence[np.ndarray], until: float | None
  ) -> None:
    """`_read`, but each distinct row once where that pays."""
    if not self._reads_distinct():
      self._read(ids_by_layer, outs, until)
      return
    distinct = [np.unique(ids, return_inverse=True) for ids in ids_by_layer]
    rows = self._fetch_by_layer([ids_U for ids_U, _ in distinct], until)
    for out_NC, rows_UC, (_, inverse_N) in zip(outs, rows, distinct, strict=True):
      if len(out_NC):
        np.take(rows_UC, inverse_N, axis=0, out=out_NC, mode="clip")

  def _fetch_by_layer(
    self, ids_by_layer: Sequence[np.ndarray], until: float | None
  ) -> list[np.ndarray]:
    """`fetch_by_layer` of checked ids, with an absolute deadline."""
    outs = [np.empty((len(ids), self.width), self.dtype) for ids in ids_by_layer]
    self._read(ids_by_layer, outs, until)
    return outs


def absolute_deadline(deadline: float | None) -> float | None:
  """time.monotonic() at which `deadline` seconds from now have passed; None for None."""
  if deadline is None:
    return None
  if not deadline > 0:
    raise ValueError(f"deadline={deadline} must be positive: seconds from now")
  return time.monotonic() + deadline


def remaining_seconds(until: float | None) -> float | None:
  """Seconds before an absolute deadline, None without one; StorageError if it has passed."""
  if until is None:
    return None
  seconds = until - time.monotonic()
  if seconds <= 0:
    raise StorageError("rows were not read in time: the deadline has passed")
  return seconds


class LevelTelemetry:
  """Counts of one level, added up over all fetches; safe to use from several threads.

  Attributes:
    hits: rows this level had.
    misses: rows it asked the level below for. Each counts a distinct row of a fetch once.
    bytes: read from below: packed ones from a file or a host table, else those of rows.
    wait_seconds: spent by fetches waiting for them, summed over threads.
  """

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self.reset()

  def add(self, hits: int = 0, misses: int = 0, bytes: int = 0, seconds: float = 0.0) -> None:
    """Adds the counts of a fetch."""
    with self._lock:
      self.hits += hits
      self.misses += misses
      self.bytes += bytes
      self.wait_seconds += seconds

  def as_dict(self) -> dict[str, Any]:
    """JSON values; `hit_rate` is None before the first row."""
    with self._lock:
      rows = self.hits + self.misses
      return {
        "hits": self.hits,
        "misses": self.misses,
        "hit_rate": self.hits / rows if rows else None,
        "bytes": self.bytes,
        "wait_seconds": self.wait_seconds,
      }

  def reset(self) -> None:
    """Sets all counts to zero, for measuring from now on."""
    with self._lock:
      self.hits = self.misses = self.bytes = 0
      self.wait_seconds = 0.0
