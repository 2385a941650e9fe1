"""Lookup of a sharded table on eight simulated devices: our exchange against the partitioner.

    python benchmarks/lookup.py [--json]

Both sides have a table of 1M rows x 64, divided by rows over the devices, and 131,072 row ids,
divided by batch: uniform ids, and ids whose frequencies follow Zipf's law. Forward gives every
device the rows of its ids. Backward brings the gradients of these rows to their owners, added up
by row:

- exchange: what the train step does. Distinct ids and rows travel; no array is as large as the
  table.
- exchange, dense: `jax.grad` of `lookup(mesh=)`, which owes a gradient as large as the table.
- partitioner: `table[ids]` and its `jax.grad`, left to XLA.
- whole heads: every device owns whole columns and all ids travel to them, without looking for equal
  ones. It needs no sort, but a table laid out for this number of devices, and a column count that
  they divide.

Bytes are what one device puts into collectives, read from the compiled programs; the exchange's
further rounds, of which there is a number only at run time, are counted as often as they ran.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from engram_jax.aot.collectives import collectives
from engram_jax.core.mesh import make_mesh
from engram_jax.memory.table import lookup, table_sharding
from engram_jax.tables.optimizers.adam import adam
from engram_jax.tables.sharded import ShardedRows
from engram_jax.tables.state import expand_rows

DEVICES, COLUMNS = 8, 16
CAPACITY = {"uniform": 1.25, "zipf": 0.7}  # rows of an exchange over ids; what a run would measure


class Side(NamedTuple):
  """One program: what to call, and its bytes."""

  call: Callable[[], object]
  bytes: int


def main() -> None:
  args = parse_args()
  jax.config.update("jax_num_cpu_devices", DEVICES)
  streams = {name: measure(name, args) for name in ("uniform", "zipf")}
  worst = lambda key: min(stream[key] for stream in streams.values())
  report = {
    "rows": args.rows,
    "row_width": args.width,
    "ids": args.ids,
    "devices": DEVICES,
    "streams": streams,
    "speedup_forward": worst("speedup_forward"),
    "speedup_forward_backward": worst("speedup_forward_backward"),
    "bytes_ratio": worst("bytes_ratio"),
  }
  print_table(report)
  if args.json:
    print(json.dumps(report))


def parse_args() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
  parser.add_argument("--rows", type=int, default=1 << 20)
  parser.add_argument("--width", type=int, default=64)
  parser.add_argument("--ids", type=int, default=131_072)
  parser.add_argument("--repeats", type=int, default=7)
  return parser.parse_args()


def measure(name: str, args: argparse.Namespace) -> dict:
  """Medians of all sides, which take turns, and the ratios to the partitioner's."""
  mesh = make_mesh({"data": DEVICES})
  ids = stream(name, args)
  split = NamedSharding(mesh, PartitionSpec("data"))
  table = jax.device_put(normal(0, (args.rows, args.width)), table_sharding(mesh))
  ids_BTJ, drows = jax.device_put((ids, normal(1, (*ids.shape, args.width))), split)
  sides = programs(mesh, CAPACITY[name], table, ids_BTJ, drows)
  times = {side: [] for side in sides}
  for side in list(sides) * args.repeats:
    start = time.perf_counter()
    jax.block_until_ready(sides[side].call())
    times[side].append(time.perf_counter() - start)
  median = {side: 1e3 * statistics.median(seconds) for side, seconds in times.items()}
  sent = {side: program.bytes for side, program in sides.items()}
  both = median["exchange forward+backward"]
  return {
    "distinct_rows": len(np.unique(ids)),
    "milliseconds": median,
    "bytes": sent,
    "speedup_forward": median["partitioner forward"] / median["exchange forward"],
    "speedup_forward_backward": median["partitioner forward+backward"] / both,
    "bytes_ratio": sent["partitioner forward+backward"] / sent["exchange forward+backward"],
  }


def stream(name: str, args: argparse.Namespace) -> np.ndarray:
  """int32 [B, T, J] row ids; Zipf: the k-th most frequent row has a share of 1 / k."""
  random = np.random.default_rng(0)
  shape = (DEVICES, args.ids // DEVICES // COLUMNS, COLUMNS)
  if name == "uniform":
    return random.integers(0, args.rows, shape, dtype=np.int32)
  share = np.cumsum(1 / np.arange(1, args.rows + 1))
  rank = np.searchsorted(share, random.random(shape) * share[-1])
  return random.permutation(args.rows).astype(np.int32)[rank]


def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape)


