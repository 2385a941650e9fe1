"""Rows from host memory and from a file, warm and cold, in every encoding; and a huge sparse file.

    python benchmarks/store.py [--rows 1000000] [--width 256] [--repeats 7] [--json]

Two requests: a prefill (2,048 tokens, 16 columns, ids drawn uniformly, so hardly any repeats) in
rows/s, and one token's 16 rows in microseconds. `cold` is after `drop_page_cache`: every page comes
from the disk. Encodings and sides take turns, so that what else the machine does meets all; figures
are medians. The file goes to --folder, which should be on the disk in question.

`huge` is a table file with the rows of DeepSeek-V4.1's two tables, 203 GB of which nothing is
written but the header, in a process of its own: seconds to open it, rows/s of 2,048-token
requests, and the process's peak memory.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

from engram_jax.inference.stores.file import FileRows
from engram_jax.inference.stores.table_file import TableHeader
from engram_jax.inference.stores.write import write_table_file
from engram_jax.memory.codecs import KINDS, row_bytes
from engram_jax.memory.hash_layout import HashLayout

TOKENS, COLUMNS = 2048, 16
TOKEN_MAP_DIGEST = "0" * 64  # of no tokenizer


def main() -> None:
  args = parse_args()
  if args.huge:
    print(json.dumps(huge(args.huge)))
    return
  report = {"rows": args.rows, "width": args.width, "kinds": {}}
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    paths = {kind: pathlib.Path(folder) / kind for kind in KINDS}
    for kind, path in paths.items():
      write(path, kind, args.rows, args.width)
    results = [side for _ in range(args.repeats) for side in measure(paths)]
    command = [sys.executable, __file__, "--huge", str(pathlib.Path(folder) / "huge")]
    report["huge"] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
  for kind in KINDS:
    sides = {name: [s for k, n, s in results if (k, n) == (kind, name)] for _, name, _ in results}
    report["kinds"][kind] = {"row_bytes": row_bytes(kind, args.width)} | {
      name: statistics.median(values) for name, values in sides.items()
    }
  show(report)
  if args.json:
    print(json.dumps(report))


def parse_args() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, default=1_000_000)
  parser.add_argument("--width", type=int, default=256)
  parser.add_argument("--repeats", type=int, default=7)
  parser.add_argument("--folder", type=pathlib.Path)
  parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
  parser.add_argument("--huge", type=pathlib.Path, help=argparse.SUPPRESS)
  return parser.parse_args()


def write(path: pathlib.Path, kind: str, rows: int, width: int) -> None:
  """Writes a file of about `rows` random rows in one layer."""
  layout = HashLayout.build("engram", [1], rows // COLUMNS, 3, COLUMNS // 2, 99_092, 2)
  block = np.random.default_rng(0).normal(size=(1 << 14, width)).astype(np.float32)
  total = layout.rows[1]
  blocks = lambda _: (block[: min(len(block), total - at)] for at in range(0, total, len(block)))
  write_table_file(path, blocks, layout, TOKEN_MAP_DIGEST, kind=kind, width=width)


def measure(paths: dict[str, pathlib.Path]) -> list[tuple[str, str, float]]:
  """(encoding, side, rows/s or microseconds) of each, measured once."""
  rng, results = np.random.default_rng(), []
  for kind, path in paths.items():
    with FileRows(path) as file:
      host = file.in_memory()
      prefill_ids = rng.integers(0, file.rows[0], (1, 1, TOKENS, COLUMNS))
      token_ids = rng.integers(0, file.rows[0], (1, 1, 1, COLUMNS))
      for name, store, drop in (("host", host, False), ("warm", file, False), ("cold", file, True)):
        for what, ids in (("prefill", prefill_ids), ("token", token_ids)):
          store.fetch(ids)
          if drop:
            file.drop_page_cache()
          seconds = timed(lambda: store.fetch(ids))  # noqa: B023 (called at once)
          if what == "prefill":
            results.append((kind, f"{name}_rows_per_second", ids.size / seconds))
          else:
            results.append((kind, f"{name}_token_microseconds", 1e6 * seconds))
  return results


def timed(call: Callable[[], object]) -> float:
  begin = time.perf_counter()
  call()
  return time.perf_counter() - begin


def huge(path: pathlib.Path) -> dict:
  """Figures of V4.1's two tables as one sparse file of zeros."""
  layout = HashLayout.build("deepseek_v41", [1, 14], 16_000_000, 4, 8, 99_092, 2)
  header = TableHeader.plan(layout, TOKEN_MAP_DIGEST, "fp8_e4m3", 256)
  with open(path, "wb") as file:
    file.truncate(header.file_bytes)
    file.write(header.to_bytes())
  begin = time.perf_counter()
  store = FileRows(path)
  opened, rates, rng = time.perf_counter() - begin, [], np.random.default_rng(0)
  for _ in range(8):
    ids = rng.integers(0, min(store.rows), (2, TOKENS, layout.hash_heads))
    rates.append(ids.size / timed(lambda: store.fetch(ids)))  # noqa: B023
  store.close()
  return {
    "file_bytes": header.file_bytes,
    "open_seconds": opened,
    "rows_per_second": statistics.median(rates),
    "peak_bytes": peak_bytes(),
  }


def peak_bytes() -> int:
  """Peak memory of this process alone; getrusage would include the one that started it."""
  with open("/proc/self/status") as file:
    return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))


def show(report: dict) -> None:
  print(f"{report['rows']:,} rows of width {report['width']}", file=sys.stderr)
  for kind, sides in report["kinds"].items():
    figures = "  ".join(f"{name} {value:,.0f}" for name, value in sides.items())
    print(f"{kind:9} {figures}", file=sys.stderr)
  figures = "  ".join(f"{name} {value:,.4g}" for name, value in report["huge"].items())
  print(f"huge      {figures}", file=sys.stderr)


if __name__ == "__main__":
  main()
