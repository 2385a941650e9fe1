"""What does generation lose with the tables off the device? All sides interleaved in one run.

    python train.py
    python benchmarks/offload.py --run runs/tiny [--json]

Sides, each on the same prompts (windows of the run's validation text) with the same model and the
same float32 rows, greedy, so that all but the first must say the same tokens (checked):

    none               the model without its memory: its other layers alone
    device             tables on the device, hashed and looked up inside jit
    host_prefetched    rows from host memory, hashed and fetched while earlier layers run
    host_synchronous   the same, fetched before the model starts
    file_warm          prefetched from a mapped file that the system holds in memory
    file_cold          prefetched from the file, which the system forgets before every pass

Tokens a second of prefill (all prompt tokens) and decode (one token a request and pass), and ratios
of medians over the repeats. A ratio `x_over_y` is time of x over time of y for prefill and decode
together: 1.01 is a loss of one percent.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np
from flax import nnx

from engram_jax.config import EngramConfig
from engram_jax.inference.decoder import Decoder, Weights
from engram_jax.inference.load import LoadedModel, load_model
from engram_jax.inference.row_sources import DeviceRows, StoreRows
from engram_jax.inference.stores.file import FileRows
from engram_jax.inference.stores.host import HostRows
from engram_jax.inference.stores.write import write_table_file
from engram_jax.model.lm import LM
from engram_jax.model.router import RouterBias

SIDES = ("none", "device", "host_prefetched", "host_synchronous", "file_warm", "file_cold")
RATIOS = {
  "host_prefetched_over_device": ("host_prefetched", "device"),
  "host_synchronous_over_device": ("host_synchronous", "device"),
  "file_warm_over_device": ("file_warm", "device"),
  "file_cold_over_device": ("file_cold", "device"),
  "memory_over_none": ("device", "none"),
}


def main() -> None:
  args = parse_args()
  opened = load_model(args.run, None, print_nothing)
  prompts = validation_prompts(opened, args.batch, args.prompt_tokens)
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(tempfile.TemporaryDirectory(dir=args.folder))
    sides = make_sides(stack, opened, pathlib.Path(folder), args)
    times, said = measure(sides, prompts, args)
    telemetry = {
      name: side.source.telemetry.as_dict()
      for name, side in sides.items()
      if isinstance(side.source, StoreRows)
    }
  for name in SIDES[2:]:
    assert said[name] == said["device"], f"{name} does not say what the device says"
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


def validation_prompts(opened: LoadedModel, count: int, length: int) -> list[list[int]]:
  """The first `count` stretches of `length` tokens of validation text."""
  data = opened.data()
  text, wanted = [], count * length
  with contextlib.closing(data.validation_pipeline().iterate()) as batches:
    for batch in batches:
      text += np.asarray(batch["tokens"]).reshape(-1).tolist()
      if len(text) >= wanted:
        break
  if len(text) < wanted:
    raise SystemExit(f"the validation text has {len(text)} tokens, not {wanted}: ask for fewer")
  return [text[i * length : (i + 1) * length] for i in range(count)]


def make_sides(stack, opened: LoadedModel, folder: pathlib.Path, args) -> dict[str, Decoder]:
  weights, tables = opened.weights, opened.tables()
  layout, compressor = weights.layout, weights.compressor
  capacity = args.prompt_tokens + args.new_tokens
  host = stack.enter_context(HostRows.from_tables(tables, layout, compressor.digest))
  # Two files: what one side has the system forget, the other would find gone.
  warm, cold = (written(stack, opened, tables, folder / name) for name in ("warm", "cold"))
  rows = lambda store, **options: stack.enter_context(StoreRows(store, compressor, **options))
  on_device = DeviceRows(layout, compressor.table, tuple(map(jax.device_put, tables)))
  device = Decoder(weights, on_device, capacity, chunk=args.chunk)
  return {
    "none": Decoder(without_memory(weights), None, capacity, chunk=args.chunk),
    "device": device,
    "host_prefetched": device.with_source(rows(host)),
    "host_synchronous": device.with_source(rows(host, prefetch=False)),
    "file_warm": device.with_source(rows(warm)),
    "file_cold": device.with_source(Forgetful(rows(cold), cold)),
  }


def written(stack, opened: LoadedModel, tables, path: pathlib.Path) -> FileRows:
  """The tables as a file of float32 rows, opened."""
  layout = opened.weights.layout
  by_layer = dict(zip(layout.layers, tables, strict=True))
  write_table_file(
    path,
    lambda layer: iter([by_layer[layer][: layout.rows[layer]].astype(np.float32)]),
    layout,
    opened.weights.compressor.digest,
    kind="f32",
    width=tables[0].shape[1],
    source={},
  )
  return stack.enter_context(FileRows(path))


class Forgetful:
  """Rows of a file whose pages the system is asked to forget before each pass."""

  def __init__(self, rows: StoreRows, file: FileRows):
    self.rows, self.file = rows, file

  def start(self, *args):
    self.file.drop_page_cache()
    return self.rows.start(*args)

  def on_demand(self, *args):
    self.file.drop_page_cache()
    return self.rows.on_demand(*args)


def without_memory(weights: Weights) -> Weights:
  """The same model with no memory: its blocks' other parameters as they are."""
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


