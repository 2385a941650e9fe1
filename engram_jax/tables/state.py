"""The state of memory tables as a pytree, and the rows of a batch taken out of it.

Local letters: U, distinct rows of a batch; P, devices.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

from engram_jax.core.mesh import BATCH_AXES
from engram_jax.memory.dedup import expand

SLOTS = "slots"  # key of a batch whose row ids were replaced by positions in row buffers


class TableState(NamedTuple):
  """The tables of a model and the states of their optimizer, by layer; a pytree.

  tables: {layer: [R_padded, C]} on devices; {} while they lie on the host or in a file.
  optimizer: {layer: state of the `TableOptimizer`}; off the devices its scalars alone.
  buffer_ids: {layer: int32 [U]} inside a step on row buffers, which then stand in `tables`: the row
    ids that their rows have, -1 past the last. None elsewhere.
  host: the tables off the devices (tables/offload.py); None on devices.
  """

  tables: dict[int, jax.Array]
  optimizer: dict[int, Any]
  buffer_ids: dict[int, jax.Array] | None = None
  host: Any = None


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["rows", "inverses", "residuals", "synced"],
  meta_fields=["mesh"],
)
@dataclasses.dataclass(frozen=True)
class Touched:
  """The distinct rows of a batch: what a loss is differentiated by in place of the tables.

  rows: {layer: [U, C]}, on a mesh of P devices [P U, C], each device's own part.
  inverses: {layer: int32 [B, T, J]}, each id's position among the rows of its device.
  residuals: what the return of gradients needs.
  synced: the state with these rows up to date, where the optimizer is lazy or the rows lie in row
    buffers; None where `fetch` changed nothing.
  mesh: over which the tables are sharded; None on one device.
  """

  rows: dict[int, jax.Array]
  inverses: dict[int, jax.Array]
  residuals: Any
  synced: TableState | None
  mesh: Mesh | None = None

  def expand(self, rows: Mapping[int, jax.Array]) -> dict[int, jax.Array]:
    """Rows [B, T, J, C] of each token, by layer; the transpose sums each row's gradients.

    rows: `self.rows`, or what a loss has in their place.
    """
    return {n: expand_rows(self.mesh, rows[n], inverse) for n, inverse in self.inverses.items()}


def expand_rows(mesh: Mesh | None, rows_UC: jax.Array, inverse_BTJ: jax.Array) -> jax.Array:
  """Rows [B, T, J, C] from a batch's distinct ones; nothing travels over the mesh."""
  if mesh is None:
    return expand(rows_UC, inverse_BTJ)
  spec = PartitionSpec(BATCH_AXES, "tensor")
  run = jax.shard_map(
    expand,
    mesh=mesh,
    in_specs=(PartitionSpec(mesh.axis_names), spec),
    out_specs=spec,
    check_vma=False,
  )
  return run(rows_UC, inverse_BTJ)
