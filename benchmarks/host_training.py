"""A training step with tables on the device, in host memory and in a file, in turns in one run.

    python benchmarks/host_training.py [--config FILE] [--set data.source=stdlib] [--json]
    python benchmarks/host_training.py --large 1e9 [--set model.layers=2 model.width=32] [--json]

The first measures seconds a step: medians over turns, in each of which each placement takes a few
steps on end on real text, the same for all. Rows of the next step are read during a step, as in
train.py, and a turn ends when all that it computed is written. `host_over_device` and
`file_over_device` are ratios of the medians; `equal_bits` says whether parameters, losses and rows
came out the same.

With --large steps are taken on random ids into one sparse file of that many rows, and what is
measured is this process's memory. With --json one object goes to stdout, the rest to stderr.
"""

import argparse
import contextlib
import json
import pathlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import yaml

from engram_jax.config import Config, load_config
from engram_jax.data.pipeline import prepare
from engram_jax.model.counts import table_layout
from engram_jax.tables.base import Tables
from engram_jax.training.state import init_state, make_setup
from engram_jax.training.step import make_train_step

PLACEMENTS = ("device", "host", "file")
SETTLING = 2  # turns that are not counted: programs are compiled


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="configs/tiny.yaml")
  parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="of the config")
  parser.add_argument("--turns", type=int, default=7)
  parser.add_argument("--steps", type=int, help="of a turn, or of --large; default: 4, or 30")
  parser.add_argument("--large", type=float, help="rows of a file's table; nothing is compared")
  parser.add_argument("--folder", default=tempfile.gettempdir(), help="for the files")
  parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
  args = parser.parse_args()
  args.set = {name: yaml.safe_load(value) for name, value in (x.split("=", 1) for x in args.set)}
  with tempfile.TemporaryDirectory(dir=args.folder) as folder, contextlib.ExitStack() as stack:
    run = compared if args.large is None else large
    report = run(args, pathlib.Path(folder), stack)
    for name, value in report.items():
      print(f"{name:32}{value}", file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:  # now: a file of a million extents takes minutes to remove
      print(json.dumps(report), flush=True)


def log(text: str) -> None:
  print(text, file=sys.stderr)


def config(args: argparse.Namespace, folder: pathlib.Path, change: dict[str, Any]) -> Config:
  """The config with these changes, of a run whose files lie in `folder`."""
  where = {"run.root": str(folder.parent), "run.name": folder.name}
  return load_config(args.config, args.set | change | where)


# --- tables that fit --------------------------------------------------------------------------


def compared(
  args: argparse.Namespace, folder: pathlib.Path, stack: contextlib.ExitStack
) -> dict[str, Any]:
  steps = args.steps or 4
  data = prepare(load_config(args.config, args.set), log)
  pipeline = data.training_pipeline()
  batches = [pipeline.batch_at(i) for i in range((args.turns + SETTLING) * steps)]
  turns, ends = {}, {}
  for place in PLACEMENTS:
    cfg = config(args, folder, {"model.engram.placement": place})
    turns[place], ends[place] = started(cfg, data.vocabulary.layout, batches, steps, stack)
  taken: dict[str, list[float]] = {place: [] for place in PLACEMENTS}
  for turn in range(args.turns + SETTLING):
    for place in np.roll(PLACEMENTS, turn).tolist():  # each goes first as often
      begin = time.perf_counter()
      next(turns[place])
      taken[place].append((time.perf_counter() - begin) / steps)
      log(f"turn {turn} {place}: {taken[place][-1]:.4f} s a step")
  seconds = {place: statistics.median(times[SETTLING:]) for place, times in taken.items()}
  left = {place: end() for place, end in ends.items()}
  return {
    "device": str(jax.devices()[0]),
    "config": args.config,
    "rows": {layer: data.vocabulary.layout.rows[layer] for layer in data.vocabulary.layout.layers},
    "seconds_a_step": seconds,
    "host_over_device": seconds["host"] / seconds["device"],
    "file_over_device": seconds["file"] / seconds["device"],
    "equal_bits": left["host"] == left["device"] == left["file"],
  }


def started(
  cfg: Config, layout: Any, batches: list, steps: int, stack: contextlib.ExitStack
) -> tuple[Iterator[None], Callable[[], list[bytes]]]:
  """(a generator that takes `steps` steps at a time, what the last state is in bytes)."""
  setup = make_setup(cfg, layout)
  tables = stack.enter_context(setup.tables)
  step, last = make_train_step(setup), {}

  def turns() -> Iterator[None]:
    state = init_state(setup)
    for i, batch in enumerate(tables.prefetch(state.tables, batches), 1):
      state, _ = step(state, batch)
      last["state"] = state
      if i % steps == 0:
        if state.tables.host is not None:
          state.tables.host.settle()
        yield jax.block_until_ready(state)

  def end() -> list[bytes]:
    state = last["state"]
    ids = {layer: touched(batches, i) for i, layer in enumerate(tables.layers)}
    return as_bytes(state.params, tables.lookup(state.tables, ids))

  return turns(), end


def touched(batches: list, i: int) -> np.ndarray:
  return np.unique(np.stack([batch["row_ids"][i] for batch in batches]))


def as_bytes(*trees: Any) -> list[bytes]:
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(trees)]


