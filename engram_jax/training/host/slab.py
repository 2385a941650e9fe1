"""A batch's distinct rows as a small table of their own: what the device sees of a host's table.

A slab has the U = min(ids, R) rows that `unique_rows` would give, in the same order, so the step
on it is the step on the whole table, sum for sum: only where rows are read from and written to
differs. Places in the slab stand for row ids.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.memory.dedup import FILL, take_rows
from engram_jax.memory.table import draw_rows
from engram_jax.training.rows.form import TouchedRows
from engram_jax.training.state import Recipe, TrainState
from engram_jax.training.step import Batch, train_step
from engram_jax.training.touched import Arrays, Fetched, LocalRows, Summed


class SlabRows(NamedTuple):
  """`LocalRows` on slabs. ids: int32 [U] of each, the row ids that its places stand for."""

  optimizer: TouchedRows
  ids: Arrays

  def fetch(self, slabs: Arrays, states: tuple, places_LBTJ: jax.Array) -> tuple:
    """(Fetched, slabs, states), as `LocalRows.fetch` of tables."""
    counts = [places.max() + 1 for places in places_LBTJ]
    own = [
      jnp.where(jnp.arange(len(s)) < n, jnp.arange(len(s)), FILL).astype(jnp.int32)
      for s, n in zip(slabs, counts, strict=True)
    ]
    ready = [
      self.optimizer.prepare(t, s, i, first_row=first)
      for t, s, i, first in zip(slabs, states, own, self._first_rows(), strict=True)
    ]
    slabs, states = tuple(t for t, _ in ready), tuple(s for _, s in ready)
    rows = tuple(take_rows(t, i) for t, i in zip(slabs, own, strict=True))
    way_back = tuple(zip(own, counts, strict=True))
    return Fetched(rows, tuple(places_LBTJ), way_back), slabs, states

  def collect(self, slabs: Arrays, fetched: Fetched, grads: Arrays) -> Summed:
    """Gradients by distinct row are the sums already."""
    return LocalRows(self.optimizer).collect(slabs, fetched, grads)

  def update(
    self,
    fetched: Fetched,
    grads: Arrays,
    summed: Summed,
    slabs: Arrays,
    states: tuple,
    scale: jax.Array,
    ok: jax.Array,
  ) -> tuple[Arrays, tuple]:
    """One step of the optimizer on `scale` times the gradients, unless not `ok`."""
    del fetched, grads
    new = [
      self.optimizer.update(scale * g, s, t, i, ok, first_row=first)
      for g, s, t, i, first in zip(
        summed.grads_UC, states, slabs, summed.ids_U, self._first_rows(), strict=True
      )
    ]
    return tuple(t for t, _ in new), tuple(s for _, s in new)

  def _first_rows(self) -> list[jax.Array]:
    """What to add to a place for its row id, by which bfloat16's noise goes: one number a place."""
    return [i.astype(jnp.uint32) - jnp.arange(i.size, dtype=jnp.uint32) for i in self.ids]


def make_slab_step(recipe: Recipe) -> Callable[[TrainState, Batch, Arrays], tuple]:
  """`step(state, batch, ids) -> (state, metrics)` where the state's tables are slabs.

  batch: as ever, but row_ids are places. ids: int32 [U] of each slab. The state is donated.
  """

  def step(state: TrainState, batch: Batch, ids: Arrays) -> tuple[TrainState, dict]:
    rows = SlabRows(recipe.rows.optimizer, ids)
    return train_step(recipe._replace(rows=rows, placements=None))(state, batch)

  return jax.jit(step, donate_argnums=0)


class Fresh(NamedTuple):
  """Rows that nothing has written yet. places: int32 [F] in the slab, past its end to fill up.
  ids: int32 [F]."""

  places: Any
  ids: Any


draw = jax.jit(draw_rows, static_argnames=("rows", "width", "std", "dtype"))


@functools.partial(jax.jit, static_argnames=("rows", "std"))
def draw_fresh(rows_UC: jax.Array, key: jax.Array, fresh: Fresh, *, rows: int, std: float):
  """The rows with the fresh ones as `init_table` makes them."""
  drawn = draw_rows(key, fresh.ids, rows, rows_UC.shape[1], std=std, dtype=rows_UC.dtype)
  return rows_UC.at[fresh.places].set(drawn, mode="drop")


@functools.partial(jax.jit, static_argnames="size")
def make_slab(came: Arrays, source_u: Any, before: Arrays | None, *, size: int) -> Arrays:
  """Leaves [U, ...] of what came from the host, [u, ...] with u <= U = size, and zeros.

  source_u: int32, for each row its place in the leaves `before` of the slab of the step before,
  which are newer than what the host had; negative where it has none.
  """

  def one(came: jax.Array, before: jax.Array | None) -> jax.Array:
    if before is not None:
      newer = source_u.reshape(-1, *(1,) * (came.ndim - 1)) >= 0
      came = jnp.where(newer, before.at[source_u].get(mode="clip"), came)
    return jnp.pad(came, [(0, size - len(came))] + [(0, 0)] * (came.ndim - 1))

  return tuple(one(x, y) for x, y in zip(came, before or (None,) * len(came), strict=True))


@functools.partial(jax.jit, static_argnames="size")
def first_rows(leaves: Arrays, *, size: int) -> Arrays:
  """The leading `size` rows, as copies: the slab's own may be used up by another program."""
  return tuple(jnp.copy(x[:size]) for x in leaves)
