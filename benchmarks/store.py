"""Rows from host memory and from a file, warm and cold, in every encoding; and a huge sparse file.

    python benchmarks/store.py [--rows 1000000] [--width 256] [--repeats 7] [--json]

Two requests: a prefill (2,048 tokens, 16 columns, ids drawn uniformly, so hardly any repeats) in
rows/s, and one token's 16 rows in microseconds.

    load   the file copied to host memory, where the system holds it in its page cache
    first  rows of a file that the system holds, and of which nothing was read before
    warm   the same rows again
    cold   after `drop_page_cache`: every page comes from the disk; `cold_bytes`, what came
    open   the file opened, cold

Each is measured twice in turn, as it is and with verify=False, which is called unverified. `speed`
is the verified one's over the unverified one's: ratios of medians, 1 where verification costs
nothing. Encodings take turns, too, so that what else the machine does meets all. The file goes to
--folder, which should be on the disk in question.

`huge` is a table file with the rows of DeepSeek-V4.1's two tables, 203 GB of which nothing is
written but header and checksums, in a process of its own: seconds to open it, rows/s of 2,048-token
requests, and the process's peak memory.
"""

import argparse
import hashlib
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable

import numpy as np

from engram_jax.inference.stores.file import FileRows
from engram_jax.inference.stores.table_file import TableHeader
from engram_jax.inference.stores.write import write_table_file
from engram_jax.memory.codecs import KINDS, row_bytes
from engram_jax.memory.hash_layout import HashLayout

TOKENS, COLUMNS = 2048, 16
TOKEN_FETCHES = 9  # of one token, of which the median counts
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
    file_bytes = {kind: path.stat().st_size for kind, path in paths.items()}
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for turn in range(args.repeats):
      for kind, path in paths.items():
        results[kind].append(measure(path, turn))
    command = [sys.executable, __file__, "--huge", str(pathlib.Path(folder) / "huge")]
    report["huge"] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
  for kind in KINDS:
    turns = results[kind]
    medians = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    sizes = {"row_bytes": row_bytes(kind, args.width), "file_bytes": file_bytes[kind]}
    report["kinds"][kind] = sizes | medians | {"speed": speeds(medians)}
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


def measure(path: pathlib.Path, turn: int) -> dict[str, float]:
  """Figures of a file by name, each measured once; the unverified come first in odd turns."""
  rng, result = np.random.default_rng(), {}
  with FileRows(path, verify=False) as file:
    host = file.in_memory()  # and the system holds the file now
    prefill_ids = rng.integers(0, file.rows[0], (1, 1, TOKENS, COLUMNS))
    token_ids = rng.integers(0, file.rows[0], (1, 1, 1, COLUMNS))
  result["host_rows_per_second"] = prefill_ids.size / timed(lambda: host.fetch(prefill_ids))
  tokens = [timed(lambda: host.fetch(token_ids)) for _ in range(TOKEN_FETCHES)]
  result["host_token_microseconds"] = 1e6 * statistics.median(tokens)
  sides = [("", True), ("_unverified", False)]
  # All loads come first: what is read cold is no longer held.
  for side, verify in sides[:: -1 if turn % 2 else 1]:
    with FileRows(path, verify=verify) as file:
      mib = path.stat().st_size / (1 << 20)
      result[f"load{side}_mib_per_second"] = mib / timed(file.in_memory)
      for name in ("first", "warm"):
        seconds = timed(lambda: file.fetch(prefill_ids))
        result[f"{name}{side}_rows_per_second"] = prefill_ids.size / seconds
      tokens = [timed(lambda: file.fetch(token_ids)) for _ in range(TOKEN_FETCHES)]
      seconds = statistics.median(tokens)
      result[f"warm{side}_token_microseconds"] = 1e6 * seconds
  for side, verify in sides[:: -1 if turn % 2 else 1]:
    with FileRows(path, verify=verify) as file:
      file.drop_page_cache()
      before = disk_bytes()
      seconds = timed(lambda: file.fetch(prefill_ids))
      result[f"cold{side}_bytes"] = disk_bytes() - before
      result[f"cold{side}_rows_per_second"] = prefill_ids.size / seconds
      tokens = []
      for _ in range(TOKEN_FETCHES):
        file.drop_page_cache()
        tokens.append(timed(lambda: file.fetch(token_ids)))
      result[f"cold{side}_token_microseconds"] = 1e6 * statistics.median(tokens)
      file.drop_page_cache()
      opened = timed(lambda: FileRows(path, verify=verify).close())  # noqa: B023
      result[f"open{side}_microseconds"] = 1e6 * opened
  return result


def speeds(figures: dict[str, float]) -> dict[str, float]:
  """Speed of the verified over the unverified by name; below 1, verification costs that much."""
  ratios = {}
  for name, value in figures.items():
    what, _, unit = name.partition("_unverified_")
    if unit:
      ratio = figures[f"{what}_{unit}"] / value
      ratios[f"{what}_{unit}"] = 1 / ratio if unit.endswith("microseconds") else ratio
  return ratios


def disk_bytes() -> int:
  """Bytes that this process had read from a disk so far."""
  with open("/proc/self/io") as file:
    return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


def timed(call: Callable[[], object]) -> float:
  begin = time.perf_counter()
  call()
  return time.perf_counter() - begin


def huge(path: pathlib.Path) -> dict:
  """Figures of V4.1's two tables as one sparse file of zeros, with their checksums."""
  layout = HashLayout.build("deepseek_v41", [1, 14], 16_000_000, 4, 8, 99_092, 2)
  header = TableHeader.plan(layout, TOKEN_MAP_DIGEST, "fp8_e4m3", 256)
  checksums = np.full(header.blocks, zlib.crc32(bytes(header.block_bytes)), "<u4")
  digest = hashlib.sha256(checksums.data).hexdigest()
  with open(path, "wb") as file:
    file.truncate(header.file_bytes)
    file.write(header.model_copy(update={"checksums_sha256": digest}).to_bytes())
    file.seek(header.checksums_offset)
    file.write(checksums.data)
  del checksums
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
    print(f"{kind}: {sides['row_bytes']} bytes a row", file=sys.stderr)
    for name, speed in sides["speed"].items():
      what, _, unit = name.partition("_")
      values = f"{sides[name]:>12,.0f} unverified {sides[f'{what}_unverified_{unit}']:>12,.0f}"
      print(f"  {name:24} {values}  speed {speed:.3f}", file=sys.stderr)
    for name in ("host_rows_per_second", "host_token_microseconds"):
      print(f"  {name:24} {sides[name]:>12,.0f}", file=sys.stderr)
  figures = "  ".join(f"{name} {value:,.4g}" for name, value in report["huge"].items())
  print(f"huge      {figures}", file=sys.stderr)


if __name__ == "__main__":
  main()