# --- a table that does not --------------------------------------------------------------------


def large(
  args: argparse.Namespace, folder: pathlib.Path, stack: contextlib.ExitStack
) -> dict[str, Any]:
  """The config's model with its first table of about args.large rows, on random tokens and rows."""
  engram = load_config(args.config, args.set).model.engram
  share = int(args.large / (engram.heads * (engram.max_ngram - 1)))
  change = {
    "model.engram.placement": "file",
    "model.engram.rows_per_head": share,
    "model.engram.layers": list(engram.layers[:1]),
  }
  cfg = config(args, folder, change)
  layout, steps = table_layout(cfg.model), args.steps or 30
  setup = make_setup(cfg, layout)
  tables, step = stack.enter_context(setup.tables), make_train_step(setup)
  begin = time.perf_counter()
  first = tables.init(Tables.key(cfg))
  made = time.perf_counter() - begin
  state, memory, times = init_state(setup)._replace(tables=first), [], []
  batches = (random_batch(cfg, layout, i) for i in range(steps))
  for i, batch in enumerate(tables.prefetch(state.tables, batches)):
    begin = time.perf_counter()
    state, metrics = step(state, batch)
    loss = float(metrics["loss"])
    state.tables.host.settle()
    times.append(time.perf_counter() - begin)
    memory.append(resident())
    log(f"step {i}: loss {loss:.4f}, {times[-1]:.2f} s, {memory[-1] / 2**20:,.0f} MiB resident")
  status = state.tables.host.tables[layout.layers[0]].stat()
  return {
    "rows": layout.rows[layout.layers[0]],
    "file_gib": status.st_size / 2**30,
    "disk_gib": status.st_blocks * 512 / 2**30,
    "seconds_to_make": made,
    "seconds_a_step": statistics.median(times[SETTLING:] or times),
    "resident_gib_after_5": memory[min(4, steps - 1)] / 2**30,
    "resident_gib_at_the_end": memory[-1] / 2**30,
    "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
  }


def random_batch(cfg: Config, layout: Any, step: int) -> dict[str, np.ndarray]:
  B, T = cfg.train.batch_size, cfg.data.sequence_length
  numbers = np.random.default_rng(step)
  tokens = numbers.integers(0, cfg.model.vocab_size, (B, T)).astype(np.int32)
  ids = [
    numbers.integers(0, layout.rows[layer], (B, T, cfg.model.engram.hash_heads), np.int32)
    for layer in layout.layers
  ]
  return {
    "tokens": tokens,
    "targets": np.roll(tokens, -1, axis=1),
    "mask": np.ones((B, T), bool),
    "segments": np.zeros((B, T), np.int32),
    "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    "row_ids": np.stack(ids),
  }


def resident() -> int:
  """Bytes of memory that this process has now."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * resource.getpagesize()


if __name__ == "__main__":
  main()
