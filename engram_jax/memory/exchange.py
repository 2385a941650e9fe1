"""Rows over a mesh: ids go to the devices that own the rows, rows come back, nothing is dropped.

A table's rows lie on P devices, r on each. Everything here is one device's part and runs inside
`shard_map`; what travels does so by all-to-all over all axes of the mesh, flattened:

    requests = [make_requests(ids_n, p)]            my distinct ids: those of one owner lie together
    main = send_requests(requests, [p])             ids -> owners
    rows = fetch_rows(read, (), requests, main,...) rows -> me, [U, C]
    send_gradients(grads_UC, main, [p])             summed gradients of my rows -> owners

The shapes of an all-to-all are fixed: the main round carries at most `slots` ids between any two
devices. Ids above that travel in smaller overflow rounds, the same number on every device: the
devices agree on each by themselves, so the host is never asked.

A round serves a range of each owner's rows, not a share of each list of requests. Two devices that
want one row then send its gradients in the same round, so an owner sees a row's whole gradient at
once, which is what an optimizer must have, and never stores more than a round's gradients. A range
ends where the first device has no slot left for it, so that each round fills some device's slots:
how many rounds there are depends on how many ids are requested, not on where in the table they lie.

Local letters: P, devices; S, slots between two of them in a round; U, distinct ids of a device.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from engram_jax.memory.dedup import FILL, UniqueRows, dedup

OVERFLOW_SHARE = 16  # an overflow round has 1 / OVERFLOW_SHARE of the slots, but at least 8


class Partition(NamedTuple):
  """Static: how one table is divided over the mesh, and how much a round carries.

  axes: of the mesh, all of them. devices: P. rows: r, on each device. slots, overflow_slots: ids
  between two devices in the main round and in an overflow round; overflow_slots is 0 where the main
  round carries all.
  """

  axes: tuple[str, ...]
  devices: int
  rows: int
  slots: int
  overflow_slots: int


def make_partition(
  axes: Sequence[str], devices: int, rows: int, ids: int, capacity: float
) -> Partition:
  """The partition of a table with `rows` rows on each device, for `ids` row ids on each device.

  capacity: rows that the main round carries, over the ids: 1.25 leaves room for hashed ids that are
  nearly all distinct, less saves bytes where many repeat. It changes how long a lookup takes, never
  what it gives.
  """
  most = min(ids, rows)  # distinct ids that one device can want of another
  slots = min(most, -(-int(capacity * ids + 1) // devices) + 8)
  overflow = 0 if slots == most else min(max(slots // OVERFLOW_SHARE, 8), slots)
  return Partition(tuple(axes), devices, rows, slots, overflow)


class Requests(NamedTuple):
  """One device's distinct ids of one table.

  ids_U: int32, rising, then FILL. inverse: positions in ids_U, shaped as the ids. count: int32,
  distinct ids. main_end_P: uint32, the first row of each owner that the main round does not serve.
  """

  ids_U: jax.Array
  inverse: jax.Array
  count: jax.Array
  main_end_P: jax.Array


def make_requests(row_ids: jax.Array, p: Partition) -> Requests:
  """The distinct ids of this device. Ids outside the table count as FILL; their rows are NaN."""
  total = p.devices * p.rows
  inside = (row_ids >= 0) & (row_ids.astype(jnp.uint32) < total)
  unique = dedup(jnp.where(inside, row_ids, FILL), total + 1)
  start_P = jnp.zeros(p.devices, jnp.uint32)
  if p.overflow_slots:
    end_P = _range_end(unique.ids_U, p, start_P, p.slots)
  else:
    end_P = start_P + jnp.uint32(p.rows)
  return Requests(unique.ids_U, unique.inverse, unique.count, end_P)


def _range_end(ids_U: jax.Array, p: Partition, low_P: jax.Array, slots: int) -> jax.Array:
  """The ends of the longest ranges from `low_P` on, one for each owner and the same on every
  device, of which no device wants more than `slots` rows."""
  start_P, stop_P = _positions(ids_U, p, low_P, jnp.full_like(low_P, p.rows))
  beyond_P = ids_U.astype(jnp.uint32).at[start_P + slots].get(mode="fill", fill_value=0)
  is_full_P = start_P + slots < stop_P
  end_P = jnp.where(is_full_P, beyond_P - _first_rows(p), jnp.uint32(p.rows))
  return lax.pmin(end_P, p.axes)


def _first_rows(p: Partition) -> jax.Array:
  """The first row of each owner, uint32 [P]."""
  return jnp.arange(p.devices, dtype=jnp.uint32) * jnp.uint32(p.rows)


def _positions(
  ids_U: jax.Array, p: Partition, low_P: jax.Array, high_P: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Positions in ids_U where the rows [low, high) of each owner begin and end, int32 [P] each."""
  first_P = _first_rows(p)
  edges = jnp.concatenate([first_P + low_P, first_P + high_P])
  ends = jnp.searchsorted(ids_U.astype(jnp.uint32), edges, method="compare_all").astype(jnp.int32)
  return ends[: p.devices], ends[p.devices :]


