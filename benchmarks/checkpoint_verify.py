"""The cost of verifying a checkpoint before it is used: every byte's digest, or sizes alone.

    python benchmarks/checkpoint_verify.py [--mib 1024] [--repeats 5] [--json]

A checkpoint of random float32 arrays is saved once; then a run's start looks for its newest step
with verification on and off, in turns, with its files in the page cache.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import numpy as np

from engram_jax.core.checkpoint import Checkpoints

ARRAYS = 8


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--mib", type=int, default=1024, help="size of the checkpoint")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--folder", type=pathlib.Path, help="on the disk to measure")
  parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    size = save(pathlib.Path(folder) / "checkpoints", args.mib)
    seconds = {True: [], False: []}
    for _ in range(args.repeats):
      for verify, found in seconds.items():
        found.append(find_newest(pathlib.Path(folder) / "checkpoints", verify))
  on, off = (statistics.median(seconds[verify]) for verify in (True, False))
  result = {
    "mib": size / 2**20,
    "verified_seconds": on,
    "unverified_seconds": off,
    "verified_mib_per_second": size / 2**20 / on,
    "verified_over_unverified": on / off,
  }
  for name, value in result.items():
    print(f"{name:28}{value:12.4g}", file=sys.stderr)
  if args.json:
    print(json.dumps(result))


def save(folder: pathlib.Path, mib: int) -> int:
  """Saves one step; returns the bytes of its files."""
  rng = np.random.default_rng(0)
  shape = (mib * 2**20 // 4 // ARRAYS,)
  state = {f"w{i}": jax.numpy.asarray(rng.random(shape, np.float32)) for i in range(ARRAYS)}
  with Checkpoints(folder, keep=1) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.wait()
    saved = checkpoints.last_saved()
  assert saved is not None
  return saved.bytes


def find_newest(folder: pathlib.Path, verify: bool) -> float:
  """Seconds of finding the newest step that can be used."""
  with Checkpoints(folder, keep=None, verify=verify) as checkpoints:
    begin = time.perf_counter()
    step = checkpoints.newest_valid(print)
    seconds = time.perf_counter() - begin
  assert step == 1
  return seconds


if __name__ == "__main__":
  main()
