"""Rows over a mesh: ids go to the devices that own the rows, rows come back, nothing is dropped.

A table's rows lie on D devices, r on each. Everything here is one device's part and runs inside
`shard_map`; what travels does so by all-to-all over all axes of the mesh, flattened:

    wants = [wanted(ids_n, s)]                my distinct ids: those of one owner lie together
    main  = ask(wants, [s])                   ids -> owners
    rows  = fetch(read, (), wants, main, ...) rows -> me, [U, C]
    send_back(grads_UC, main, [s])            summed gradients of my rows -> owners

The shapes of an all-to-all are fixed: the main round carries at most `slots` ids between any two
devices. Ids above that travel in further, smaller rounds, as many as the fullest pair needs, the
same number on every device: they are counted on the devices, so the host is never asked.

A round serves a range of each owner's rows, not a share of each wish list. Two devices that want
one row then send its gradients in the same round, so an owner sees a row's whole gradient at once,
which is what an optimizer must have, and never stores more than a round's gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from engram_jax.memory.unique import FILL, UniqueRows, unique_rows

SPARE = 16  # a further round has 1 / SPARE of the slots, but at least 8


class Shards(NamedTuple):
  """Static: how one table lies on the mesh, and how much a round carries.

  axes: of the mesh, all of them. devices: D. rows: r, on each device. slots, spare: ids between two
  devices in the main round and in a further one; spare is 0 where the main round carries all.
  """

  axes: tuple[str, ...]
  devices: int
  rows: int
  slots: int
  spare: int


def shards(axes: Sequence[str], devices: int, rows: int, ids: int, capacity: float) -> Shards:
  """The exchange of a table with `rows` rows on each device, for `ids` row ids on each device.

  capacity: rows that the main round carries, over the ids: 1.25 leaves room for hashed ids that are
  nearly all distinct, less saves bytes where many repeat. It changes how long a lookup takes, never
  what it gives.
  """
  most = min(ids, rows)  # distinct ids that one device can want of another
  slots = min(most, -(-int(capacity * ids + 1) // devices) + 8)
  spare = 0 if slots == most else min(max(slots // SPARE, 8), slots)
  return Shards(tuple(axes), devices, rows, slots, spare)


class Wanted(NamedTuple):
  """One device's distinct ids of one table.

  ids_U: int32, rising, then FILL. inverse: places in ids_U, shaped as the ids. count: distinct ids.
  main, width: rows of each owner that the main round serves, and those of each further round.
  """

  ids_U: jax.Array
  inverse: jax.Array
  count: jax.Array
  main: jax.Array
  width: jax.Array


def wanted(row_ids: jax.Array, s: Shards) -> Wanted:
  """The distinct ids of this device. Ids outside the table count as FILL; their rows are NaN."""
  total = s.devices * s.rows
  inside = (row_ids >= 0) & (row_ids.astype(jnp.uint32) < total)
  unique = unique_rows(jnp.where(inside, row_ids, FILL), total + 1)
  main, width = _range(unique.ids_U, s, s.slots), jnp.uint32(1)
  if s.spare:
    width = _range(unique.ids_U, s, s.spare)
  return Wanted(unique.ids_U, unique.inverse, unique.count, main, width)


def _range(ids_U: jax.Array, s: Shards, slots: int) -> jax.Array:
  """The largest power of two w such that no device wants more than `slots` of the rows w k to
  w k + w - 1 of any owner, for any k. At w = slots, or the power of two below it, none can."""
  most = 1 << (s.rows - 1).bit_length()
  if slots == min(ids_U.size, s.rows):
    return jnp.uint32(most)
  owner_U, local_U = _address(ids_U, s)
  place_U = jnp.arange(ids_U.size, dtype=jnp.int32)
  valid_U = ids_U != FILL

  def crowded(shift: jax.Array) -> jax.Array:
    part_U = local_U >> shift
    is_new = (part_U[1:] != part_U[:-1]) | (owner_U[1:] != owner_U[:-1])
    start_U = jnp.where(jnp.append(True, is_new), place_U, 0)
    length_U = place_U - lax.cummax(start_U) + 1
    return jnp.max(jnp.where(valid_U, length_U, 0)) > slots

  first = jnp.uint32(most.bit_length() - 1)
  shift = lax.while_loop(crowded, lambda shift: shift - 1, first)
  return jnp.uint32(1) << lax.pmin(shift, s.axes)


def _address(ids_U: jax.Array, s: Shards) -> tuple[jax.Array, jax.Array]:
  """Owner and row there. uint32: the last row's id may be the largest int32."""
  ids_U = ids_U.astype(jnp.uint32)
  return ids_U // jnp.uint32(s.rows), ids_U % jnp.uint32(s.rows)


class _Slots(NamedTuple):
  """What one device asks in one round: rows_DS int32 of each owner, `s.rows` where a slot is empty;
  place_DS in ids_U, past its end where empty; start_D and the range [low, high)."""

  rows_DS: jax.Array
  place_DS: jax.Array
  start_D: jax.Array
  low: jax.Array
  high: jax.Array


def _slots(wants: Wanted, s: Shards, low: jax.Array, high: jax.Array, slots: int) -> _Slots:
  high = jnp.minimum(high, jnp.uint32(s.rows))
  low = jnp.minimum(low, high)
  first_D = jnp.arange(s.devices, dtype=jnp.uint32) * jnp.uint32(s.rows)
  ids_U = wants.ids_U.astype(jnp.uint32)
  ends = jnp.searchsorted(ids_U, jnp.concatenate([first_D + low, first_D + high]))
  start_D, stop_D = ends[: s.devices].astype(jnp.int32), ends[s.devices :].astype(jnp.int32)
  place_DS = start_D[:, None] + jnp.arange(slots, dtype=jnp.int32)
  place_DS = jnp.where(place_DS < stop_D[:, None], place_DS, ids_U.size)
  rows_DS = ids_U.at[place_DS].get(mode="fill", fill_value=0) - first_D[:, None]
  rows_DS = jnp.where(place_DS < ids_U.size, rows_DS.astype(jnp.int32), s.rows)
  return _Slots(rows_DS, place_DS, start_D, low, high)