class _Sent(NamedTuple):
  """One device's requests of one round.

  rows_PS: int32 rows of each owner, `p.rows` in an empty slot. position_PS: int32 positions in
  ids_U, past its end in an empty slot. start_P: the first of them. low_P, high_P: uint32, the
  ranges of rows that the round serves.
  """

  rows_PS: jax.Array
  position_PS: jax.Array
  start_P: jax.Array
  low_P: jax.Array
  high_P: jax.Array


def _requests_in_range(
  ids_U: jax.Array, p: Partition, low_P: jax.Array, high_P: jax.Array, slots: int
) -> _Sent:
  start_P, stop_P = _positions(ids_U, p, low_P, high_P)
  position_PS = start_P[:, None] + jnp.arange(slots, dtype=jnp.int32)
  position_PS = jnp.where(position_PS < stop_P[:, None], position_PS, ids_U.size)
  rows_PS = ids_U.astype(jnp.uint32).at[position_PS].get(mode="fill", fill_value=0)
  rows_PS = (rows_PS - _first_rows(p)[:, None]).astype(jnp.int32)
  rows_PS = jnp.where(position_PS < ids_U.size, rows_PS, p.rows)
  return _Sent(rows_PS, position_PS, start_P, low_P, high_P)


class Round(NamedTuple):
  """One round's requests.

  sent: what this device requests of each table. received: int32 [P, S] of each, the rows that are
  requested of it; its row count where a slot is empty.
  """

  sent: list[_Sent]
  received: list[jax.Array]


def send_requests(
  requests: Sequence[Requests],
  partitions: Sequence[Partition],
  received: Sequence[jax.Array] | None = None,
) -> Round:
  """Sends the main round's ids to their owners; `received`: what came, where that was done before.

  This all-to-all carries row ids, int32 [P, S] of each table.
  """
  pairs = list(zip(requests, partitions, strict=True))
  sent = [
    _requests_in_range(r.ids_U, p, jnp.zeros_like(r.main_end_P), r.main_end_P, p.slots)
    for r, p in pairs
  ]
  if received is None:
    received = _all_to_all([s.rows_PS for s in sent], partitions)
  return Round(sent, list(received))


def overflow_rounds(
  body: Callable[[Any, Round], Any],
  carry: Any,
  requests: Sequence[Requests],
  partitions: Sequence[Partition],
) -> tuple[Any, jax.Array]:
  """Runs `carry = body(carry, round)` for each overflow round; returns carry and their number.

  The number is int32 and the same on every device. No code where the main round carries all.
  """
  if not any(p.overflow_slots for p in partitions):
    return carry, jnp.int32(0)

  def step(loop: tuple[jax.Array, list[jax.Array], Any]) -> tuple[jax.Array, list[jax.Array], Any]:
    k, low, carry = loop
    sent = []
    for r, p, low_P in zip(requests, partitions, low, strict=True):
      slots = max(p.overflow_slots, 1)
      end_P = _range_end(r.ids_U, p, low_P, slots)
      sent.append(_requests_in_range(r.ids_U, p, low_P, end_P, slots))
    carry = body(carry, Round(sent, _all_to_all([s.rows_PS for s in sent], partitions)))
    return k + 1, [s.high_P for s in sent], carry

  def is_left(loop: tuple[jax.Array, list[jax.Array], Any]) -> jax.Array:
    ends = [(low_P < p.rows).any() for low_P, p in zip(loop[1], partitions, strict=True)]
    return jnp.stack(ends).any()

  start = (jnp.int32(0), [r.main_end_P for r in requests], carry)
  rounds, _, carry = lax.while_loop(is_left, step, start)
  return carry, rounds


