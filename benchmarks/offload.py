"""The speed that generation loses with the tables off the device; all sides in turns in one run.

    python train.py
    python benchmarks/offload.py --run runs/tiny [--json]

Sides, each on the same prompts (windows of the run's validation text) with the same model and the
same float32 rows, greedy, so that all but the first must give the same tokens (checked):

    none               the model without its memory: its other layers alone
    device             tables on the device, hashed and looked up inside jit
    host_prefetched    rows from host memory, hashed and fetched while earlier layers run
    host_synchronous   the same, fetched before the model starts
    file_warm          prefetched from a mapped file that the system holds in memory
    file_cold          prefetched from the file, which the system forgets before every pass
    file_new           prefetched from a file opened for each repeat: every block is verified again
    file_unverified    the same without verification

Tokens a second of prefill (all prompt tokens) and decode (one token a request and pass), and ratios
of medians over the repeats. A ratio `x_over_y` is time of x over time of y for prefill and decode
together: 1.01 is a loss of one percent.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from engram_jax.config import EngramConfig
from engram_jax.inference.decoder import Decoder, Weights
from engram_jax.inference.extend import RowsFn
from engram_jax.inference.load import LoadedModel, load_model
from engram_jax.inference.row_sources import DeviceRowSource, StoreRowSource
from engram_jax.inference.stores.file import FileRows
from engram_jax.inference.stores.host import HostRows
from engram_jax.inference.stores.write import write_table_file
from engram_jax.memory.compress import TokenCompressor
from engram_jax.memory.hash_layout import HashLayout
from engram_jax.model.lm import LM
from engram_jax.model.router import RouterBias

SIDES = ("none", "device", "host_prefetched", "host_synchronous", "file_warm", "file_cold")
SIDES += ("file_new", "file_unverified")
RATIOS = {
  "host_prefetched_over_device": ("host_prefetched", "device"),
  "host_synchronous_over_device": ("host_synchronous", "device"),
  "file_warm_over_device": ("file_warm", "device"),
  "file_cold_over_device": ("file_cold", "device"),
  "file_new_over_unverified": ("file_new", "file_unverified"),
  "memory_over_none": ("device", "none"),
}


def main() -> None:
  args = parse_args()
  model = load_model(args.run, None, print_nothing)
  prompts = validation_prompts(model, args.batch, args.prompt_tokens)
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(tempfile.TemporaryDirectory(dir=args.folder))
    sides = make_sides(stack, model, pathlib.Path(folder), args)
    times, tokens = measure(sides, prompts, args)
    telemetry = {
      name: side.row_source.telemetry.as_dict()
      for name, side in sides.items()
      if isinstance(side.row_source, StoreRowSource)
    }
  for name in SIDES[2:]:
    assert tokens[name] == tokens["device"], f"{name} gives other tokens than the device"
  report = summary(times, args) | {"rows": telemetry}
  show(report)
  if args.json:
    print(json.dumps(report))


def parse_args() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--run", type=pathlib.Path, required=True, help="a folder train.py wrote")
  parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
  parser.add_argument("--batch", type=int, default=8, help="requests")
  parser.add_argument("--prompt-tokens", type=int, default=192)
  parser.add_argument("--new-tokens", type=int, default=32)
  parser.add_argument("--chunk", type=int, default=64, help="tokens of a prompt a pass")
  parser.add_argument("--repeats", type=int, default=9)
  parser.add_argument("--folder", help="where the file is written; on the disk to be measured")
  return parser.parse_args()


def print_nothing(text: str) -> None:
  del text


def validation_prompts(model: LoadedModel, count: int, length: int) -> list[list[int]]:
  """The first `count` stretches of `length` tokens of validation text."""
  data = model.data()
  tokens, needed = [], count * length
  with contextlib.closing(data.validation_pipeline().iterate()) as batches:
    for batch in batches:
      tokens += np.asarray(batch["tokens"]).reshape(-1).tolist()
      if len(tokens) >= needed:
        break
  if len(tokens) < needed:
    raise SystemExit(f"the validation text has {len(tokens)} tokens, not {needed}: ask for fewer")
  return [tokens[i * length : (i + 1) * length] for i in range(count)]


def make_sides(stack, model: LoadedModel, folder: pathlib.Path, args) -> dict[str, Decoder]:
  weights, tables = model.weights, model.tables()
  layout, compressor = weights.layout, weights.compressor
  assert layout is not None, "the run has no memory"
  capacity = args.prompt_tokens + args.new_tokens
  host = stack.enter_context(HostRows.from_tables(tables, layout, compressor.digest))
  # Two files: pages that one side drops from the cache would be missing for the other.
  warm, cold = (
    stack.enter_context(write_tables(layout, compressor.digest, tables, folder / name))
    for name in ("warm", "cold")
  )
  row_source = lambda store, **options: stack.enter_context(
    StoreRowSource(store, compressor, **options)
  )
  on_device = DeviceRowSource(layout, compressor.table, tuple(map(jax.device_put, tables)))
  device = Decoder(weights, on_device, capacity, chunk=args.chunk)
  return {
    "none": Decoder(without_memory(weights), None, capacity, chunk=args.chunk),
    "device": device,
    "host_prefetched": device.with_row_source(row_source(host)),
    "host_synchronous": device.with_row_source(row_source(host, overlap=False)),
    "file_warm": device.with_row_source(row_source(warm)),
    "file_cold": device.with_row_source(ColdFileSource(row_source(cold), cold)),
  } | {
    name: device.with_row_source(
      stack.enter_context(NewFileSource(folder / "warm", compressor, verify=verify))
    )
    for name, verify in (("file_new", True), ("file_unverified", False))
  }


def write_tables(
  layout: HashLayout, token_map_digest: str, tables: list[np.ndarray], path: pathlib.Path
) -> FileRows:
  """Writes the tables as a file of float32 rows and opens it."""
  by_layer = dict(zip(layout.layers, tables, strict=True))
  blocks = lambda layer: iter([by_layer[layer][: layout.rows[layer]].astype(np.float32)])
  width = tables[0].shape[1]
  write_table_file(path, blocks, layout, token_map_digest, kind="f32", width=width, source={})
  return FileRows(path)


class ColdFileSource:
  """A row source that drops the file's pages from the page cache before each fetch."""

  def __init__(self, row_source: StoreRowSource, file: FileRows):
    self.row_source, self.file = row_source, file

  def prefetch(self, tokens_BT: Any, count_B: Any, history_BH: Any) -> RowsFn:
    self.file.drop_page_cache()
    return self.row_source.prefetch(tokens_BT, count_B, history_BH)

  def on_demand(self, tokens_BT: Any, count_B: Any, history_BH: Any) -> RowsFn:
    self.file.drop_page_cache()
    return self.row_source.on_demand(tokens_BT, count_B, history_BH)


