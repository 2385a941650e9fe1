"""Does a step's cost grow with the table? Touched rows against a dense table gradient and Adam.

    python benchmarks/table_growth.py [--json] [--rows 100000 1000000 10000000]

One step of a table alone: distinct ids, gather, a gradient for each row, touched-row Adam in place;
beside it the table's gradient as large as the table, through `optax.adam`. Each size runs in a
process of its own, whose peak memory is read at its end; dense sizes above --dense-limit rows are
left out.

`memory_over_table_and_state` is the growth of a process's peak over its peak before there was a
table, divided by the bytes of the table and its optimizer's state.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

WIDTH, TOKENS, COLUMNS = 64, 2048, 16


def main() -> None:
  args = parse_args()
  if args.one:
    print(json.dumps(measure(*args.one, args.repeats)))
    return
  sizes = [(kind, rows) for rows in args.rows for kind in ("touched", "dense")]
  sizes = [(kind, rows) for kind, rows in sizes if kind == "touched" or rows <= args.dense_limit]
  found = [apart(kind, rows, args.repeats) for kind, rows in sizes]
  touched = [one for one in found if one["kind"] == "touched"]
  report = {
    "width": WIDTH,
    "ids": TOKENS * COLUMNS,
    "steps": found,
    "time_largest_over_smallest": touched[-1]["milliseconds"] / touched[0]["milliseconds"],
    "memory_over_table_and_state": touched[-1]["memory_over_table_and_state"],
  }
  show(report)
  if args.json:
    print(json.dumps(report))


def parse_args() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
  parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
  parser.add_argument("--dense-limit", type=int, default=4_000_000)
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
  return parser.parse_args()


def apart(kind: str, rows: int, repeats: int) -> dict:
  """`measure` in a new process, so that the peak is this size's."""
  command = [sys.executable, __file__, "--one", kind, str(rows), "--repeats", str(repeats)]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    raise SystemExit(f"{kind}, {rows:,} rows: {done.stderr[-2000:]}")
  return json.loads(done.stdout)


def measure(kind: str, rows: str, repeats: int) -> dict:
  """Median time of a step, and what the process held at its peak."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from engram_jax.memory.dedup import dedup, expand, gather_rows
  from engram_jax.memory.table import init_table, lookup
  from engram_jax.tables.optimizers.adam import adam

  rows = int(rows)
  ids = np.random.default_rng(0).integers(0, rows, (repeats + 3, TOKENS, COLUMNS), np.int32)
  jax.block_until_ready(jnp.zeros(8) + 1)
  before = peak_bytes()
  optimizer = adam(1e-3) if kind == "touched" else optax.adam(1e-3)

  def touched(table, state, ids):
    unique = dedup(ids, table.shape[0])
    rows_UC = gather_rows(table, unique.ids_U)
    grads_UC = jax.grad(lambda r: jnp.sum(expand(r, unique.inverse) ** 2))(rows_UC)
    return optimizer.update(grads_UC, state, table, unique.ids_U)

  def dense(table, state, ids):
    grads = jax.grad(lambda t: jnp.sum(lookup(t, ids) ** 2))(table)
    updates, state = optimizer.update(grads, state, table)
    return optax.apply_updates(table, updates), state

  step = jax.jit(touched if kind == "touched" else dense, donate_argnums=(0, 1))
  table = init_table(jax.random.key(0), rows, WIDTH, std=0.02)
  state = jax.jit(optimizer.init)(table)
  held = table.nbytes + sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  seconds = []
  for batch in ids:
    start = time.perf_counter()
    table, state = jax.block_until_ready(step(table, state, batch))
    seconds.append(time.perf_counter() - start)
  return {
    "kind": kind,
    "rows": rows,
    "milliseconds": 1e3 * statistics.median(seconds[3:]),
    "table_and_state_bytes": held,
    "memory_over_table_and_state": (peak_bytes() - before) / held,
  }


def peak_bytes() -> int:
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def show(report: dict) -> None:
  print(
    f"{'step':10}{'rows':>12}{'ms':>9}{'table + state':>15}{'peak over it':>14}", file=sys.stderr
  )
  for one in report["steps"]:
    print(
      f"{one['kind']:10}{one['rows']:12,}{one['milliseconds']:9.1f}"
      f"{one['table_and_state_bytes'] / 2**20:11.0f} MiB{one['memory_over_table_and_state']:14.2f}",
      file=sys.stderr,
    )


if __name__ == "__main__":
  main()
