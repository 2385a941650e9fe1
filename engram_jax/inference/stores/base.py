"""RowStore: rows of all Engram layers by their ids, wherever they lie.

    with FileRows("table.engram") as store:
      rows_LBTJC = store.fetch(row_ids_LBTJ)

A fetch gives the rows of exactly these ids or raises; the array it returns is new and nobody writes
to it afterwards, so a read that comes too late can spoil nothing.
"""

import abc
import hashlib
import json
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import ml_dtypes
import numpy as np

from engram_jax.errors import ConfigError, StorageError
from engram_jax.memory.hash_layout import HashLayout
from engram_jax.memory.table import check_row_ids

DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
_NONE = np.zeros(0, np.int64)


def store_digest(layout: HashLayout, token_map_digest: str) -> str:
  """SHA-256 (hex) over every constant that leads from a text to row ids."""
  return hashlib.sha256(json.dumps([layout.digest, token_map_digest]).encode()).hexdigest()


class RowStore(abc.ABC):
  """The rows of a model's Engram layers. A context manager; safe to use from several threads.

  Attributes:
    layout: the hash that addresses these rows. token_map_digest: of the TokenCompressor before it.
    layers: their ids, in the order of a fetch's leading axis. rows: one count each. width: C.
    dtype: of what a fetch returns, float32 or bfloat16.
    digest: SHA-256 of layout and token map: equal digests mean equal row ids for every text.
    level: what kind of store it is, in a word. telemetry: what it served.
  """

  level: str

  def __init__(self, layout: HashLayout, token_map_digest: str, width: int, dtype: np.dtype):
    if np.dtype(dtype) not in DTYPES:
      raise ValueError(f"dtype={dtype} of fetched rows must be float32 or bfloat16")
    self.layout, self.token_map_digest = layout, token_map_digest
    self.layers = layout.layers
    self.rows = tuple(layout.rows[layer] for layer in layout.layers)
    self.width, self.dtype = width, np.dtype(dtype)
    self.digest = store_digest(layout, token_map_digest)
    self.telemetry = Telemetry()
    self._closed = False

  def fetch(self, row_ids_LX: np.ndarray, *, deadline: float | None = None) -> np.ndarray:
    """Rows [L, *X, C] of integer ids [L, *X], offsets included; L is the number of layers.

    Args:
      deadline: seconds from now after which the fetch gives up. None waits as long as it takes.

    Raises:
      ValueError: an id outside its layer's table (naming both), another leading axis, or a deadline
        that is not positive. Nothing was read.
      StorageError: the rows could not be read, or not in time.
    """
    return self._fetch(self.checked(row_ids_LX), ends_at(deadline))

  def gather(
    self, ids_by_layer: Sequence[np.ndarray], *, deadline: float | None = None
  ) -> list[np.ndarray]:
    """Rows [n_i, C] of each layer's own ids [n_i]; raises like `fetch`. For caches."""
    if len(ids_by_layer) != len(self.layers):
      raise ValueError(f"ids of {len(ids_by_layer)} layers, but the store has {len(self.layers)}")
    ids = [self._ids(i, np.asarray(x).reshape(-1)) for i, x in enumerate(ids_by_layer)]
    return self._gather(ids, ends_at(deadline))

  def layer(self, layer: int) -> "LayerRows":
    """The rows of one layer, by its id in the model."""
    if layer not in self.layers:
      raise ValueError(f"layer={layer} has no table here: the layers are {list(self.layers)}")
    return LayerRows(self, self.layers.index(layer))

  def require(self, layout: HashLayout, token_map_digest: str, what: str = "the table") -> None:
    """ConfigError unless these rows are addressed by this hash and this token map."""
    if self.layout != layout:
      theirs, ours = self.layout.describe(), layout.describe()
      name = next(key for key in theirs if theirs[key] != ours[key])
      raise ConfigError(
        f"{what} has another hash layout: {name} {theirs[name]} there, {ours[name]} here"
      )
    if self.token_map_digest != token_map_digest:
      raise ConfigError(
        f"{what} belongs to another tokenizer: token map {self.token_map_digest} there, "
        f"{token_map_digest} here"
      )

  def levels(self) -> dict[str, dict[str, Any]]:
    """The telemetry of this store and of those below it, by level, as JSON values."""
    return {self.level: self.telemetry.as_dict()}

  def close(self) -> None:
    """Nothing can be fetched after. May be called again."""
    self._closed = True

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  @abc.abstractmethod
  def _read(
    self, ids_by_layer: Sequence[np.ndarray], outs: Sequence[np.ndarray], until: float | None
  ) -> None:
    """Writes the rows of each layer's checked ids [n_i] to outs[i] [n_i, C], all of them or raises.

    until: in time.monotonic's seconds.
    """

  def _distinct_first(self) -> bool:
    """Whether reading a row costs more than finding out that it was read already."""
    return True

  def checked(self, row_ids_LX: np.ndarray) -> np.ndarray:
    """The ids as an array, if `fetch` would take them; ValueError otherwise."""
    row_ids_LX, L = np.asarray(row_ids_LX), len(self.layers)
    if row_ids_LX.ndim < 1 or row_ids_LX.shape[0] != L:
      raise ValueError(f"row ids are [L={L}, ...], not of shape {row_ids_LX.shape}")
    for i, ids_X in enumerate(row_ids_LX):
      self._ids(i, ids_X)
    return row_ids_LX

  def _ids(self, i: int, ids: np.ndarray) -> np.ndarray:
    self._require_open()
    try:
      check_row_ids(ids, self.rows[i])
    except ValueError as error:
      raise ValueError(f"layer {self.layers[i]}: {error}") from None
    return ids

  def _require_open(self) -> None:
    if self._closed:
      raise ValueError("the store is closed")

  def _fetch(self, row_ids_LX: np.ndarray, until: float | None) -> np.ndarray:
    ids_LN = row_ids_LX.reshape(len(self.layers), -1)
    out_LNC = np.empty((*ids_LN.shape, self.width), self.dtype)
    self._fill(list(ids_LN), list(out_LNC), until)
    return out_LNC.reshape(*row_ids_LX.shape, self.width)

  def _fill(
    self, ids_by_layer: Sequence[np.ndarray], outs: Sequence[np.ndarray], until: float | None
  ) -> None:
    """`_read`, but each distinct row once where that pays."""
    if not self._distinct_first():
      self._read(ids_by_layer, outs, until)
      return
    distinct = [np.unique(ids, return_inverse=True) for ids in ids_by_layer]
    rows = self._gather([ids_U for ids_U, _ in distinct], until)
    for out_NC, rows_UC, (_, inverse_N) in zip(outs, rows, distinct, strict=True):
      if len(out_NC):
        np.take(rows_UC, inverse_N, axis=0, out=out_NC, mode="clip")

  def _gather(self, ids_by_layer: Sequence[np.ndarray], until: float | None) -> list[np.ndarray]:
    outs = [np.empty((len(ids), self.width), self.dtype) for ids in ids_by_layer]
    self._read(ids_by_layer, outs, until)
    return outs


