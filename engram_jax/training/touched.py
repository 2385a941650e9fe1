"""The rows a batch touches: fetched before the model, updated after it, wherever their table lies.

    fetched, tables, states = rows.fetch(tables, states, row_ids)
    rows_BTJC = expand_rows(mesh, fetched.rows[i], inverse_BTJ)   differentiate by fetched.rows
    summed = rows.collect(tables, fetched, grads)                 per row, where it lies
    tables, states = rows.update(fetched, grads, summed, tables, states, scale, ok)

On one device a table's distinct rows are gathered and written in place. On a mesh the three run
under `shard_map`, and rows and gradients travel by the exchange of memory/exchange.py: one for all
tables. Nothing here is as large as a table.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from engram_jax.core.mesh import BATCH_AXES
from engram_jax.memory import exchange
from engram_jax.memory.dedup import expand, take_rows, unique_rows
from engram_jax.memory.exchange import Round, Shards, Wanted
from engram_jax.training.rows.form import TouchedRows

Arrays = tuple[jax.Array, ...]


class Fetched(NamedTuple):
  """rows: [U, C] of each table; on a mesh [D U, C], each device's distinct rows in its own part.
  inverses: int32 [B, T, J], each id's place among the rows of its device. way_back: what the
  return of gradients needs."""

  rows: Arrays
  inverses: Arrays
  way_back: Any


class Summed(NamedTuple):
  """ids_U, grads_UC: rows and their summed gradients, where the rows lie. norm_sq: of all of them.
  count: distinct rows of each table. rounds: exchanges there and back took (0 without any)."""

  ids_U: Arrays
  grads_UC: Arrays
  norm_sq: jax.Array
  count: Arrays
  rounds: jax.Array


def expand_rows(mesh: Mesh | None, rows_UC: jax.Array, inverse_BTJ: jax.Array) -> jax.Array:
  """Rows [B, T, J, C] of the tokens; its transpose sums the gradients of each distinct row."""
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


class LocalRows(NamedTuple):
  """Tables on one device."""

  optimizer: TouchedRows

  def fetch(self, tables: Arrays, states: tuple, row_ids_LBTJ: jax.Array) -> tuple:
    """(Fetched, tables, states): tables and states as they are once these rows are up to date."""
    ids = [unique_rows(i, t.shape[0]) for i, t in zip(row_ids_LBTJ, tables, strict=True)]
    ready = [
      self.optimizer.prepare(t, s, i.ids_U) for t, s, i in zip(tables, states, ids, strict=True)
    ]
    tables, states = tuple(t for t, _ in ready), tuple(s for _, s in ready)
    rows = tuple(take_rows(t, i.ids_U) for t, i in zip(tables, ids, strict=True))
    inverses = tuple(i.inverse for i in ids)
    return Fetched(rows, inverses, tuple((i.ids_U, i.count) for i in ids)), tables, states

  def collect(self, tables: Arrays, fetched: Fetched, grads: Arrays) -> Summed:
    """Gradients by distinct row are the sums already."""
    del tables
    ids, count = zip(*fetched.way_back, strict=True) if fetched.way_back else ((), ())
    return Summed(ids, grads, _norm_sq(grads), count, jnp.int32(0))

  def update(
    self,
    fetched: Fetched,
    grads: Arrays,
    summed: Summed,
    tables: Arrays,
    states: tuple,
    scale: jax.Array,
    ok: jax.Array,
  ) -> tuple[Arrays, tuple]:
    """One step of the optimizer on `scale` times the gradients, unless not `ok`."""
    del fetched, grads
    new = [
      self.optimizer.update(scale * g, s, t, i, ok)
      for g, s, t, i in zip(summed.grads_UC, states, tables, summed.ids_U, strict=True)
    ]
    return tuple(t for t, _ in new), tuple(s for _, s in new)

  def flush(self, tables: Arrays, states: tuple) -> tuple[Arrays, tuple]:
    """Every row brought up to date."""
    new = [self.optimizer.flush(t, s) for t, s in zip(tables, states, strict=True)]
    return tuple(t for t, _ in new), tuple(s for _, s in new)


_NONE = PartitionSpec()  # the same on every device


class _Kept(NamedTuple):
  """What a device remembers between fetch and update: its distinct ids, the ends of the main
  round's ranges, and what was asked of it in that round."""

  ids_U: Arrays
  main_D: Arrays
  received: Arrays


