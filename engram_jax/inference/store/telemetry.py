"""What a level of the hierarchy served and waited for."""

import threading
from typing import Any


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
