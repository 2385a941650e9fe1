"""Routed experts: every dispatch beside the same matrix products alone, forward and with backward.

    python benchmarks/moe.py [--tokens 4096 --width 128 --expert-width 128 --experts 16 --top-k 2]
      [--repeats 15] [--json]

"matmuls" is what a dispatch would take if the tokens cost nothing to sort, move or activate: 3
products over the chosen assignments forward and 6 more backward, each expert's rows being one
dense matrix. The contestants take turns, so that what else the machine does meets all of them;
times are medians. With --json one object goes to stdout and everything else to stderr.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.model.expert_dispatch import experts_for

NAMES = ("dense", "blocked", "ragged")


def inputs(tokens: int, width: int, hidden: int, experts: int, top_k: int) -> tuple[Any, ...]:
  """Activations, a uniform random routing, and weights that keep the variance near one."""
  rng = np.random.default_rng(0)

  def normal(*shape: int, std: float = 1.0) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape) * std, jnp.float32)

  chosen = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k]
  return (
    normal(tokens, width),
    jnp.asarray(chosen, jnp.int32),
    jnp.full((tokens, top_k), 1 / top_k, jnp.float32),
    normal(experts, width, hidden, std=width**-0.5),
    normal(experts, width, hidden, std=width**-0.5),
    normal(experts, hidden, width, std=hidden**-0.5),
  )


def with_gradients(experts: Callable[..., jax.Array]) -> Callable[..., Any]:
  """The gradients of all floating arguments, for a cotangent that is the activations."""

  def gradients(x, chosen, *floats):
    y, pullback = jax.vjp(lambda x, *floats: experts(x, chosen, *floats), x, *floats)
    return y, pullback(x)

  return gradients


def matmuls(rows: int, width: int, hidden: int) -> tuple[Callable, Callable, tuple[jax.Array, ...]]:
  """(forward, forward and backward, operands): the products as dense matrices of all rows.

  Each product has operands of its own: equal ones would be computed once.
  """
  keys = jax.random.split(jax.random.key(0), 12)
  x = [jax.random.normal(key, (rows, width)) for key in keys[:4]]
  h = [jax.random.normal(key, (rows, hidden)) for key in keys[4:8]]
  w = [jax.random.normal(key, (width, hidden)) for key in keys[8:]]

  def forward(x, h, w):
    return x[0] @ w[0], x[0] @ w[1], h[0] @ w[2].T

  def both(x, h, w):
    into_activations = (x[1] @ w[3], h[1] @ w[0].T, h[2] @ w[1].T)
    into_weights = (x[0].T @ h[1], x[0].T @ h[2], h[3].T @ x[1])
    return forward(x, h, w), into_activations, into_weights

  return forward, both, (x, h, w)


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
  """Median seconds of each call; the first turn compiles and is not counted."""
  taken: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(repeats + 1):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      taken[name].append(time.perf_counter() - start)
  return {name: statistics.median(times[1:]) for name, times in taken.items()}


def measure(
  tokens: int, width: int, hidden: int, experts: int, top_k: int, repeats: int
) -> dict[str, Any]:
  args = inputs(tokens, width, hidden, experts, top_k)
  forward, both, operands = matmuls(tokens * top_k, width, hidden)
  forward, both = jax.jit(forward), jax.jit(both)
  calls = {
    ("forward", "matmuls"): lambda: forward(*operands),
    ("forward_backward", "matmuls"): lambda: both(*operands),
  }
  for name in NAMES:
    one, two = jax.jit(experts_for(name)), jax.jit(with_gradients(experts_for(name)))
    calls["forward", name] = lambda one=one: one(*args)
    calls["forward_backward", name] = lambda two=two: two(*args)
  found = interleaved(calls, repeats)
  flops = 3 * 2 * tokens * top_k * width * hidden
  report: dict[str, Any] = {
    "device": str(jax.devices()[0]),
    "tokens": tokens,
    "width": width,
    "expert_width": hidden,
    "experts": experts,
    "top_k": top_k,
    "repeats": repeats,
  }
  for part, work in (("forward", flops), ("forward_backward", 3 * flops)):
    report[part] = {
      name: {
        "milliseconds": 1e3 * found[part, name],
        "over_matmuls": found[part, name] / found[part, "matmuls"],
        "useful_gflops": work / found[part, name] / 1e9,
      }
      for name in ("matmuls", *NAMES)
    }
  return report


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tokens", type=int, default=4096)
  parser.add_argument("--width", type=int, default=128)
  parser.add_argument("--expert-width", type=int, default=128)
  parser.add_argument("--experts", type=int, default=16)
  parser.add_argument("--top-k", type=int, default=2)
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
  args = parser.parse_args()
  if not 0 < args.top_k <= args.experts:
    parser.error(f"--top-k {args.top_k} must be from 1 to --experts {args.experts}")
  report = measure(
    args.tokens, args.width, args.expert_width, args.experts, args.top_k, args.repeats
  )
  out = sys.stderr if args.json else sys.stdout
  print(
    f"{args.tokens} tokens, {args.experts} experts, top {args.top_k}, on {report['device']}",
    file=out,
  )
  for part in ("forward", "forward_backward"):
    for name, row in report[part].items():
      print(
        f"{part:17s} {name:8s} {row['milliseconds']:9.2f} ms  {row['over_matmuls']:6.2f} x matmuls"
        f"  {row['useful_gflops']:7.1f} useful GFLOP/s",
        file=out,
      )
  if args.json:
    print(json.dumps(report))


if __name__ == "__main__":
  main()
