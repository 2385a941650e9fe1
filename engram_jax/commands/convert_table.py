"""`python -m engram_jax convert table`: a run's tables as one file that is read row by row."""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Sequence

import numpy as np
import tyro
from tqdm import tqdm

from engram_jax.errors import ConfigError
from engram_jax.inference.load import table_source
from engram_jax.inference.stores.file import FileRows
from engram_jax.inference.stores.table_file import TableHeader
from engram_jax.inference.stores.write import require_new, write_table_file
from engram_jax.memory.codecs import Kind
from engram_jax.tables.saved_run import load_run


@dataclasses.dataclass(frozen=True)
class Args:
  run: pathlib.Path
  """Folder of a run that train.py wrote."""
  to: pathlib.Path
  """The file to write; nothing is overwritten."""
  dtype: Kind = "fp8_e4m3"
  """Encoding of the rows; fp8_e4m3 is that of DeepSeek-V4.1."""
  step: int | None = None
  """Checkpoint to read; the newest one that is sound if left out."""
  json: bool = False
  """One JSON object on stdout, everything else on stderr."""


@dataclasses.dataclass(frozen=True)
class VerifyArgs:
  file: pathlib.Path
  """A file that `convert table` wrote."""
  json: bool = False
  """One JSON object on stdout."""


def main(args: Sequence[str]) -> int:
  """A run's tables as one file that generation reads row by row."""
  own = tyro.cli(Args, prog="python -m engram_jax convert table", args=args, description=__doc__)
  require_new(own.to)
  log = lambda text: print(text, file=sys.stderr)
  begin = time.perf_counter()
  with load_run(own.run, own.step, log) as saved:
    layout = saved.layout
    if layout is None:
      raise ConfigError(f"--run {own.run} was trained without a memory: it has no tables")
    with tqdm(total=sum(layout.rows.values()), unit="row", unit_scale=True, file=sys.stderr) as bar:

      def blocks(layer: int):
        for rows_UC in saved.rows(layer):
          yield rows_UC.astype(np.float32, copy=False)
          bar.update(len(rows_UC))

      header = write_table_file(
        own.to,
        blocks,
        layout,
        saved.meta["token_map_digest"],
        kind=own.dtype,
        width=saved.config.model.engram.row_width,
        source=table_source(saved),
      )
  _show(own.to, header, own.json, seconds=round(time.perf_counter() - begin, 3))
  return 0


def verify(args: Sequence[str]) -> int:
  """Reads a whole table file and compares its checksums; leaves with 5 if it is damaged."""
  own = tyro.cli(VerifyArgs, prog="python -m engram_jax convert verify", args=args)
  begin = time.perf_counter()
  with FileRows(own.file, threads=1) as store:
    store.verify()
    _show(own.file, store.header, own.json, seconds=round(time.perf_counter() - begin, 3))
  return 0


def _show(path: pathlib.Path, header: TableHeader, as_json: bool, seconds: float) -> None:
  rows = {str(table.layer): table.rows for table in header.tables}
  result = {
    "file": str(path),
    "source": header.source,
    "dtype": header.kind,
    "width": header.width,
    "rows": rows,
    "row_bytes": header.tables[0].bytes // header.tables[0].rows,
    "bytes": header.file_bytes,
    "token_map_digest": header.token_map_digest,
    "hash_layout_digest": header.layout().digest,
    "seconds": seconds,
  }
  if as_json:
    print(json.dumps(result))
    return
  shown = {name: value for name, value in header.source.items() if name != "digest"}
  origin = "".join(f", {name} {value}" for name, value in shown.items())
  print(f"{path}: {header.kind} rows of width {header.width}{origin}, {header.file_bytes:,} bytes")
  for layer, count in rows.items():
    print(f"  layer {layer}: {count:,} rows of {result['row_bytes']} bytes")