def programs(mesh, capacity: float, table, ids, drows) -> dict[str, Side]:
  """Every side, compiled; each returns what the next computation would need and no more."""
  place = table_sharding(mesh)
  rows = ShardedRows(adam(0.1), mesh, table.shape[:1], capacity, jnp.float32)

  def fetch(table, ids):
    fetched, _, _ = rows.fetch((table,), (), (ids,))
    return fetched, lambda r: expand_rows(mesh, r, fetched.inverses[0])

  def exchange(table, ids):
    fetched, spread = fetch(table, ids)
    return spread(fetched.rows[0])

  def exchange_both(table, ids, drows):
    fetched, spread = fetch(table, ids)
    found, transpose = jax.vjp(spread, fetched.rows[0])
    summed = rows.reduce_grads(fetched, transpose(drows))
    return found, summed

  def dense_both(table, ids, drows):
    found, transpose = jax.vjp(lambda t: lookup(t, ids, mesh=mesh, capacity=capacity), table)
    return found, transpose(drows)

  def partitioner(table, ids):
    return table.at[ids].get(mode="promise_in_bounds")

  def partitioner_both(table, ids, drows):
    found, transpose = jax.vjp(lambda t: partitioner(t, ids), table)
    return found, lax.with_sharding_constraint(transpose(drows)[0], place)

  heads, heads_both = whole_heads(mesh, table.shape[0] // COLUMNS)
  split = ids.sharding
  forward = {"exchange": exchange, "partitioner": partitioner, "whole heads": heads}
  both = {
    "exchange": exchange_both,
    "exchange, dense": dense_both,
    "partitioner": partitioner_both,
    "whole heads": heads_both,
  }
  rounds = int(jax.jit(exchange_both)(table, ids, drows)[1].rounds)
  made = {
    f"{k} forward": compiled(jax.jit(f, out_shardings=split), rounds, table, ids)
    for k, f in forward.items()
  }
  return made | {
    f"{k} forward+backward": compiled(jax.jit(f), rounds, table, ids, drows)
    for k, f in both.items()
  }


def compiled(program, rounds: int, *args) -> Side:
  program = program.lower(*args).compile()
  moved = collectives(program.as_text())
  times = lambda c: c.count if c.is_exact else c.count * (rounds - 1)
  return Side(lambda: program(*args), sum(c.bytes * times(c) for c in moved))


def whole_heads(mesh, head_rows: int) -> tuple[Callable, Callable]:
  """Columns instead of rows divided: device d owns columns d J/D .. (d+1) J/D - 1, all their rows.

  The ids here are drawn over the whole table, so each column takes them modulo its own rows.
  """
  axes, D, own = mesh.axis_names, mesh.size, COLUMNS // mesh.size
  spec = PartitionSpec(axes)
  travel = lambda x: lax.all_to_all(x, axes, split_axis=0, concat_axis=0, tiled=True)

  def local_rows(ids_bTJ):
    by_owner = (ids_bTJ % head_rows).reshape(-1, D, own).swapaxes(0, 1)  # [D, S, own]
    return travel(by_owner) + head_rows * jnp.arange(own, dtype=jnp.int32)

  def run(table_rC, ids_bTJ):
    found = table_rC.at[local_rows(ids_bTJ)].get(mode="promise_in_bounds")
    return travel(found).swapaxes(0, 1).reshape(*ids_bTJ.shape, -1)

  def run_both(table_rC, ids_bTJ, drows):
    C = drows.shape[-1]
    sent = travel(drows.reshape(-1, D, own, C).swapaxes(0, 1))
    dtable = jnp.zeros_like(table_rC).at[local_rows(ids_bTJ)].add(sent, mode="promise_in_bounds")
    return run(table_rC, ids_bTJ), dtable

  mapped = lambda f: jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  return mapped(run), mapped(run_both)


def print_table(report: dict) -> None:
  for name, stream in report["streams"].items():
    print(f"{name}: {report['ids']:,} ids, {stream['distinct_rows']:,} distinct", file=sys.stderr)
    for side, ms in stream["milliseconds"].items():
      print(f"  {side:34} {ms:8.1f} ms {stream['bytes'][side] / 2**20:8.2f} MiB", file=sys.stderr)
  for key in ("speedup_forward", "speedup_forward_backward", "bytes_ratio"):
    print(f"{key} (the worse stream): {report[key]:.2f}", file=sys.stderr)


if __name__ == "__main__":
  main()
