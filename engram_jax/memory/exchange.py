"""Rows over a mesh: ids go to the devices that own the rows, rows come back, nothing is dropped.

A table's rows lie on D devices, r on each. Everything here is one device's part and runs inside
`shard_map`; what travels does so by all-to-all over all axes of the mesh, flattened:

    wants = [wanted(ids_n, s)]                my distinct ids: those of one owner lie together
    main  = ask(wants, [s])                   ids -> owners
    rows  = fetch(read, (), wants, main, ...) rows -> me, [U, C]
    send_back(grads_UC, main, [s])            summed gradients of my rows -> owners

The shapes of an all-to-all are fixed: the main round carries at most `slots` ids between any two
devices. Ids above that travel in further, smaller rounds, the same number on every device: the
devices agree on each by themselves, so the host is never asked.

A round serves a range of each owner's rows, not a share of each wish list. Two devices that want
one row then send its gradients in the same round, so an owner sees a row's whole gradient at once,
which is what an optimizer must have, and never stores more than a round's gradients. A range ends
where the first device has no slot left for it, so that each round fills some device's slots: how
many rounds there are depends on how many ids are wanted, not on where in the table they lie.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from engram_jax.memory.dedup import FILL, UniqueRows, unique_rows

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
  main_D: uint32, the first row of each owner that the main round does not serve.
  """

  ids_U: jax.Array
  inverse: jax.Array
  count: jax.Array
  main_D: jax.Array


def wanted(row_ids: jax.Array, s: Shards) -> Wanted:
  """The distinct ids of this device. Ids outside the table count as FILL; their rows are NaN."""
  total = s.devices * s.rows
  inside = (row_ids >= 0) & (row_ids.astype(jnp.uint32) < total)
  unique = unique_rows(jnp.where(inside, row_ids, FILL), total + 1)
  low_D = jnp.zeros(s.devices, jnp.uint32)
  main_D = _until(unique.ids_U, s, low_D, s.slots) if s.spare else low_D + jnp.uint32(s.rows)
  return Wanted(unique.ids_U, unique.inverse, unique.count, main_D)


def _until(ids_U: jax.Array, s: Shards, low_D: jax.Array, slots: int) -> jax.Array:
  """The ends of the longest ranges from `low_D` on, one for each owner and the same on every
  device, of which no device wants more than `slots` rows."""
  start_D, stop_D = _places(ids_U, s, low_D, jnp.full_like(low_D, s.rows))
  beyond_D = ids_U.astype(jnp.uint32).at[start_D + slots].get(mode="fill", fill_value=0)
  own_D = jnp.where(start_D + slots < stop_D, beyond_D - _first(s), jnp.uint32(s.rows))
  return lax.pmin(own_D, s.axes)


def _first(s: Shards) -> jax.Array:
  """The first row of each owner, uint32 [D]."""
  return jnp.arange(s.devices, dtype=jnp.uint32) * jnp.uint32(s.rows)


def _places(
  ids_U: jax.Array, s: Shards, low_D: jax.Array, high_D: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Where in ids_U the rows [low, high) of each owner begin and end, int32."""
  first_D = _first(s)
  edges = jnp.concatenate([first_D + low_D, first_D + high_D])
  ends = jnp.searchsorted(ids_U.astype(jnp.uint32), edges).astype(jnp.int32)
  return ends[: s.devices], ends[s.devices :]


def _address(ids_U: jax.Array, s: Shards) -> tuple[jax.Array, jax.Array]:
  """Owner and row there. uint32: the last row's id may be the largest int32."""
  ids_U = ids_U.astype(jnp.uint32)
  return ids_U // jnp.uint32(s.rows), ids_U % jnp.uint32(s.rows)


class _Slots(NamedTuple):
  """What one device asks in one round: rows_DS int32 of each owner, `s.rows` where a slot is empty;
  place_DS in ids_U, past its end where empty; start_D and the ranges [low_D, high_D)."""

  rows_DS: jax.Array
  place_DS: jax.Array
  start_D: jax.Array
  low_D: jax.Array
  high_D: jax.Array


def _slots(ids_U: jax.Array, s: Shards, low_D: jax.Array, high_D: jax.Array, slots: int) -> _Slots:
  start_D, stop_D = _places(ids_U, s, low_D, high_D)
  place_DS = start_D[:, None] + jnp.arange(slots, dtype=jnp.int32)
  place_DS = jnp.where(place_DS < stop_D[:, None], place_DS, ids_U.size)
  rows_DS = ids_U.astype(jnp.uint32).at[place_DS].get(mode="fill", fill_value=0)
  rows_DS = (rows_DS - _first(s)[:, None]).astype(jnp.int32)
  rows_DS = jnp.where(place_DS < ids_U.size, rows_DS, s.rows)
  return _Slots(rows_DS, place_DS, start_D, low_D, high_D)


class Round(NamedTuple):
  """What this device asks of each table in one round, and the rows [D, S] that are asked of it
  (its row count where a slot is empty)."""

  asked: list[_Slots]
  received: list[jax.Array]


def ask(
  wants: Sequence[Wanted], layout: Sequence[Shards], received: Sequence[jax.Array] | None = None
) -> Round:
  """The main round's ids travel to their owners; or have done so, where `received` is given."""
  pairs = list(zip(wants, layout, strict=True))
  asked = [_slots(w.ids_U, s, jnp.zeros_like(w.main_D), w.main_D, s.slots) for w, s in pairs]
  if received is None:
    received = _spread([a.rows_DS for a in asked], layout)
  return Round(asked, list(received))


def in_further_rounds(
  body: Callable[[Any, Round], Any],
  carry: Any,
  wants: Sequence[Wanted],
  layout: Sequence[Shards],
) -> tuple[Any, jax.Array]:
  """`carry = body(carry, round)` for each further round, and how many there were: int32, the same
  on every device. No code where the main round carries all."""
  if not any(s.spare for s in layout):
    return carry, jnp.int32(0)

  def step(at: tuple[jax.Array, list[jax.Array], Any]) -> tuple[jax.Array, list[jax.Array], Any]:
    k, low, carry = at
    asked = []
    for w, s, low_D in zip(wants, layout, low, strict=True):
      slots = max(s.spare, 1)
      asked.append(_slots(w.ids_U, s, low_D, _until(w.ids_U, s, low_D, slots), slots))
    carry = body(carry, Round(asked, _spread([a.rows_DS for a in asked], layout)))
    return k + 1, [a.high_D for a in asked], carry

  def left(at: tuple[jax.Array, list[jax.Array], Any]) -> jax.Array:
    ends = [(low_D < s.rows).any() for low_D, s in zip(at[1], layout, strict=True)]
    return jnp.stack(ends).any()

  start = (jnp.int32(0), [w.main_D for w in wants], carry)
  rounds, _, carry = lax.while_loop(left, step, start)
  return carry, rounds


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

  return in_further_rounds(body, body((carry, nothing), main), wants, layout)[0]


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
  owner_U = jnp.minimum(owner_U, s.devices - 1).astype(jnp.int32)
  served_U = (local_U >= asked.low_D[owner_U]) & (local_U < asked.high_D[owner_U])
  served_U = served_U & (w.ids_U != FILL)
  slot_U = jnp.arange(w.ids_U.size, dtype=jnp.int32) - asked.start_D[owner_U]
  slots, C = back_DSC.shape[1:]
  at_U = jnp.where(served_U, owner_U * slots + slot_U, 0)
  return jnp.where(served_U[:, None], back_DSC.reshape(-1, C)[at_U], rows_UC)
