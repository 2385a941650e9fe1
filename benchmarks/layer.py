"""One Engram layer against its own matmuls, with touched-row and with dense table gradients.

    python benchmarks/layer.py [--json]

Three questions, answered in one run: how far the layer is from the time of its matmuls alone (one
fused projection; two more dots backward), whether its time depends on the size of the table, and
what a gradient as large as the table would cost instead. All candidates take turns, so that a busy
machine slows each alike; medians are reported.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import jax
from flax import nnx

from engram_jax.config import EngramConfig
from engram_jax.memory.dedup import dedup, expand, gather_rows
from engram_jax.memory.engram import Engram
from engram_jax.memory.table import init_table, lookup

WIDTH, BRANCHES, COLUMNS, ROW_WIDTH = 1024, 4, 16, 64
TABLE_SIZES = (1, 4, 16)


def main() -> None:
  args = parse_args()
  measured = medians(candidates(args), args.repeats)
  report = {
    "device": jax.devices()[0].device_kind,
    "tokens": args.batch * args.length,
    "rows": args.rows,
    "milliseconds": measured,
    "over_matmuls": {name: ms / measured[matmuls_of(name)] for name, ms in measured.items()},
  }
  print_table(report)
  if args.json:
    print(json.dumps(report))


def parse_args() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument("--length", type=int, default=2048)
  parser.add_argument("--rows", type=int, default=100_000, help="of the smallest table")
  parser.add_argument("--repeats", type=int, default=15)
  return parser.parse_args()


def candidates(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
  """Callables to time, by name; every callable dispatches one compiled computation."""
  cfg = EngramConfig(heads=COLUMNS // 2, max_ngram=3, row_width=ROW_WIDTH)
  graphdef, params = nnx.split(Engram(cfg, WIDTH, BRANCHES, rngs=nnx.Rngs(0)))
  # A convolution that is not zero, as in the middle of a run.
  params = jax.tree.map(lambda x: x + 0.02 * normal(1, x.shape), params)
  hidden = normal(2, (args.batch, args.length, BRANCHES, WIDTH))
  ddelta = normal(3, hidden.shape)

  def layer(params, hidden, rows):
    rows = rows.reshape(*hidden.shape[:2], cfg.memory_width)
    return nnx.merge(graphdef, params)(hidden, rows)[0]

  @jax.jit
  def forward(params, hidden, table, ids):
    return layer(params, hidden, lookup(table, ids))

  @jax.jit
  def touched(params, hidden, table, ids, ddelta):
    unique = dedup(ids, table.shape[0])
    call = lambda params, hidden, rows: layer(params, hidden, expand(rows, unique.inverse))
    delta, transpose = jax.vjp(call, params, hidden, gather_rows(table, unique.ids_U))
    return delta, transpose(ddelta), unique.ids_U

  @jax.jit
  def dense(params, hidden, table, ids, ddelta):
    delta, transpose = jax.vjp(lambda *a: layer(*a[:2], lookup(a[2], ids)), params, hidden, table)
    return delta, transpose(ddelta)

  timed = matmuls(args)
  for times in TABLE_SIZES:
    rows = times * args.rows
    table = init_table(jax.random.key(4), rows, ROW_WIDTH, std=0.02)
    ids = jax.random.randint(jax.random.key(5), (*hidden.shape[:2], COLUMNS), 0, rows)
    inputs = (params, hidden, table, ids)
    timed[f"layer forward, {times}x"] = lambda inputs=inputs: forward(*inputs)
    timed[f"layer forward+backward, {times}x"] = lambda inputs=inputs: touched(*inputs, ddelta)
    timed[f"dense forward+backward, {times}x"] = lambda inputs=inputs: dense(*inputs, ddelta)
  return timed


def matmuls(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
  """The dots of the layer, at its shapes, and nothing else."""
  x = normal(6, (args.batch * args.length, COLUMNS * ROW_WIDTH))
  w = normal(7, (COLUMNS * ROW_WIDTH, (BRANCHES + 1) * WIDTH))
  dy = normal(8, (x.shape[0], w.shape[1]))
  forward = jax.jit(lambda x, w: x @ w)
  backward = jax.jit(lambda x, w, dy: (x @ w, dy @ w.T, x.T @ dy))
  return {
    "matmuls forward": lambda: forward(x, w),
    "matmuls forward+backward": lambda: backward(x, w, dy),
  }


def matmuls_of(name: str) -> str:
  return "matmuls forward+backward" if "backward" in name else "matmuls forward"


def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape)


def medians(timed: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
  """Median milliseconds of each, measured in turns; the first turn compiles and is not counted.

  Each turn starts with another one, so that none always follows the same neighbour.
  """
  order = list(timed.items())
  seconds = {name: [] for name in timed}
  for turn in range(repeats + 1):
    first = turn % len(order)
    for name, run in order[first:] + order[:first]:
      start = time.perf_counter()
      jax.block_until_ready(run())
      if turn:
        seconds[name].append(time.perf_counter() - start)
  return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def print_table(report: dict) -> None:
  tokens = report["tokens"]
  print(
    f"width {WIDTH}, {BRANCHES} branches, {COLUMNS} columns x {ROW_WIDTH}, {tokens} tokens, f32,"
    f" tables of 1x = {report['rows']:,} rows, on {report['device']}",
    file=sys.stderr,
  )
  print(f"{'':32}{'ms':>9}{'us/token':>10}{'x matmuls':>11}", file=sys.stderr)
  for name, ms in report["milliseconds"].items():
    over = report["over_matmuls"][name]
    print(f"{name:32}{ms:9.1f}{1e3 * ms / tokens:10.1f}{over:11.2f}", file=sys.stderr)


if __name__ == "__main__":
  main()