def measure(sides: dict[str, Decoder], prompts, args) -> tuple[dict, dict]:
  """{side: [(prefill, decode) seconds of each repeat]} and the tokens each said."""
  times, said = {name: [] for name in sides}, {}
  for repeat in range(args.repeats + 1):
    for name, decoder in sides.items():
      prefill, decode, tokens = one(decoder, prompts, args.new_tokens)
      said[name] = tokens
      if repeat:  # the first compiles
        times[name].append((prefill, decode))
  return times, said


def one(decoder: Decoder, prompts, new_tokens: int) -> tuple[float, float, list]:
  begin = time.perf_counter()
  logits_BV, state = decoder.prefill(prompts)
  tokens_B = np.asarray(logits_BV.argmax(-1))
  prefill = time.perf_counter() - begin
  said, count_B = [tokens_B], np.ones(len(prompts), np.int32)
  begin = time.perf_counter()
  for _ in range(new_tokens - 1):
    out = decoder.extend(state, tokens_B[:, None], count_B)
    state, tokens_B = out.state, np.asarray(out.logits.argmax(-1))
    said.append(tokens_B)
  return prefill, time.perf_counter() - begin, np.stack(said, 1).tolist()


def summary(times: dict, args) -> dict:
  median = lambda values: statistics.median(values)
  tokens = (args.batch * args.prompt_tokens, args.batch * (args.new_tokens - 1))
  speeds = {
    f"{kind}_tokens_per_second": {
      name: round(tokens[i] / median([t[i] for t in of]), 1) for name, of in times.items()
    }
    for i, kind in enumerate(("prefill", "decode"))
  }
  whole = {name: median([sum(t) for t in of]) for name, of in times.items()}
  ratios = {name: round(whole[a] / whole[b], 4) for name, (a, b) in RATIOS.items()}
  by_kind = {
    f"{kind}_{name}": round(median([t[i] for t in times[a]]) / median([t[i] for t in times[b]]), 4)
    for i, kind in enumerate(("prefill", "decode"))
    for name, (a, b) in RATIOS.items()
  }
  return {"run": str(args.run), "batch": args.batch, "repeats": args.repeats, **speeds} | (
    ratios | by_kind
  )


def show(report: dict) -> None:
  import sys

  say = lambda text: print(text, file=sys.stderr)
  say(f"{'':18}{'prefill tokens/s':>18}{'decode tokens/s':>18}{'waited for rows':>18}")
  for name in SIDES:
    waited = report["rows"].get(name, {}).get("waited_seconds")
    waited = "" if waited is None else f"{waited:.2f} s"
    prefill, decode = (report[f"{k}_tokens_per_second"][name] for k in ("prefill", "decode"))
    say(f"{name:18}{prefill:18,.0f}{decode:18,.0f}{waited:>18}")
  for name in RATIOS:
    parts = ", ".join(f"{k} {report[f'{k}_{name}']:.3f}" for k in ("prefill", "decode"))
    say(f"{name}: {report[name]:.3f} ({parts})")


if __name__ == "__main__":
  main()
