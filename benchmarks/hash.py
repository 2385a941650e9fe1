"""Hashing speed: the jitted and the NumPy half side by side, in tokens/s.

    python benchmarks/hash.py [--repeats 50] [--json]

The paper's demo layout (orders 2 and 3, 8 heads each, 646,400 rows a head) at two layers: one
token is 32 remainders. The halves take turns, so that what else the machine does meets both;
figures are medians. With --json one object goes to stdout and everything else to stderr.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from engram_jax.memory.hashing import HashLayout, hash_ids, hash_ids_numpy

VOCAB = 99_092  # canonical ids of the DeepSeek V4 tokenizer


def seconds(call: Callable[[], object]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start


def measure(batch: int, length: int, repeats: int) -> dict[str, object]:
  """Median tokens/s of both halves over `repeats` turns each."""
  layout = HashLayout.build("engram", [1, 15], 646_400, 3, 8, VOCAB, 2)
  host = np.random.default_rng(0).integers(0, VOCAB, (batch, length)).astype(np.int32)
  device = jax.device_put(host)
  compiled = jax.jit(lambda ids: [hash_ids(layout, layer, ids) for layer in layout.layers])
  halves = {
    "jit": lambda: compiled(device),
    "numpy": lambda: [hash_ids_numpy(layout, layer, host) for layer in layout.layers],
  }
  assert all(map(np.array_equal, halves["jit"](), halves["numpy"]()))
  taken = [{name: seconds(half) for name, half in halves.items()} for _ in range(repeats)]
  rate = {name: batch * length / statistics.median(t[name] for t in taken) for name in halves}
  return {
    "device": str(jax.devices()[0]),
    "batch": batch,
    "length": length,
    "columns": layout.hash_heads,
    "layers": len(layout.layers),
    "repeats": repeats,
    "jit_tokens_per_second": rate["jit"],
    "numpy_tokens_per_second": rate["numpy"],
    "jit_over_numpy": rate["jit"] / rate["numpy"],
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--length", type=int, default=2048)
  parser.add_argument("--repeats", type=int, default=50)
  parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
  args = parser.parse_args()
  found = measure(args.batch, args.length, args.repeats)
  print(
    f"hashing {args.batch} x {args.length} tokens, {found['columns']} columns, "
    f"{found['layers']} layers, on {found['device']}: "
    f"jit {found['jit_tokens_per_second'] / 1e6:.1f} M tokens/s, "
    f"NumPy {found['numpy_tokens_per_second'] / 1e6:.1f} M tokens/s, "
    f"ratio {found['jit_over_numpy']:.2f}",
    file=sys.stderr if args.json else sys.stdout,
  )
  if args.json:
    print(json.dumps(found))


if __name__ == "__main__":
  main()