class ShardedRows(NamedTuple):
  """Tables sharded over all axes of a mesh, as memory/table.py's `table_sharding` says.

  capacity: of the exchange, see `exchange.shards`. dtype: in which rows and gradients travel.
  """

  optimizer: TouchedRows
  mesh: Mesh
  capacity: float
  dtype: Any

  def fetch(self, tables: Arrays, states: tuple, row_ids_LBTJ: jax.Array) -> tuple:
    """Row ids are divided by batch, and along T over `tensor`."""
    layout = self._layout(tables, row_ids_LBTJ[0].size // self.mesh.size)
    row = jax.ShapeDtypeStruct(tables[0].shape[1:], self.dtype)

    def read(owned: tuple, received: list[jax.Array]) -> tuple:
      owned = self._prepared(owned, received, layout)
      found = [
        t.at[ids].get(mode="fill", fill_value=0).astype(self.dtype)
        for t, ids in zip(owned[0], received, strict=True)
      ]
      return owned, found

    def run(owned: tuple, row_ids_LbTJ: jax.Array) -> tuple:
      wants = [exchange.wanted(ids, s) for ids, s in zip(row_ids_LbTJ, layout, strict=True)]
      main = exchange.ask(wants, layout)
      owned, rows = exchange.fetch(read, owned, wants, main, layout, row)
      ids, inverses, _, main_D = (tuple(x) for x in zip(*wants, strict=True))
      return Fetched(tuple(rows), inverses, _Kept(ids, main_D, tuple(main.received))), owned

    tokens = PartitionSpec(BATCH_AXES, "tensor")
    owned = self._owned_specs(tables, states)
    kept = _Kept(self._each, _NONE, self._each)
    run = self._map(
      run,
      (owned, PartitionSpec(None, *tokens)),
      (Fetched(self._each, tokens, kept), owned),
    )
    fetched, (tables, states) = run((tables, states), row_ids_LBTJ)
    return fetched, tables, states

  def collect(self, tables: Arrays, fetched: Fetched, grads: Arrays) -> Summed:
    """Gradients travel to the owners, whose sums are the gradients of their rows."""
    layout = self._layout_of(tables, fetched)

    def run(kept: _Kept, grads_UC: Arrays) -> Summed:
      wants, main = _again(kept, layout)

      def sums(round_: Round) -> tuple[Arrays, Arrays, jax.Array, jax.Array]:
        parts = _merged(exchange.send_back(grads_UC, round_, layout), round_.received, layout)
        ids, grads = tuple(i for i, _ in parts), tuple(g for _, g in parts)
        count = jnp.stack([(i < s.rows).sum() for i, s in zip(ids, layout, strict=True)])
        return ids, grads, _norm_sq(grads), count

      ids, grads, norm_sq, count = sums(main)
      add = lambda total, round_: jax.tree.map(jnp.add, total, sums(round_)[2:])
      total, more = exchange.in_further_rounds(add, (norm_sq, count), wants, layout)
      norm_sq, count = lax.psum(total, self.mesh.axis_names)
      return Summed(ids, grads, norm_sq, tuple(count), 1 + more)

    kept = _Kept(self._each, _NONE, self._each)
    out = Summed(self._each, self._each, _NONE, _NONE, _NONE)
    return self._map(run, (kept, self._each), out)(fetched.way_back, grads)

  def update(
    self,
    fetched: Fetched,
    grads: Arrays,
    summed: Summed,
    tables: Arrays,
    states: tuple,
    scale: jax.Array,
    ok: jax.Array,
  ) -> tuple[Arrays, tuple]:
    """The main round's sums are at hand; those of further rounds travel again, one at a time."""
    layout = self._layout_of(tables, fetched)

    def run(kept, grads_UC, ids, sums, owned, scale, ok):
      wants, _ = _again(kept, layout)
      old_scalars = owned[1]
      owned = self._step(owned, ids, sums, scale, ok, layout)
      new_scalars = owned[1]

      def further(owned: tuple, round_: Round) -> tuple:
        parts = _merged(exchange.send_back(grads_UC, round_, layout), round_.received, layout)
        ids, sums = tuple(i for i, _ in parts), tuple(g for _, g in parts)
        owned = (owned[0], _with_scalars(owned[1], old_scalars))  # still the same step
        tables, states = self._step(owned, ids, sums, scale, ok, layout)
        return tables, _with_scalars(states, new_scalars)

      return exchange.in_further_rounds(further, owned, wants, layout)[0]

    owned = self._owned_specs(tables, states)
    kept = _Kept(self._each, _NONE, self._each)
    each = self._each
    run = self._map(run, (kept, each, each, each, owned, _NONE, _NONE), owned)
    return run(fetched.way_back, grads, summed.ids_U, summed.grads_UC, (tables, states), scale, ok)

  def flush(self, tables: Arrays, states: tuple) -> tuple[Arrays, tuple]:
    """Every row brought up to date, each device its own."""

    def run(tables: Arrays, states: tuple) -> tuple[Arrays, tuple]:
      at = lax.axis_index(self.mesh.axis_names)
      new = [
        self.optimizer.flush(t, s, first_row=at * t.shape[0])
        for t, s in zip(tables, states, strict=True)
      ]
      return tuple(t for t, _ in new), tuple(s for _, s in new)

    owned = self._owned_specs(tables, states)
    return self._map(run, owned, owned)(tables, states)

  def _step(self, owned, ids, sums, scale, ok, layout):
    tables, states = [], []
    for t, state, i, g, s in zip(*owned, ids, sums, layout, strict=True):
      first = lax.axis_index(s.axes) * s.rows
      options = {"first_row": first, "axes": s.axes}
      table, state = self.optimizer.update(scale * g, state, t, i, ok, **options)
      tables.append(table)
      states.append(state)
    return tuple(tables), tuple(states)

  def _prepared(self, owned: tuple, received: list[jax.Array], layout: list[Shards]) -> tuple:
    if not self.optimizer.lags:
      return owned
    new = [
      self.optimizer.prepare(
        t, state, exchange.merged(r, s).ids_U, first_row=lax.axis_index(s.axes) * s.rows
      )
      for t, state, r, s in zip(*owned, received, layout, strict=True)
    ]
    return tuple(t for t, _ in new), tuple(state for _, state in new)

  @property
  def _each(self) -> PartitionSpec:
    """Every device its own part, along the leading axis."""
    return PartitionSpec(self.mesh.axis_names)

  def _owned_specs(self, tables: Arrays, states: tuple) -> tuple:
    per_row = lambda x: self._each if x.ndim else _NONE
    return jax.tree.map(per_row, (tables, states))

  def _map(self, run: Callable, ins: Any, outs: Any) -> Callable:
    return jax.shard_map(run, mesh=self.mesh, in_specs=ins, out_specs=outs, check_vma=False)

  def _layout(self, tables: Arrays, ids: int) -> list[Shards]:
    D, axes = self.mesh.size, self.mesh.axis_names
    return [exchange.shards(axes, D, t.shape[0] // D, ids, self.capacity) for t in tables]

  def _layout_of(self, tables: Arrays, fetched: Fetched) -> list[Shards]:
    return self._layout(tables, fetched.inverses[0].size // self.mesh.size)


def _again(kept: _Kept, layout: Sequence[Shards]) -> tuple[list[Wanted], Round]:
  """What `fetch` knew, without the ids travelling again."""
  wants = [
    Wanted(ids, ids[:0], ids.size, main_D)
    for ids, main_D in zip(kept.ids_U, kept.main_D, strict=True)
  ]
  return wants, exchange.ask(wants, layout, kept.received)


def _merged(
  grads: Sequence[jax.Array], received: Sequence[jax.Array], layout: Sequence[Shards]
) -> list[tuple[jax.Array, jax.Array]]:
  """(rows [S], their summed gradients [S, C], float32) of each table's [D, S, C] that arrived."""
  parts = []
  for g, r, s in zip(grads, received, layout, strict=True):
    unique = exchange.merged(r, s)
    sums = jnp.zeros((unique.ids_U.size, g.shape[-1]), jnp.float32)
    sums = sums.at[unique.inverse].add(g.astype(jnp.float32), mode="promise_in_bounds")
    parts.append((unique.ids_U, sums))
  return parts


def _with_scalars(states: Any, other: Any) -> Any:
  """`states` with the scalars of `other`: counts of steps, which a round of its own is not."""
  return jax.tree.map(lambda x, y: x if x.ndim else y, states, other)


def _norm_sq(grads: Sequence[jax.Array]) -> jax.Array:
  return sum((jnp.sum(jnp.square(g.astype(jnp.float32))) for g in grads), jnp.float32(0))
