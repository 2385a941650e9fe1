"""Which rows of a batch this process makes, and how they become arrays of the whole mesh."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engram_jax.core.mesh import batch_sharding

ROW_IDS = "row_ids"  # [L, B, T, J]; every other array of a batch is [B, T]


def process_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
  """int64 [b], rising: the rows of a batch [B, ...] that lie on this process's devices.

  Together the processes make every row; two make the same ones where a `tensor` axis crosses them.
  Raises ValueError where the sharding does not divide the batch.
  """
  axes = sharding.spec[0] if len(sharding.spec) else ()
  names = axes if isinstance(axes, tuple) else (axes,)
  parts = math.prod(sharding.mesh.shape[name] for name in names if name is not None)
  if batch_size % parts:
    raise ValueError(
      f"a batch of {batch_size} does not divide over {parts} devices of the axes {', '.join(names)}"
    )
  indices = sharding.addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def to_global(local: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
  """The batch of all processes, sharded by `batch_sharding(mesh)`, from the rows made here.

  Args:
    local: arrays [b, ...], and `row_ids` [L, b, T, J]: the rows of `process_rows`, in its order.
    mesh: over the devices of all processes.
    batch_size: B, of all processes together.
  """
  sharding = batch_sharding(mesh)
  rows = process_rows(sharding, batch_size)
  return {name: _global(array, name, sharding, rows, batch_size) for name, array in local.items()}


def _global(
  array: np.ndarray, name: str, sharding: NamedSharding, rows: np.ndarray, batch_size: int
) -> jax.Array:
  axis = 1 if name == ROW_IDS else 0
  shape = (*array.shape[:axis], batch_size, *array.shape[axis + 1 :])
  assert array.shape[axis] == len(rows), f"{name} has {array.shape[axis]} rows, not {len(rows)}"

  def piece(index: tuple[slice, ...]) -> np.ndarray:
    start, stop, _ = index[axis].indices(batch_size)
    begin = int(np.searchsorted(rows, start))  # rows of one shard are neighbours here too
    return array[(*index[:axis], slice(begin, begin + stop - start))]

  spec = PartitionSpec(*(None,) * axis, *sharding.spec)
  return jax.make_array_from_callback(shape, NamedSharding(sharding.mesh, spec), piece)
