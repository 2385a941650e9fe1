"""The train step of `tiny` beside square float32 matmuls: tokens/s, MFU, and where the rest goes.

    python benchmarks/step.py [--config configs/tiny.yaml] [--repeats 9] [--json]

All candidates take turns in one run, so that what else the machine does meets each; figures are
medians. MFU is the step's matmul FLOPs (three times the forward's, engram_jax.model.counts) over
those of 1,024-wide matmuls in the same seconds. Below the step stand its parts, jitted alone, and
the same step without one ingredient. With --json one object goes to stdout, the rest to stderr.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from engram_jax.config import Config, load_config
from engram_jax.data.pipeline import prepare
from engram_jax.model.counts import flops_per_token
from engram_jax.training.evaluate import make_eval_step
from engram_jax.training.state import init_state, make_setup
from engram_jax.training.step import loss_and_grads, make_train_step

MATMUL_SIZE = 1024
WITHOUT = {
  "one residual branch": {"model.residual.branches": 1},
  "no memory": {"model.engram.layers": []},
  "no routed experts": {"model.moe.routed_experts": 0},
  "one Newton-Schulz step": {"train.optimizer.newton_schulz_steps": 1},
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="configs/tiny.yaml")
  parser.add_argument("--repeats", type=int, default=9)
  parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
  args = parser.parse_args()
  out = sys.stderr if args.json else sys.stdout
  cfg = load_config(args.config)
  calls = {"matmul": matmul()} | whole_step(cfg, "step") | parts(cfg)
  for name, change in WITHOUT.items():
    calls |= whole_step(load_config(args.config, change), f"step, {name}")
  report = summary(cfg, medians(calls, args.repeats))
  for name, milliseconds in report["milliseconds"].items():
    print(f"{name:32}{milliseconds:10.1f} ms", file=out)
  print(
    f"{report['tokens_per_second']:,.0f} tokens/s, MFU {report['mfu']:.1%} of "
    f"{report['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s on {report['device']}",
    file=out,
  )
  if args.json:
    print(json.dumps(report))


def medians(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
  """Median seconds of each call; the first, which compiles, is not counted."""
  taken: dict[str, list[float]] = {name: [] for name in calls}
  for turn in range(repeats + 1):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      if turn:
        taken[name].append(time.perf_counter() - start)
  return {name: statistics.median(times) for name, times in taken.items()}


def matmul() -> Callable[[], object]:
  left, right = (jax.random.normal(jax.random.key(i), (MATMUL_SIZE,) * 2) for i in range(2))
  multiply = jax.jit(jnp.matmul)
  return lambda: multiply(left, right)


def setting(cfg: Config):
  data = prepare(cfg, lambda text: print(text, file=sys.stderr))
  setup = make_setup(cfg, data.vocabulary.layout)
  batch = jax.device_put(data.training_pipeline().batch_at(0))
  return setup, init_state(setup), batch


def whole_step(cfg: Config, name: str) -> dict[str, Callable[[], object]]:
  setup, state, batch = setting(cfg)
  step, kept = make_train_step(setup), {"state": state}

  def run():
    kept["state"], metrics = step(kept["state"], batch)
    return kept["state"], metrics

  return {name: run}


def parts(cfg: Config) -> dict[str, Callable[[], object]]:
  setup, state, batch = setting(cfg)
  tables, ids = setup.tables, setup.tables.batch_ids(batch)

  @jax.jit
  def fetch(state, ids):
    return dataclasses.replace(tables.fetch(state, ids), synced=None)  # no copy of a table

  touched = fetch(state.tables, ids)
  grads = jax.jit(lambda s, t, b: loss_and_grads(setup, s, t, b))
  eval_step = make_eval_step(setup)

  def forward():
    rows = tuple(tables.lookup(state.tables, ids).values())
    return eval_step(state.params, state.biases, rows, batch)

  update = jax.jit(lambda g, s: setup.optimizer.update(g, s.optimizer, s.params))
  (backbone, _), _ = grads(state, touched, batch)
  return {
    "part: distinct rows, gather": lambda: fetch(state.tables, ids),
    "part: forward, as in evaluation": forward,
    "part: loss and gradients": lambda: grads(state, touched, batch),
    "part: backbone optimizer": lambda: update(backbone, state),
  }


def summary(cfg: Config, seconds: dict[str, float]) -> dict[str, object]:
  tokens = cfg.train.batch_size * cfg.data.sequence_length
  peak = 2 * MATMUL_SIZE**3 / seconds["matmul"]
  flops = 3 * flops_per_token(cfg.model, cfg.data.sequence_length) * tokens
  return {
    "config": cfg.run.name,
    "device": str(jax.devices()[0]),
    "tokens_per_step": tokens,
    "tokens_per_second": tokens / seconds["step"],
    "matmul_flops_per_second": peak,
    "mfu": flops / seconds["step"] / peak,
    "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
  }


if __name__ == "__main__":
  main()
