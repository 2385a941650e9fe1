"""What a step's slab is made of, read from a table on the host and sent to the device."""

from typing import NamedTuple

import jax
import numpy as np

from engram_jax.training.host.records import WRITTEN
from engram_jax.training.host.slab import Fresh
from engram_jax.training.host.table import FileTable, HostTable

Table = HostTable | FileTable
_PARTS = 4  # sizes in which rows travel: quarters of a slab, so that few programs are compiled


class Came(NamedTuple):
  """What was read for one table of a step.

  ids: int32 [n], distinct, rising. padded: int32 [U]. leaves: [u, ...] on the device, u >= n.
  source: int32 [u], places in the slab before, or -1; None without one. fresh: rows to be drawn.
  """

  ids: np.ndarray
  padded: jax.Array
  leaves: tuple[jax.Array, ...]
  source: jax.Array | None
  fresh: Fresh | None


def came_for(table: Table, ids: np.ndarray, last: np.ndarray | None, asked: int) -> Came:
  """The rows of rising distinct `ids`, of `asked` ids in all. last: the ids of the step before."""
  U = min(asked, table.records.padded)
  part = -(-U // _PARTS)
  u = min(U, -(-len(ids) // part) * part)
  records_n = table.take(ids)
  leaves = tuple(filled(x, u) for x in table.records.split(records_n))
  source = None if last is None else _places_in(last, ids)
  old = records_n[WRITTEN] != 0
  fresh = fresh_rows(np.flatnonzero(~(old if source is None else old | (source >= 0))), ids, u)
  padded = filled(ids.astype(np.int32), U)
  sent = (padded, leaves, None if source is None else filled(source, u, -1), fresh)
  return Came(ids, *jax.device_put(sent))


def filled(x: np.ndarray, size: int, value: int = 0) -> np.ndarray:
  """[n, ...] -> [size, ...], `value` after what there is."""
  out = np.full((size, *x.shape[1:]), value, x.dtype)
  out[: len(x)] = x
  return out


def _places_in(last: np.ndarray, ids: np.ndarray) -> np.ndarray:
  """int32: where each of the rising `ids` stands in the rising `last`; -1 where it does not."""
  at = np.minimum(np.searchsorted(last, ids), len(last) - 1)
  return np.where(last[at] == ids, at, -1).astype(np.int32)


def fresh_rows(places: np.ndarray, ids: np.ndarray, size: int) -> Fresh | None:
  """Filled up to a power of four, so that few programs are compiled."""
  if not places.size:
    return None
  count = 64
  while count < places.size:
    count *= 4
  return Fresh(
    filled(places.astype(np.int32), count, size), filled(ids[places].astype(np.int32), count)
  )
