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

from engram_jax.core.rules import path_name
from engram_jax.core.run_directory import TOKENIZER as RUN_TOKENIZER
from engram_jax.core.saved_arrays import SavedArray
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
from engram_jax.tables.saved_run import SavedRun, load_run
from engram_jax.training.state import make_setup, state_shapes


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
  log = lambda text: print(text, file=sys.stderr)
  with load_run(own.run, own.step, log) as saved:
    tensors = run_tensors(saved)
    with new_folder(own.to) as folder:
      write_text(
        folder / CONFIG, dumps(layout_of_runs.description(saved.config, saved.step, saved.meta))
      )
      write_text(folder / TOKENIZER, (own.run / RUN_TOKENIZER).read_text(encoding="utf-8"))
      size = sum(source.nbytes for source in tensors.values())
      with tqdm(total=size, unit="B", unit_scale=True, file=sys.stderr) as bar:
        write_tensors(folder, tensors, own.shard_bytes, bar.update)
  result = {"folder": str(own.to), "step": saved.step, "tensors": len(tensors), "bytes": size}
  said = f"{own.to}: step {saved.step}, {len(tensors)} tensors, {size:,} bytes"
  print(json.dumps(result) if own.json else said)
  return 0


def run_tensors(saved: SavedRun) -> dict[str, Source]:
  """What an export holds of a checkpoint, by tensor name; nothing is read yet."""
  engram, layout = saved.config.model.engram, saved.layout
  shapes = state_shapes(make_setup(saved.config, layout))
  tensors = {}
  for part in ("params", "biases"):
    for path, _ in jax.tree_util.tree_flatten_with_path(getattr(shapes, part))[0]:
      name = f"{part}/{path_name(path)}"
      array = saved.checkpoints.open_array(saved.step, name)
      tensors[layout_of_runs.tensor_name(name)] = _tensor(array)
  for layer in engram.layers:
    dtype = layout_of_runs.DTYPES[engram.table_dtype]
    shape = (layout.rows[layer], engram.row_width)

    def rows(layer=layer, dtype=dtype) -> Iterator[np.ndarray]:
      for some in saved.rows(layer):
        yield some.astype(NUMPY[dtype])

    tensors[layout_of_runs.table_name(layer)] = Source(dtype, shape, rows)
  return tensors


def _tensor(array: SavedArray) -> Source:
  def slices() -> Iterator[np.ndarray]:
    if not array.shape:
      yield array.read()
      return
    row_bytes = array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
    for start, stop in ranges(array.shape[0], row_bytes):
      yield array.read(start, stop)

  return Source(NAMES[np.dtype(array.dtype)], tuple(array.shape), slices)
