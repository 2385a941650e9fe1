"""`python -m engram_jax convert rows`: another model's tables as one file that is read row by row.

What `convert table` does for a run, for a checkpoint folder in any layout that `inspect` reads.
With fp8_e4m3, DeepSeek-V4.1's rows keep their values: a block's scale may become a smaller power of
two, and the numbers are then the same in finer steps.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from engram_jax.inference.stores.write import require_new, write_table_file
from engram_jax.interop.reader import MemoryReader
from engram_jax.memory.codecs import Kind


@dataclasses.dataclass(frozen=True)
class Args:
  source: Annotated[pathlib.Path, tyro.conf.arg(name="from")]
  """Folder of a checkpoint: DeepSeek-V4.1's, Qwen3.8-Flash-Next's, or of `convert export`."""
  to: pathlib.Path
  """The file to write; nothing is overwritten."""
  dtype: Kind = "fp8_e4m3"
  """Encoding of the rows."""
  json: bool = False
  """One JSON object on stdout, everything else on stderr."""


def main(args: Sequence[str]) -> int:
  """A released or exported checkpoint's tables as one file that is read row by row."""
  own = tyro.cli(Args, prog="python -m engram_jax convert rows", args=args, description=__doc__)
  require_new(own.to)
  with MemoryReader(own.source) as reader:
    memory = reader.memory
    total = sum(memory.layout.rows.values())
    with tqdm(total=total, unit="row", unit_scale=True, file=sys.stderr) as bar:

      def blocks(layer: int) -> Iterator[np.ndarray]:
        for rows_UC in memory.tables[layer].blocks():
          yield rows_UC
          bar.update(len(rows_UC))

      header = write_table_file(
        own.to,
        blocks,
        memory.layout,
        memory.compressor.digest,
        kind=own.dtype,
        width=memory.cfg.row_width,
        source={"checkpoint": own.source.resolve().name, "kind": memory.kind},
      )
  result = {"file": str(own.to), "kind": memory.kind, "rows": total, "bytes": header.file_bytes}
  said = (
    f"{own.to}: {own.dtype} rows of {memory.kind}, {total:,} of them, {header.file_bytes:,} bytes"
  )
  print(json.dumps(result) if own.json else said)
  return 0