class LayerRows(NamedTuple):
  """One layer of a store."""

  store: RowStore
  index: int

  @property
  def rows(self) -> int:
    return self.store.rows[self.index]

  @property
  def width(self) -> int:
    return self.store.width

  def fetch(self, row_ids_X: np.ndarray, *, deadline: float | None = None) -> np.ndarray:
    """Rows [*X, C] of integer ids [*X]; raises like `RowStore.fetch`."""
    store, ids_X = self.store, self.checked(row_ids_X)
    ids = [ids_X.reshape(-1) if i == self.index else _NONE for i in range(len(store.layers))]
    outs = [np.empty((len(i), store.width), store.dtype) for i in ids]
    store._fill(ids, outs, ends_at(deadline))
    return outs[self.index].reshape(*ids_X.shape, store.width)

  def checked(self, row_ids_X: np.ndarray) -> np.ndarray:
    """The ids as an array, if `fetch` would take them; ValueError otherwise."""
    return self.store._ids(self.index, np.asarray(row_ids_X))


def ends_at(deadline: float | None) -> float | None:
  """When a deadline that begins now has passed, on the clock of `seconds_left`."""
  if deadline is None:
    return None
  if not deadline > 0:
    raise ValueError(f"deadline={deadline} must be positive: seconds from now")
  return time.monotonic() + deadline


def seconds_left(until: float | None) -> float | None:
  """None for ever; StorageError where nothing is left."""
  if until is None:
    return None
  left = until - time.monotonic()
  if left <= 0:
    raise StorageError("rows were not read in time: the deadline has passed")
  return left


class Telemetry:
  """Counts of one level, added up over all fetches; safe to use from several threads.

  Attributes:
    hits: rows this level had. misses: rows it asked the level below for. Each counts a distinct row
      of a fetch once.
    bytes: that came from below: packed ones from a file or a host table, else of rows.
    wait_seconds: that fetches spent waiting for them, summed over threads.
  """

  def __init__(self) -> None:
    self.hits = self.misses = self.bytes = 0
    self.wait_seconds = 0.0
    self._lock = threading.Lock()

  def add(self, hits: int = 0, misses: int = 0, bytes: int = 0, seconds: float = 0.0) -> None:
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
    """Back to nothing, for measuring from now on."""
    with self._lock:
      self.hits = self.misses = self.bytes = 0
      self.wait_seconds = 0.0