def fetch_rows(
  read: Callable[[Any, list[jax.Array]], tuple[Any, list[jax.Array]]],
  carry: Any,
  requests: Sequence[Requests],
  main: Round,
  partitions: Sequence[Partition],
  like: jax.ShapeDtypeStruct,
) -> tuple[Any, list[jax.Array]]:
  """Fetches the requested rows; returns carry and rows [U, C] of each table, ordered as `ids_U`.

  One exchange serves all tables. `carry, rows = read(carry, ids)` is called once a round, with the
  rows [P, S] requested of this device for each table, and gives their values [P, S, C].

  like: width C and dtype of what `read` gives, the same for all tables.
  """
  nothing = [jnp.full((r.ids_U.size, *like.shape), jnp.nan, like.dtype) for r in requests]

  def body(loop: tuple[Any, list[jax.Array]], round_: Round) -> tuple[Any, list[jax.Array]]:
    carry, rows_UC = loop
    carry, found = read(carry, round_.received)
    arrived = _all_to_all(found, partitions)
    args = zip(rows_UC, arrived, round_.sent, requests, partitions, strict=True)
    return carry, [_place_rows(*each) for each in args]

  return overflow_rounds(body, body((carry, nothing), main), requests, partitions)[0]


def send_gradients(
  grads_UC: Sequence[jax.Array], round_: Round, partitions: Sequence[Partition]
) -> list[jax.Array]:
  """The gradients [P, S, C] of the rows `round_.received`; empty slots bring zeros.

  No row is in two rounds. In one, a row is there once for each device that requested it.
  """
  outgoing = [
    g.at[s.position_PS].get(mode="fill", fill_value=0)
    for g, s in zip(grads_UC, round_.sent, strict=True)
  ]
  return _all_to_all(outgoing, partitions)


def merge_received(received_PS: jax.Array, p: Partition) -> UniqueRows:
  """The distinct rows requested of this device, rising, then at least one outside the shard."""
  return dedup(received_PS, p.rows + 1)


def _all_to_all(parts: Sequence[jax.Array], partitions: Sequence[Partition]) -> list[jax.Array]:
  """Sends part d of each array to device d; the arrays [P, S, ...] travel as one."""
  sizes = [part.shape[1] for part in parts]
  joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
  got = lax.all_to_all(joined, partitions[0].axes, split_axis=0, concat_axis=0, tiled=True)
  return jnp.split(got, [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)], axis=1)


def _place_rows(
  rows_UC: jax.Array, arrived_PSC: jax.Array, sent: _Sent, r: Requests, p: Partition
) -> jax.Array:
  """`rows_UC` with this round's rows in their places; by gather, which writes each row once."""
  ids_U = r.ids_U.astype(jnp.uint32)  # the last row's id may be the largest int32
  owner_U, local_U = ids_U // jnp.uint32(p.rows), ids_U % jnp.uint32(p.rows)
  owner_U = jnp.minimum(owner_U, p.devices - 1).astype(jnp.int32)
  is_served_U = (local_U >= sent.low_P[owner_U]) & (local_U < sent.high_P[owner_U])
  is_served_U = is_served_U & (r.ids_U != FILL)
  slot_U = jnp.arange(r.ids_U.size, dtype=jnp.int32) - sent.start_P[owner_U]
  slots, C = arrived_PSC.shape[1:]
  source_U = jnp.where(is_served_U, owner_U * slots + slot_U, 0)
  return jnp.where(is_served_U[:, None], arrived_PSC.reshape(-1, C)[source_U], rows_UC)
