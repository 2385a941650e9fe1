"""`python -m engram_jax convert table`, `rows` and `verify`: table files, read row by row.

Local letter: n, rows of one block.
"""

import dataclasses
import inspect
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import tyro
from tqdm import tqdm

from engram_jax.cli import log
from engram_jax.errors import ConfigError
from engram_jax.inference.load import table_provenance
from engram_jax.inference.stores.file import FileRows
from engram_jax.inference.stores.table_file import TableHeader
from engram_jax.inference.stores.write import require_new, write_table_file
from engram_jax.interop.reader import MemoryReader
from engram_jax.memory.codecs import Kind
from engram_jax.memory.hash_layout import HashLayout
from engram_jax.tables.saved_run import load_run


@dataclasses.dataclass(frozen=True)
class TableArgs:
  """Options of `convert table`."""

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
class RowsArgs:
  """Options of `convert rows`."""

  source: Annotated[pathlib.Path, tyro.conf.arg(name="from")]
  """Folder of a checkpoint: DeepSeek-V4.1's, Qwen3.8-Flash-Next's, or of `convert export`."""
  to: pathlib.Path
  """The file to write; nothing is overwritten."""
  dtype: Kind = "fp8_e4m3"
  """Encoding of the rows."""
  verify: bool = True
  """Compare files that are read with the folder's SHA256SUMS; --no-verify trusts them."""
  json: bool = False
  """One JSON object on stdout, everything else on stderr."""


@dataclasses.dataclass(frozen=True)
class VerifyArgs:
  """Options of `convert verify`."""

  file: pathlib.Path
  """A file that `convert table` wrote."""
  json: bool = False
  """One JSON object on stdout."""


def convert_table(argv: Sequence[str]) -> int:
  """A run's tables as one file that generation reads row by row."""
  prog = "python -m engram_jax convert table"
  args = tyro.cli(TableArgs, prog=prog, args=argv, description=convert_table.__doc__)
  require_new(args.to)
  begin = time.perf_counter()
  with load_run(args.run, args.step, log) as saved:
    if saved.layout is None:
      raise ConfigError(f"--run {args.run} was trained without a memory: it has no tables")
    header = _write_with_bar(
      args.to,
      saved.rows,
      saved.layout,
      saved.meta["token_map_digest"],
      kind=args.dtype,
      width=saved.config.model.engram.row_width,
      source=table_provenance(saved),
    )
  _show(args.to, header, args.json, seconds=round(time.perf_counter() - begin, 3))
  return 0


def convert_rows(argv: Sequence[str]) -> int:
  """A released or exported checkpoint's tables as one file that is read row by row.

  This does what `convert table` does for a run, for a checkpoint folder in any layout that
  `inspect` reads. With fp8_e4m3, DeepSeek-V4.1's rows keep their values: a block's scale may become
  a smaller power of two, and the numbers are then the same in finer steps.
  """
  prog = "python -m engram_jax convert rows"
  args = tyro.cli(RowsArgs, prog=prog, args=argv, description=inspect.getdoc(convert_rows))
  require_new(args.to)
  with MemoryReader(args.source, verify=args.verify) as reader:
    if reader.caveat:
      log(reader.caveat)
    memory = reader.memory
    header = _write_with_bar(
      args.to,
      lambda layer: memory.tables[layer].blocks(),
      memory.layout,
      memory.compressor.digest,
      kind=args.dtype,
      width=memory.cfg.row_width,
      source={"checkpoint": args.source.resolve().name, "kind": memory.kind},
    )
  rows, size = sum(memory.layout.rows.values()), header.file_bytes
  result = {"file": str(args.to), "kind": memory.kind, "rows": rows, "bytes": size}
  message = f"{args.to}: {args.dtype} rows of {memory.kind}, {rows:,} of them, {size:,} bytes"
  print(json.dumps(result) if args.json else message)
  return 0


def verify_table(argv: Sequence[str]) -> int:
  """Reads a whole table file and compares its checksums; leaves with 5 if it is damaged."""
  prog = "python -m engram_jax convert verify"
  args = tyro.cli(VerifyArgs, prog=prog, args=argv, description=verify_table.__doc__)
  begin = time.perf_counter()
  with FileRows(args.file, threads=1) as store:
    store.verify()
    _show(args.file, store.header, args.json, seconds=round(time.perf_counter() - begin, 3))
  return 0


def _write_with_bar(
  path: pathlib.Path,
  blocks: Callable[[int], Iterable[np.ndarray]],
  layout: HashLayout,
  token_map_digest: str,
  **options: Any,
) -> TableHeader:
  """Writes a table file as `write_table_file` does, with a progress bar of its rows."""
  rows = sum(layout.rows.values())
  with tqdm(total=rows, unit="row", unit_scale=True, file=sys.stderr) as bar:

    def counted(layer: int) -> Iterator[np.ndarray]:
      for rows_nC in blocks(layer):
        yield rows_nC
        bar.update(len(rows_nC))

    return write_table_file(path, counted, layout, token_map_digest, **options)


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
  origin = "".join(f", {name} {x}" for name, x in header.source.items() if name != "digest")
  print(f"{path}: {header.kind} rows of width {header.width}{origin}, {header.file_bytes:,} bytes")
  for layer, count in rows.items():
    print(f"  layer {layer}: {count:,} rows of {result['row_bytes']} bytes")
