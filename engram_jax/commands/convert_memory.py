"""`python -m engram_jax convert memory`: the memory alone, out of a checkpoint that holds more.

Byte for byte as it is stored, or with --layout in the form of another model, if that can say it.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
import tyro
from tqdm import tqdm

from engram_jax.interop import deepseek as deepseek_write
from engram_jax.interop import qwen as qwen_write
from engram_jax.interop.folder import CONFIG, TOKENIZER, Folder
from engram_jax.interop.reader import open_memory
from engram_jax.interop.writer import (
  SHARD_BYTES,
  Source,
  dumps,
  new_folder,
  ranges,
  write_tensors,
  write_text,
)

WRITERS = {"deepseek_v41": deepseek_write, "qwen_ple": qwen_write}


@dataclasses.dataclass(frozen=True)
class Args:
  source: Annotated[pathlib.Path, tyro.conf.arg(name="from")]
  """Folder of a checkpoint: DeepSeek-V4.1's, Qwen3.8-Flash-Next's, or of `convert export`."""
  to: pathlib.Path
  """The folder to make; nothing is overwritten."""
  layout: Literal["deepseek_v41", "qwen_ple"] | None = None
  """Layout to write; that of the checkpoint, byte for byte, if left out."""
  shard_bytes: int = SHARD_BYTES
  """Of tensors in one file; a larger tensor has a file for itself."""
  json: bool = False
  """One JSON object on stdout."""


def main(args: Sequence[str]) -> int:
  """The memory of a released or exported checkpoint, byte for byte or in another layout."""
  own = tyro.cli(Args, prog="python -m engram_jax convert memory", args=args, description=__doc__)
  with Folder(own.source) as folder:
    memory = open_memory(folder)
    if own.layout is None:
      config = (own.source / CONFIG).read_text(encoding="utf-8")
      tensors = {name: _copy(folder, name) for name in memory.tensors}
    else:
      config = dumps(WRITERS[own.layout].config_of(memory))
      tensors = WRITERS[own.layout].sources(memory)
    with new_folder(own.to) as new:
      write_text(new / CONFIG, config)
      write_text(new / TOKENIZER, (own.source / TOKENIZER).read_text(encoding="utf-8"))
      size = sum(source.nbytes for source in tensors.values())
      with tqdm(total=size, unit="B", unit_scale=True, file=sys.stderr) as bar:
        write_tensors(new, tensors, own.shard_bytes, bar.update)
  kind = own.layout or memory.kind
  result = {"folder": str(own.to), "kind": kind, "tensors": len(tensors), "bytes": size}
  said = f"{own.to}: {kind}, {len(tensors)} tensors, {size:,} bytes"
  print(json.dumps(result) if own.json else said)
  return 0


def _copy(folder: Folder, name: str) -> Source:
  tensor = folder.tensor(name)

  def slices() -> Iterator[np.ndarray]:
    if not tensor.shape:
      yield folder.read(name)
      return
    for start, stop in ranges(tensor.shape[0], tensor.row_bytes):
      yield folder.read(name, start, stop)

  return Source(tensor.dtype, tensor.shape, slices)
