"""`python -m engram_jax convert KIND`: a run's tables and weights in other forms."""

import dataclasses
import functools
import inspect
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import tyro

from engram_jax.cli import log, run_kind
from engram_jax.commands.convert_runs import (
  export_run,
  import_run,
  write_checkpoint_folder,
)
from engram_jax.commands.convert_tables import convert_rows, convert_table, verify_table
from engram_jax.interop import deepseek, qwen
from engram_jax.interop.folder import CONFIG, TOKENIZER, Folder
from engram_jax.interop.reader import open_memory
from engram_jax.interop.writer import SHARD_BYTES, dump_json, sliced_tensor

FORMATS = {"deepseek_v41": deepseek, "qwen_ple": qwen}


@dataclasses.dataclass(frozen=True)
class MemoryArgs:
  """Options of `convert memory`."""

  source: Annotated[pathlib.Path, tyro.conf.arg(name="from")]
  """Folder of a checkpoint: DeepSeek-V4.1's, Qwen3.8-Flash-Next's, or of `convert export`."""
  to: pathlib.Path
  """The folder to make; nothing is overwritten."""
  layout: Literal["deepseek_v41", "qwen_ple"] | None = None
  """Layout to write; that of the checkpoint, byte for byte, if left out."""
  shard_bytes: int = SHARD_BYTES
  """Bytes of the tensors in one file; a larger tensor has a file for itself."""
  verify: bool = True
  """Compare files that are read with the folder's SHA256SUMS; --no-verify trusts them."""
  json: bool = False
  """One JSON object on stdout."""


def convert_memory(argv: Sequence[str]) -> int:
  """The memory of a released or exported checkpoint, byte for byte or in another layout.

  The checkpoint may hold more than a memory: the rest is left out. With --layout the memory is
  written as another model stores its own, if that model's layout can express it.
  """
  prog = "python -m engram_jax convert memory"
  args = tyro.cli(MemoryArgs, prog=prog, args=argv, description=inspect.getdoc(convert_memory))
  with Folder(args.source, verify=args.verify) as folder:
    memory = open_memory(folder)
    if folder.caveat:
      log(folder.caveat)
    tokenizer = (args.source / TOKENIZER).read_text(encoding="utf-8")
    if args.layout is None:
      config = (args.source / CONFIG).read_text(encoding="utf-8")
      tensors = {}
      for name in memory.tensors:
        dtype, shape, *_ = folder.tensor(name)
        tensors[name] = sliced_tensor(dtype, shape, functools.partial(folder.read, name))
    else:
      config = dump_json(FORMATS[args.layout].make_config(memory))
      tensors = FORMATS[args.layout].make_tensors(memory)
    size = write_checkpoint_folder(args.to, config, tokenizer, tensors, args.shard_bytes)
  kind = args.layout or memory.kind
  result = {"folder": str(args.to), "kind": kind, "tensors": len(tensors), "bytes": size}
  message = f"{args.to}: {kind}, {len(tensors)} tensors, {size:,} bytes"
  print(json.dumps(result) if args.json else message)
  return 0


KINDS: dict[str, Callable[[Sequence[str]], int]] = {
  "table": convert_table,
  "verify": verify_table,
  "export": export_run,
  "import": import_run,
  "memory": convert_memory,
  "rows": convert_rows,
}


def main(argv: Sequence[str]) -> int:
  """Converts tables and weights; `convert --help` lists the kinds."""
  return run_kind("convert", KINDS, argv, about=__doc__, unknown="cannot convert to")
