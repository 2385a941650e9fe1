"""`python -m engram_jax convert export`: a run as config, tokenizer and safetensors files."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import tyro
from tqdm import tqdm

from engram_jax.commands.open_model import chosen_step
from engram_jax.config import Config
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.rules import path_name
from engram_jax.core.run_directory import CHECKPOINTS, open_run
from engram_jax.core.run_directory import TOKENIZER as RUN_TOKENIZER
from engram_jax.core.saved_arrays import SavedArray
from engram_jax.data.tokenizer import read_tokenizer
from engram_jax.interop import engram_format as layout_of_runs
from engram_jax.interop.folder import CONFIG, TOKENIZER
from engram_jax.interop.safetensors import NAMES, NUMPY
from engram_jax.interop.writer import (
  SHARD_BYTES,
  Source,
  dumps,
  new_folder,
  ranges,
  write_tensors,
  write_text,
)
from engram_jax.memory.compress import tokenizer_digest
from engram_jax.memory.fingerprint import check_identity
from engram_jax.memory.hashing import HashLayout
from engram_jax.training.saved_rows import saved_rows
from engram_jax.training.state import make_recipe, state_shapes


@dataclasses.dataclass(frozen=True)
class Args:
  run: pathlib.Path
  """Folder of a run that train.py wrote."""
  to: pathlib.Path
  """The folder to make; nothing is overwritten."""
  step: int | None = None
  """Checkpoint to read; the newest one that is sound if left out."""
  shard_bytes: int = SHARD_BYTES
  """Of tensors in one file; a larger tensor has a file for itself."""
  json: bool = False
  """One JSON object on stdout, everything else on stderr."""


def main(args: Sequence[str]) -> int:
  """A run's parameters and tables as safetensors, with config and tokenizer; no optimizer state."""
  own = tyro.cli(Args, prog="python -m engram_jax convert export", args=args, description=__doc__)
  cfg = open_run(own.run)
  say = lambda text: print(text, file=sys.stderr)
  with Checkpoints(own.run / CHECKPOINTS, keep=None) as checkpoints:
    step = chosen_step(checkpoints, own.run, own.step, say)
    meaning = checkpoints.meta(step)
    words = tokenizer_digest(read_tokenizer(own.run / RUN_TOKENIZER))
    check_identity(meaning, {"tokenizer_digest": words}, str(own.run))
    tensors = run_tensors(checkpoints, step, cfg, meaning)
    with new_folder(own.to) as folder:
      write_text(folder / CONFIG, dumps(layout_of_runs.description(cfg, step, meaning)))
      write_text(folder / TOKENIZER, (own.run / RUN_TOKENIZER).read_text(encoding="utf-8"))
      size = sum(source.nbytes for source in tensors.values())
      with tqdm(total=size, unit="B", unit_scale=True, file=sys.stderr) as bar:
        write_tensors(folder, tensors, own.shard_bytes, bar.update)
  result = {"folder": str(own.to), "step": step, "tensors": len(tensors), "bytes": size}
  said = f"{own.to}: step {step}, {len(tensors)} tensors, {size:,} bytes"
  print(json.dumps(result) if own.json else said)
  return 0


def run_tensors(
  checkpoints: Checkpoints, step: int, cfg: Config, meaning: dict
) -> dict[str, Source]:
  """What an export holds of a checkpoint, by tensor name; nothing is read yet."""
  stored = meaning["hash_layout"]
  layout = HashLayout.from_description(stored) if stored else None
  shapes = state_shapes(make_recipe(cfg, layout), layout)
  tensors = {}
  for part in ("params", "biases"):
    for path, _ in jax.tree_util.tree_flatten_with_path(getattr(shapes, part))[0]:
      name = f"{part}/{path_name(path)}"
      array = checkpoints.open_array(step, name)
      tensors[layout_of_runs.tensor_name(name)] = _whole(array)
  for layer in cfg.model.engram.layers:
    dtype = layout_of_runs.DTYPES[cfg.model.engram.table_dtype]
    shape = (layout.rows[layer], cfg.model.engram.row_width)

    def rows(layer=layer, dtype=dtype) -> Iterator[np.ndarray]:
      for some in saved_rows(checkpoints, step, cfg, layout, layer):
        yield some.astype(NUMPY[dtype])

    tensors[layout_of_runs.table_name(layer)] = Source(dtype, shape, rows)
  return tensors


def _whole(array: SavedArray) -> Source:
  def slices() -> Iterator[np.ndarray]:
    if not array.shape:
      yield array.read()
      return
    row_bytes = array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
    for start, stop in ranges(array.shape[0], row_bytes):
      yield array.read(start, stop)

  return Source(NAMES[np.dtype(array.dtype)], tuple(array.shape), slices)
