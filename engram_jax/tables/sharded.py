"""Touched rows of tables sharded over a mesh: the three stages of tables/device.py, by `shard_map`.

Rows and gradients travel by the exchange of memory/exchange.py, one for all tables: row ids to the
rows' owners and rows back (`fetch`), gradients to the owners (`reduce_grads`, and in `update` once
more what did not fit in the main round). Nothing here is as large as a table.

`memory.table.lookup` fetches over a mesh too, as one function with a gradient of the table's size,
for whoever reads tables or differentiates by them. Training differentiates by the rows instead, and
must come back to the same ids, so the stages are apart here.

Local letters: P, devices of the mesh; S, slots of an exchange; U, distinct ids of a device.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from engram_jax.core.mesh import BATCH_AXES
from engram_jax.memory import exchange
from engram_jax.memory.exchange import Partition, Requests, Round
from engram_jax.tables.device import Arrays, Fetched, RowGrads, norm_sq
from engram_jax.tables.table_optimizer import TableOptimizer

_REPLICATED = PartitionSpec()


class _Routing(NamedTuple):
  """Residuals of `fetch` on one device, for each table: its distinct ids, the ends of the main
  round's ranges, and the rows that were requested of it in that round."""

  ids_U: Any
  main_end_P: Any
  received: Any