class NewFileSource:
  """A row source over a file that `open` opens anew, so that no block of it is verified yet."""

  def __init__(self, path: pathlib.Path, compressor: TokenCompressor, *, verify: bool):
    self._open = lambda: FileRows(path, verify=verify)
    self._compressor, self._opened = compressor, contextlib.ExitStack()
    self.open()

  def open(self) -> None:
    self._opened.close()
    store = self._opened.enter_context(self._open())
    self._source = self._opened.enter_context(StoreRowSource(store, self._compressor))

  def __enter__(self) -> "NewFileSource":
    return self

  def __exit__(self, *_: object) -> None:
    self._opened.close()

  def prefetch(self, tokens_BT: Any, count_B: Any, history_BH: Any) -> RowsFn:
    return self._source.prefetch(tokens_BT, count_B, history_BH)

  def on_demand(self, tokens_BT: Any, count_B: Any, history_BH: Any) -> RowsFn:
    return self._source.on_demand(tokens_BT, count_B, history_BH)


def without_memory(weights: Weights) -> Weights:
  """The model without a memory; its other parameters are unchanged."""
  cfg = weights.cfg.model_copy(update={"engram": EngramConfig(layers=())})
  graphdef, _, _ = nnx.split(
    nnx.eval_shape(lambda: LM(cfg, rngs=nnx.Rngs(0))), nnx.Param, RouterBias
  )
  blocks = {
    i: {name: value for name, value in block.items() if name != "engram"}
    for i, block in weights.params["blocks"].items()
  }
  params = weights.params | {"blocks": blocks}
  return weights._replace(cfg=cfg, graphdef=graphdef, params=params, layout=None)