class Round(NamedTuple):
  """What this device asks of each table in one round, and the rows [D, S] that are asked of it
  (its row count where a slot is empty)."""

  asked: list[_Slots]
  received: list[jax.Array]


def ask(
  wants: Sequence[Wanted], layout: Sequence[Shards], received: Sequence[jax.Array] | None = None
) -> Round:
  """The main round's ids travel to their owners; or have done so, where `received` is given."""
  start = jnp.uint32(0)
  asked = [_slots(w, s, start, w.main, s.slots) for w, s in zip(wants, layout, strict=True)]
  if received is None:
    received = _spread([a.rows_DS for a in asked], layout)
  return Round(asked, list(received))


def further_rounds(wants: Sequence[Wanted], layout: Sequence[Shards]) -> jax.Array:
  """How many rounds follow the main one: int32, the same on every device."""
  left = [
    (s.rows - jnp.minimum(w.main, s.rows) + w.width - 1) // w.width
    for w, s in zip(wants, layout, strict=True)
  ]
  return jnp.max(jnp.stack(left)).astype(jnp.int32)


def in_further_rounds(
  body: Callable[[Any, Round], Any],
  carry: Any,
  wants: Sequence[Wanted],
  layout: Sequence[Shards],
) -> Any:
  """`carry = body(carry, round)` for each further round; no code where the main one carries all."""
  if not any(s.spare for s in layout):
    return carry
  rounds = further_rounds(wants, layout)

  def step(at: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
    k, carry = at
    asked = []
    for w, s in zip(wants, layout, strict=True):
      low = w.main + k.astype(jnp.uint32) * w.width
      asked.append(_slots(w, s, low, low + w.width, max(s.spare, 1)))
    return k + 1, body(carry, Round(asked, _spread([a.rows_DS for a in asked], layout)))

  return lax.while_loop(lambda at: at[0] < rounds, step, (jnp.int32(0), carry))[1]


def fetch(
  read: Callable[[Any, list[jax.Array]], tuple[Any, list[jax.Array]]],
  carry: Any,
  wants: Sequence[Wanted],
  main: Round,
  layout: Sequence[Shards],
  like: jax.ShapeDtypeStruct,
) -> tuple[Any, list[jax.Array]]:
  """(carry, rows [U, C] of each table that this device wants, at the places of `ids_U`).

  One exchange serves all tables. `carry, rows = read(carry, ids)` is called once a round, with the
  rows [D, S] asked of this device for each table, and gives their values [D, S, C].

  like: width C and dtype of what `read` gives, the same for all tables.
  """
  nothing = [jnp.full((w.ids_U.size, *like.shape), jnp.nan, like.dtype) for w in wants]

  def body(at: tuple[Any, list[jax.Array]], round_: Round) -> tuple[Any, list[jax.Array]]:
    carry, rows_UC = at
    carry, found = read(carry, round_.received)
    back = _spread(found, layout)
    placed = zip(rows_UC, back, round_.asked, wants, layout, strict=True)
    return carry, [_placed(*one) for one in placed]

  return in_further_rounds(body, body((carry, nothing), main), wants, layout)


def send_back(
  grads_UC: Sequence[jax.Array], round_: Round, layout: Sequence[Shards]
) -> list[jax.Array]:
  """The gradients [D, S, C] of the rows `round_.received`; empty slots bring zeros.

  No row is in two rounds. In one, a row is there once for each device that wanted it.
  """
  sent = [
    g.at[a.place_DS].get(mode="fill", fill_value=0)
    for g, a in zip(grads_UC, round_.asked, strict=True)
  ]
  return _spread(sent, layout)


def merged(received_DS: jax.Array, s: Shards) -> UniqueRows:
  """The distinct rows asked of this device, rising, then at least one outside the shard."""
  return unique_rows(received_DS, s.rows + 1)


def _spread(parts: Sequence[jax.Array], layout: Sequence[Shards]) -> list[jax.Array]:
  """Part d of each array to device d; the arrays [D, S, ...] travel as one."""
  sizes = [part.shape[1] for part in parts]
  joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
  got = lax.all_to_all(joined, layout[0].axes, split_axis=0, concat_axis=0, tiled=True)
  return jnp.split(got, [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)], axis=1)


def _placed(
  rows_UC: jax.Array, back_DSC: jax.Array, asked: _Slots, w: Wanted, s: Shards
) -> jax.Array:
  """`rows_UC` with this round's rows in their places; by gather, which writes each row once."""
  owner_U, local_U = _address(w.ids_U, s)
  served_U = (w.ids_U != FILL) & (local_U >= asked.low) & (local_U < asked.high)
  owner_U = jnp.minimum(owner_U, s.devices - 1).astype(jnp.int32)
  slot_U = jnp.arange(w.ids_U.size, dtype=jnp.int32) - asked.start_D[owner_U]
  slots, C = back_DSC.shape[1:]
  at_U = jnp.where(served_U, owner_U * slots + slot_U, 0)
  return jnp.where(served_U[:, None], back_DSC.reshape(-1, C)[at_U], rows_UC)
