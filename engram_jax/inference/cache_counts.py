"""Which rows a text asks for most: what a cache of fixed content should hold."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

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