def measure(
  sides: dict[str, Decoder], prompts: list[list[int]], args: argparse.Namespace
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, list[list[int]]]]:
  """{side: [(prefill, decode) seconds of each repeat]} and {side: tokens of each request}."""
  times, tokens = {name: [] for name in sides}, {}
  for repeat in range(args.repeats + 1):
    for name, decoder in sides.items():
      if isinstance(decoder.row_source, NewFileSource):
        decoder.row_source.open()
      prefill, decode, tokens[name] = time_decoder(decoder, prompts, args.new_tokens)
      if repeat:  # the first compiles
        times[name].append((prefill, decode))
  return times, tokens


def time_decoder(
  decoder: Decoder, prompts: list[list[int]], new_tokens: int
) -> tuple[float, float, list[list[int]]]:
  """Seconds of prefill and of decoding, and the greedy tokens of each request."""
  begin = time.perf_counter()
  logits_BV, state = decoder.prefill(prompts)
  tokens_B = np.asarray(logits_BV.argmax(-1))
  prefill = time.perf_counter() - begin
  steps, count_B = [tokens_B], np.ones(len(prompts), np.int32)
  begin = time.perf_counter()
  for _ in range(new_tokens - 1):
    out = decoder.extend(state, tokens_B[:, None], count_B)
    state, tokens_B = out.state, np.asarray(out.logits.argmax(-1))
    steps.append(tokens_B)
  return prefill, time.perf_counter() - begin, np.stack(steps, 1).tolist()


def summary(times: dict, args) -> dict:
  median = lambda values: statistics.median(values)
  tokens = (args.batch * args.prompt_tokens, args.batch * (args.new_tokens - 1))
  speeds = {
    f"{kind}_tokens_per_second": {
      name: round(tokens[i] / median([t[i] for t in side]), 1) for name, side in times.items()
    }
    for i, kind in enumerate(("prefill", "decode"))
  }
  both = {name: median([sum(t) for t in side]) for name, side in times.items()}
  ratios = {name: round(both[a] / both[b], 4) for name, (a, b) in RATIOS.items()}
  by_kind = {
    f"{kind}_{name}": round(median([t[i] for t in times[a]]) / median([t[i] for t in times[b]]), 4)
    for i, kind in enumerate(("prefill", "decode"))
    for name, (a, b) in RATIOS.items()
  }
  return {"run": str(args.run), "batch": args.batch, "repeats": args.repeats, **speeds} | (
    ratios | by_kind
  )


def show(report: dict) -> None:
  log = lambda text: print(text, file=sys.stderr)
  log(f"{'':18}{'prefill tokens/s':>18}{'decode tokens/s':>18}{'waited for rows':>18}")
  for name in SIDES:
    waited = report["rows"].get(name, {}).get("waited_seconds")
    waited = "" if waited is None else f"{waited:.2f} s"
    prefill, decode = (report[f"{k}_tokens_per_second"][name] for k in ("prefill", "decode"))
    log(f"{name:18}{prefill:18,.0f}{decode:18,.0f}{waited:>18}")
  for name in RATIOS:
    parts = ", ".join(f"{k} {report[f'{k}_{name}']:.3f}" for k in ("prefill", "decode"))
    log(f"{name}: {report[name]:.3f} ({parts})")


if __name__ == "__main__":
  main()
