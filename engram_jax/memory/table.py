"""Tables of memory rows: a layer's heads end to end, looked up by row id.

A layer has as many rows as its heads' primes add up to, a number that divides by nothing. The
stored array is padded to a multiple of 1,024 that no mesh changes, so a table's shape on disk does
not depend on the devices it was trained on. Pad rows are zero and no id points at them.

Local letters: P, devices of a mesh; U, distinct ids.
"""

import functools
import math
from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engram_jax.config import MAX_ROWS
from engram_jax.core.mesh import platform
from engram_jax.memory import exchange
from engram_jax.memory.compress import check_visible_ids
from engram_jax.memory.dedup import FILL, expand
from engram_jax.memory.exchange import Partition, Round

PAD_MULTIPLE = 1024


def padded_rows(rows: int, devices: int = 1) -> int:
  """Rows of the stored array: the next multiple of 1,024, and of the number of devices.

  With any divisor of 1,024 devices the second adds nothing, so the shape is the same for all.
  Raises ValueError for a table whose rows have no int32 ids.
  """
  if not 0 < rows <= MAX_ROWS:
    raise ValueError(f"a table of {rows:,} rows has no int32 row ids: give 1 to {MAX_ROWS:,}")
  multiple = math.lcm(PAD_MULTIPLE, devices)
  return -(-rows // multiple) * multiple


@functools.partial(jax.jit, static_argnames=("rows", "width", "std", "dtype", "mesh"))
def init_table(
  key: jax.Array,
  rows: int,
  width: int,
  *,
  std: float,
  dtype: jax.typing.DTypeLike = jnp.float32,
  mesh: Mesh | None = None,
) -> jax.Array:
  """A table [R_padded, C]: `rows` rows drawn from N(0, std^2), then zeros.

  A row's numbers follow from the key and its id, so they are the same on any mesh. Rows are made a
  few thousand at a time: at its peak this holds little more than the table.

  mesh: makes it sharded as `table_sharding` says, each device its own rows.
  """
  if mesh is None or mesh.size == 1:
    return _init_rows(key, 0, padded_rows(rows), rows, width, std, dtype)
  own = padded_rows(rows, mesh.size) // mesh.size

  def run(key: jax.Array) -> jax.Array:
    first = jax.lax.axis_index(mesh.axis_names) * own
    return _init_rows(key, first, own, rows, width, std, dtype)

  spec = PartitionSpec(mesh.axis_names)
  run = jax.shard_map(run, mesh=mesh, in_specs=PartitionSpec(), out_specs=spec, check_vma=False)
  return run(key)


def _init_rows(key, first, count: int, rows: int, width: int, std: float, dtype) -> jax.Array:
  """Rows `first` to `first + count - 1` of a table with `rows` rows before its padding."""
  chunk = math.gcd(count, 4096)
  some = lambda start: draw_rows(
    key, first + start + jnp.arange(chunk), rows, width, std=std, dtype=dtype
  )
  return jax.lax.map(some, jnp.arange(0, count, chunk)).reshape(count, width)


def draw_rows(
  key: jax.Array,
  ids: jax.Array,
  rows: int,
  width: int,
  *,
  std: float,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """Rows [ids.size, width] as `init_table` makes them, without the others."""
  draw = lambda i: std * jax.random.normal(jax.random.fold_in(key, i), (width,))
  return jnp.where((ids < rows)[:, None], jax.vmap(draw)(ids), 0).astype(dtype)


def table_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over all axes of the mesh, flattened; every device holds whole rows."""
  return NamedSharding(mesh, PartitionSpec(mesh.axis_names, None))


def row_major(sharding: NamedSharding, ndim: int) -> NamedSharding | Format:
  """The sharding of a table or of its optimizer's state; on TPU with each row in one piece.

  A TPU lays narrow arrays out by columns unless it is told. Rows are then read and written in a
  copy by rows, so that each step would copy the whole table there and back.
  """
  if ndim != 2 or platform(cast(Mesh, sharding.mesh)) != "tpu":
    return sharding
  return Format(Layout(major_to_minor=(0, 1)), sharding)


def lookup(
  table_RC: jax.Array,
  row_ids: jax.Array,
  *,
  mesh: Mesh | None = None,
  capacity: float = 1.25,
) -> jax.Array:
  """Rows [*row_ids.shape, C] of the table, in its dtype; differentiable in the table.

  Args:
    table_RC: [R_padded, C].
    row_ids: integers, offsets included (`hash ids + layout.offsets[layer]`). Values of a NumPy
      array are checked; those of a jax array, inside jit above all, by whoever had them before.
    mesh: over which the table is sharded as `table_sharding(mesh)` says. Ids and rows then travel
      by all-to-all (memory/exchange.py), and the gradient is summed where its rows lie; the table
      itself stays where it is. Rows that do not divide by the devices are padded for the call,
      which copies the table: `padded_rows(rows, devices)` makes one that need not be.
    capacity: rows that one exchange carries, over the ids of a device; what is above travels in
      further rounds. Never changes the result.

  Inside jit an id outside the array gives a row of NaN, never a neighbour's row.
  `compress.check_ids` refuses such ids on the host, where they enter: jax cuts a NumPy array of
  int64, given to a jitted function, down to its low 32 bits, and they may be another row's id.

  Raises ValueError for ids that are no integers, and for one that is seen to be outside.
  """
  row_ids = check_visible_ids(row_ids, table_RC.shape[0], "row id")
  if mesh is not None and mesh.size > 1 and row_ids.size:
    return _sharded_lookup(mesh, capacity, table_RC, row_ids)
  return table_RC.at[row_ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _sharded_lookup(
  mesh: Mesh, capacity: float, table_RC: jax.Array, row_ids: jax.Array
) -> jax.Array:
  """Cuts the ids into one equal part for each device, by leading axes where they divide."""
  P, (R, C) = mesh.size, table_RC.shape
  table_RC = jnp.pad(table_RC, ((0, -R % P), (0, 0)))
  table_RC = jax.lax.with_sharding_constraint(table_RC, table_sharding(mesh))
  if row_ids.shape[0] % P == 0:
    return _exchanged(mesh, capacity, table_RC, row_ids)
  flat = jnp.pad(row_ids.reshape(-1), (0, -row_ids.size % P), constant_values=FILL)
  return _exchanged(mesh, capacity, table_RC, flat)[: row_ids.size].reshape(*row_ids.shape, C)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchanged(mesh: Mesh, capacity: float, table_RC: jax.Array, row_ids: jax.Array) -> jax.Array:
  """Rows over the mesh; ids travel to the rows' owners by all-to-all, and rows come back."""
  # tables/sharded.py has these stages apart: training differentiates by rows, not by a table.
  axes, p = mesh.axis_names, _partition(mesh, capacity, table_RC, row_ids)

  def run(table_rC: jax.Array, ids: jax.Array) -> jax.Array:
    requests = [exchange.make_requests(ids, p)]
    read = lambda _, ids: ((), [table_rC.at[ids[0]].get(mode="fill", fill_value=0)])
    like = jax.ShapeDtypeStruct(table_rC.shape[1:], table_rC.dtype)
    main = exchange.send_requests(requests, [p])
    _, (rows_UC,) = exchange.fetch_rows(read, (), requests, main, [p], like)
    return expand(rows_UC, requests[0].inverse)

  spec = PartitionSpec(axes)
  return jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(
    table_RC, row_ids
  )


def _exchanged_forward(mesh, capacity, table_RC, row_ids):
  return _exchanged(mesh, capacity, table_RC, row_ids), (table_RC, row_ids)


def _exchanged_backward(mesh, capacity, saved, drows):
  """Sums the gradients of each device's distinct ids, then over devices at the rows' owners."""
  table_RC, row_ids = saved  # of the table only the shape is read
  (_, C), p = table_RC.shape, _partition(mesh, capacity, *saved)

  def run(ids: jax.Array, drows: jax.Array) -> jax.Array:
    requests = [exchange.make_requests(ids, p)]
    grads_UC = jnp.zeros((requests[0].ids_U.size, C), jnp.float32)
    grads_UC = grads_UC.at[requests[0].inverse].add(drows, mode="promise_in_bounds")
    sums_rC = jnp.zeros((p.rows, C), jnp.float32)

    def add(sums_rC: jax.Array, round_: Round) -> jax.Array:
      (grads,) = exchange.send_gradients([grads_UC], round_, [p])
      return sums_rC.at[round_.received[0]].add(grads, mode="drop")

    main = exchange.send_requests(requests, [p])
    sums_rC, _ = exchange.overflow_rounds(add, add(sums_rC, main), requests, [p])
    return sums_rC.astype(table_RC.dtype)

  spec = PartitionSpec(mesh.axis_names)
  run = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  return run(row_ids, drows), None


_exchanged.defvjp(_exchanged_forward, _exchanged_backward)


def _partition(mesh: Mesh, capacity: float, table_RC: jax.Array, row_ids: jax.Array) -> Partition:
  P = mesh.size
  rows, ids = table_RC.shape[0] // P, row_ids.size // P
  return exchange.make_partition(mesh.axis_names, P, rows, ids, capacity)


def lookup_reference(table_RC: jax.Array, row_ids: jax.Array) -> jax.Array:
  """`lookup` for ids that are inside the table, as plain indexing."""
  return jnp.take(table_RC, row_ids, axis=0)