class ShardedRows(NamedTuple):
  """Tables sharded over all axes of a mesh, as memory/table.py's `table_sharding` says.

  rows: padded rows of each table, over all devices. capacity: of the exchange, see
  `exchange.make_partition`. dtype: in which rows and gradients travel.
  """

  optimizer: TableOptimizer
  mesh: Mesh
  rows: tuple[int, ...]
  capacity: float
  dtype: Any

  def fetch(self, tables: Arrays, states: tuple, row_ids: Arrays) -> tuple[Fetched, Arrays, tuple]:
    """Fetches as `DeviceRows.fetch` does; B is divided by batch, T over `tensor`."""
    partitions = self._partitions(row_ids[0].size)
    row = jax.ShapeDtypeStruct(tables[0].shape[1:], self.dtype)

    def read(owned: tuple, received: list[jax.Array]) -> tuple[tuple, list[jax.Array]]:
      owned = self._synced(owned, received, partitions)
      found = [
        t.at[ids].get(mode="fill", fill_value=0).astype(self.dtype)
        for t, ids in zip(owned[0], received, strict=True)
      ]
      return owned, found

    def run(owned: tuple, row_ids: Arrays) -> tuple[Fetched, tuple]:
      requests = [
        exchange.make_requests(ids, p) for ids, p in zip(row_ids, partitions, strict=True)
      ]
      main = exchange.send_requests(requests, partitions)
      owned, rows = exchange.fetch_rows(read, owned, requests, main, partitions, row)
      ids, inverses, _, main_end = (tuple(x) for x in zip(*requests, strict=True))
      return Fetched(tuple(rows), inverses, _Routing(ids, main_end, tuple(main.received))), owned

    owned = self._owned_specs(tables, states)
    specs: Any = (self._each, _TOKENS, self._routing_specs)
    out = Fetched(*specs)
    mapped = self._map(run, (owned, _TOKENS), (out, owned))
    fetched, (tables, states) = mapped((tables, states), row_ids)
    return fetched, tables, states

  def reduce_grads(self, fetched: Fetched, grads: Arrays) -> RowGrads:
    """Sends gradients to the rows' owners; summed there, they are the gradients of their rows."""
    partitions = self._partitions(fetched.inverses[0].size)

    def run(routing: _Routing, grads_UC: Arrays) -> tuple:
      requests, main = _rebuild_routing(routing, partitions)

      def sums(round_: Round) -> tuple[Arrays, Arrays, jax.Array, jax.Array]:
        parts = _sums(grads_UC, round_, partitions)
        ids, grads = tuple(i for i, _ in parts), tuple(g for _, g in parts)
        count = jnp.stack([(i < p.rows).sum() for i, p in zip(ids, partitions, strict=True)])
        return ids, grads, norm_sq(grads), count

      ids, grads, square, count = sums(main)
      add = lambda total, round_: jax.tree.map(jnp.add, total, sums(round_)[2:])
      total, overflow = exchange.overflow_rounds(add, (square, count), requests, partitions)
      square, count = lax.psum(total, self.mesh.axis_names)
      return ids, grads, square, tuple(count), 1 + overflow

    out = (self._each, self._each, _REPLICATED, _REPLICATED, _REPLICATED)
    mapped = self._map(run, (self._routing_specs, self._each), out)
    ids, sums, square, count, rounds = mapped(fetched.residuals, grads)
    return RowGrads(ids, sums, grads, square, count, rounds)

  def update(
    self,
    fetched: Fetched,
    grads: RowGrads,
    tables: Arrays,
    states: tuple,
    grad_scale: jax.Array,
    ok: jax.Array,
    **options: Any,
  ) -> tuple[Arrays, tuple]:
    """Updates as `DeviceRows.update` does; sums of overflow rounds travel again, each in turn."""
    partitions = self._partitions(fetched.inverses[0].size)

    def run(routing, local_UC, ids, sums, owned, grad_scale, ok, options):
      requests, _ = _rebuild_routing(routing, partitions)
      step = lambda owned, ids, sums: self._step(
        owned, ids, [grad_scale * g for g in sums], ok, partitions, options
      )
      old_scalars = owned[1]
      owned = step(owned, ids, sums)
      new_scalars = owned[1]

      def overflow(owned: tuple, round_: Round) -> tuple:
        parts = _sums(local_UC, round_, partitions)
        ids, sums = tuple(i for i, _ in parts), tuple(g for _, g in parts)
        owned = (owned[0], _with_scalars(owned[1], old_scalars))  # still the same step
        tables, states = step(owned, ids, sums)
        return tables, _with_scalars(states, new_scalars)

      return exchange.overflow_rounds(overflow, owned, requests, partitions)[0]

    owned, each = self._owned_specs(tables, states), self._each
    scalars = dict.fromkeys(options, _REPLICATED)
    specs = (self._routing_specs, each, each, each, owned, _REPLICATED, _REPLICATED, scalars)
    mapped = self._map(run, specs, owned)
    return mapped(
      fetched.residuals,
      grads.local_UC,
      grads.ids_U,
      grads.grads_UC,
      (tables, states),
      grad_scale,
      ok,
      options,
    )

  def flush(self, tables: Arrays, states: tuple) -> tuple[Arrays, tuple]:
    """Brings every row up to date, each device its own; nothing travels."""

    def run(tables: Arrays, states: tuple) -> tuple[Arrays, tuple]:
      device = lax.axis_index(self.mesh.axis_names)
      new = [
        self.optimizer.flush(t, s, first_row=device * t.shape[0])
        for t, s in zip(tables, states, strict=True)
      ]
      return tuple(t for t, _ in new), tuple(s for _, s in new)

    owned = self._owned_specs(tables, states)
    return self._map(run, owned, owned)(tables, states)

  def _step(self, owned, ids, sums, ok, partitions, options):
    tables, states = [], []
    for t, state, i, g, p in zip(*owned, ids, sums, partitions, strict=True):
      first = lax.axis_index(p.axes) * p.rows
      where = {"first_row": first, "axes": p.axes}
      table, state = self.optimizer.update(g, state, t, i, ok, **where, **options)
      tables.append(table)
      states.append(state)
    return tuple(tables), tuple(states)

  def _synced(
    self, owned: tuple, received: list[jax.Array], partitions: list[Partition]
  ) -> tuple[Arrays, tuple]:
    if not self.optimizer.is_lazy:
      return owned
    new = [
      self.optimizer.sync(
        t, s, exchange.merge_received(r, p).ids_U, first_row=lax.axis_index(p.axes) * p.rows
      )
      for t, s, r, p in zip(*owned, received, partitions, strict=True)
    ]
    return tuple(t for t, _ in new), tuple(s for _, s in new)

  @property
  def _each(self) -> PartitionSpec:
    """The spec of arrays of which every device has its own part, along the leading axis."""
    return PartitionSpec(self.mesh.axis_names)

  @property
  def _routing_specs(self) -> _Routing:
    return _Routing(self._each, _REPLICATED, self._each)

  def _owned_specs(self, tables: Arrays, states: tuple) -> tuple:
    return jax.tree.map(lambda x: self._each if x.ndim else _REPLICATED, (tables, states))

  def _map(self, run: Callable, ins: Any, outs: Any) -> Callable:
    return jax.shard_map(run, mesh=self.mesh, in_specs=ins, out_specs=outs, check_vma=False)

  def _partitions(self, ids: int) -> list[Partition]:
    """The partition of each table for `ids` row ids over all devices."""
    P, axes = self.mesh.size, self.mesh.axis_names
    return [
      exchange.make_partition(axes, P, rows // P, ids // P, self.capacity) for rows in self.rows
    ]


_TOKENS = PartitionSpec(BATCH_AXES, "tensor")  # how [B, T, J] is divided


def _rebuild_routing(
  routing: _Routing, partitions: Sequence[Partition]
) -> tuple[list[Requests], Round]:
  """Rebuilds what `fetch` knew; no id travels again."""
  requests = [
    Requests(ids, ids[:0], jnp.int32(ids.size), main_end)
    for ids, main_end in zip(routing.ids_U, routing.main_end_P, strict=True)
  ]
  return requests, exchange.send_requests(requests, partitions, routing.received)


def _sums(
  grads_UC: Arrays, round_: Round, partitions: Sequence[Partition]
) -> list[tuple[jax.Array, jax.Array]]:
  """(rows [S], their summed gradients [S, C], float32) of each table's that arrive in a round."""
  arrived, parts = exchange.send_gradients(grads_UC, round_, partitions), []
  for g_PSC, received, p in zip(arrived, round_.received, partitions, strict=True):
    unique = exchange.merge_received(received, p)
    sums = jnp.zeros((unique.ids_U.size, g_PSC.shape[-1]), jnp.float32)
    sums = sums.at[unique.inverse].add(g_PSC.astype(jnp.float32), mode="promise_in_bounds")
    parts.append((unique.ids_U, sums))
  return parts


def _with_scalars(states: Any, other: Any) -> Any:
  """`states` with the scalars of `other`: counts of steps, which a round of its own is not."""
  return jax.tree.map(lambda x, y: x if x.ndim else y, states, other)
