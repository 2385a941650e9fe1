"""`python -m engram_jax convert export` and `convert import`: a run as safetensors, and back.

An import's checkpoint has the layout of the placement in its config: tables on the device go
through memory as one array each, those on the host or in a file a block at a time.

Local letter: n, rows of one block.
"""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from engram_jax.cli import log
from engram_jax.config import NAMED_TOKENIZERS, Config, build
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.rules import path_name
from engram_jax.core.run_directory import CHECKPOINTS
from engram_jax.core.run_directory import CONFIG as RUN_CONFIG
from engram_jax.core.run_directory import TOKENIZER as RUN_TOKENIZER
from engram_jax.errors import ConfigError
from engram_jax.interop import engram_format
from engram_jax.interop.digests import NAME as DIGESTS
from engram_jax.interop.digests import dump_digests
from engram_jax.interop.folder import CONFIG, TOKENIZER, Folder
from engram_jax.interop.safetensors import DTYPE_NAMES, NUMPY_DTYPES
from engram_jax.interop.writer import (
  SHARD_BYTES,
  StreamedTensor,
  dump_json,
  new_folder,
  slice_ranges,
  sliced_tensor,
  write_tensors,
  write_text,
)
from engram_jax.tables.row_checkpoint import write_written
from engram_jax.tables.row_schema import RowSchema
from engram_jax.tables.saved_run import SavedRun, load_run
from engram_jax.tables.state import TableState
from engram_jax.training.optimizer import at_step
from engram_jax.training.state import TrainSetup, TrainState, make_setup, state_shapes, stored


@dataclasses.dataclass(frozen=True)
class ExportArgs:
  """Options of `convert export`."""

  run: pathlib.Path
  """Folder of a run that train.py wrote."""
  to: pathlib.Path
  """The folder to make; nothing is overwritten."""
  step: int | None = None
  """Checkpoint to read; the newest one that is sound if left out."""
  shard_bytes: int = SHARD_BYTES
  """Bytes of the tensors in one file; a larger tensor has a file for itself."""
  json: bool = False
  """One JSON object on stdout, everything else on stderr."""


@dataclasses.dataclass(frozen=True)
class ImportArgs:
  """Options of `convert import`."""

  source: Annotated[pathlib.Path, tyro.conf.arg(name="from")]
  """Folder that `convert export` wrote."""
  run: pathlib.Path
  """Folder of the run to make; nothing is overwritten."""
  verify: bool = True
  """Compare the folder's files with its SHA256SUMS before use; --no-verify trusts them."""
  json: bool = False
  """One JSON object on stdout."""


# --- export -----------------------------------------------------------------------------------


def export_run(argv: Sequence[str]) -> int:
  """A run's parameters and tables as safetensors, with config and tokenizer; no optimizer state."""
  prog = "python -m engram_jax convert export"
  args = tyro.cli(ExportArgs, prog=prog, args=argv, description=export_run.__doc__)
  with load_run(args.run, args.step, log) as saved:
    config = dump_json(engram_format.make_config(saved.config, saved.step, saved.meta))
    tokenizer = (args.run / RUN_TOKENIZER).read_text(encoding="utf-8")
    tensors = run_tensors(saved)
    size = write_checkpoint_folder(args.to, config, tokenizer, tensors, args.shard_bytes)
  result = {"folder": str(args.to), "step": saved.step, "tensors": len(tensors), "bytes": size}
  message = f"{args.to}: step {saved.step}, {len(tensors)} tensors, {size:,} bytes"
  print(json.dumps(result) if args.json else message)
  return 0


def run_tensors(saved: SavedRun) -> dict[str, StreamedTensor]:
  """Tensors of an exported checkpoint by name: parameters, biases and tables; none is read yet."""
  engram, layout = saved.config.model.engram, saved.layout
  shapes = state_shapes(make_setup(saved.config, layout))
  tensors = {}
  for part in ("params", "biases"):
    for path, _ in jax.tree_util.tree_leaves_with_path(getattr(shapes, part)):
      name = f"{part}/{path_name(path)}"
      array = saved.checkpoints.open_array(saved.step, name)
      dtype = DTYPE_NAMES[np.dtype(array.dtype)]
      tensor = sliced_tensor(dtype, tuple(array.shape), array.read)
      tensors[engram_format.tensor_name(name)] = tensor
  for layer, count in layout.rows.items() if layout else ():
    dtype = engram_format.DTYPES[engram.table_dtype]
    rows = functools.partial(_stored_rows, saved, layer, NUMPY_DTYPES[dtype])
    tensors[engram_format.table_name(layer)] = StreamedTensor(
      dtype, (count, engram.row_width), rows
    )
  return tensors


def _stored_rows(saved: SavedRun, layer: int, dtype: np.dtype) -> Iterator[np.ndarray]:
  for rows_nC in saved.rows(layer):
    yield rows_nC.astype(dtype)


def write_checkpoint_folder(
  path: pathlib.Path,
  config: str,
  tokenizer: str,
  tensors: Mapping[str, StreamedTensor],
  shard_bytes: int,
) -> int:
  """Writes a new checkpoint folder, its digests last, with a progress bar; returns the bytes of its
  tensors.

  Args:
    config: JSON text of its config.json.
    tokenizer: JSON text of its tokenizer.json.
    shard_bytes: of the tensors in one file.

  Raises ConfigError if `path` exists, StorageError if it cannot be written.
  """
  texts = {CONFIG: config, TOKENIZER: tokenizer}
  with new_folder(path) as folder:
    digests = {name: write_text(folder / name, text) for name, text in texts.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    with tqdm(total=size, unit="B", unit_scale=True, file=sys.stderr) as bar:
      digests |= write_tensors(folder, tensors, shard_bytes, bar.update)
    write_text(folder / DIGESTS, dump_digests(digests))
  return size


# --- import -----------------------------------------------------------------------------------


def import_run(argv: Sequence[str]) -> int:
  """A run that eval.py and train.py open, of an exported folder; optimizer moments start anew."""
  prog = "python -m engram_jax convert import"
  args = tyro.cli(ImportArgs, prog=prog, args=argv, description=import_run.__doc__)
  with Folder(args.source, verify=args.verify) as folder:
    folder.verify()
    cfg, step, meta, setup = check_export(folder, args.run)
    if folder.caveat:
      log(folder.caveat)
    with new_folder(args.run) as run:
      state = import_state(folder, setup, step)
      offloaded = exported_tables(folder, setup) if setup.tables.is_offloaded else []
      files = functools.partial(write_written, offloaded) if offloaded else None
      with Checkpoints(run / CHECKPOINTS, keep=1) as checkpoints:
        checkpoints.save(step, stored(state), meta | {"next_batch": step}, files=files)
      write_text(run / RUN_TOKENIZER, (args.source / TOKENIZER).read_text(encoding="utf-8"))
      write_text(run / RUN_CONFIG, cfg.to_yaml())
  result = {"run": str(args.run), "step": step}
  message = f"{args.run}: step {step}; evaluate it with: python eval.py --run {args.run}"
  print(json.dumps(result) if args.json else message)
  return 0


class ExportedRun(NamedTuple):
  """A run in an exported folder, whose parts were found to fit together."""

  config: Config
  step: int
  meta: dict[str, Any]
  setup: TrainSetup


def check_export(folder: Folder, run: pathlib.Path) -> ExportedRun:
  """Checks an exported folder that is to become the run in the folder `run`; reads no tensor.

  Raises ConfigError or StorageError for whatever does not fit.
  """
  if not engram_format.matches(folder.config):
    raise ConfigError(
      f"--from {folder.path}: its {CONFIG} is not one that `convert export` wrote; the memory of "
      "another model can be read with `python -m engram_jax inspect`"
    )
  cfg, step, meta = engram_format.read_config(folder)
  cfg = with_run_directory(cfg, run)
  layout = engram_format.rebuild_vocabulary(folder, cfg, meta).layout
  engram_format.check_tables(folder, cfg.model.engram, layout)
  setup = make_setup(cfg, layout)
  check_parameters(folder, state_shapes(setup))
  return ExportedRun(cfg, step, meta, setup)


def with_run_directory(cfg: Config, run: pathlib.Path) -> Config:
  """The config for a run in the folder `run`; ConfigError for a name that a run cannot have."""
  tree = cfg.model_dump()
  tree["run"] |= {"root": str(run.parent), "name": run.absolute().name}
  if cfg.data.tokenizer not in NAMED_TOKENIZERS:
    tree["data"]["tokenizer"] = str(run / RUN_TOKENIZER)
  return build(tree, f"--run {run}")


def check_parameters(folder: Folder, shapes: TrainState) -> None:
  """Raises ConfigError unless the folder holds the parameters of this state and no others."""
  expected = _leaves_by_tensor(shapes, "params") | _leaves_by_tensor(shapes, "biases")
  for name, leaf in expected.items():
    folder.check(name, DTYPE_NAMES[np.dtype(leaf.dtype)], leaf.shape)
  parts = ("params.", "biases.")
  extra = [name for name in folder.names if name.startswith(parts) and name not in expected]
  if extra:
    raise ConfigError(f"{folder.path}: {extra[0]} is no parameter of the model in its {CONFIG}")


def import_state(folder: Folder, setup: TrainSetup, step: int) -> TrainState:
  """The state after `step` steps with the folder's numbers.

  Optimizers are at that step of their schedule, with moments of zero. Offloaded tables have only
  their optimizer's scalars here: `exported_tables` are their rows.
  """
  shapes = state_shapes(setup)
  read = lambda part: jax.tree_util.tree_map_with_path(
    lambda path, _: jnp.asarray(folder.read(_tensor_name(part, path))), getattr(shapes, part)
  )
  params, zero = read("params"), jnp.zeros((), jnp.int32)
  return TrainState(
    step=jnp.full((), step, jnp.int32),
    params=params,
    biases=read("biases"),
    tables=_table_state(folder, setup, shapes, step),
    optimizer=at_step(jax.jit(setup.optimizer.init)(params), step),
    nonfinite_streak=zero,
    nonfinite_total=zero,
  )


def _table_state(folder: Folder, setup: TrainSetup, shapes: TrainState, step: int) -> TableState:
  if setup.tables.is_offloaded:
    scalars = lambda schema: tuple(jnp.full_like(x, step) for x in schema.first_scalars())
    schemas = setup.tables.schemas.items()
    return TableState({}, {layer: s.scalars_alone(scalars(s)) for layer, s in schemas})
  tables = {
    layer: _padded_table(folder, engram_format.table_name(layer), x.shape, x.dtype)
    for layer, x in shapes.tables.tables.items()
  }
  init = jax.jit(setup.tables.optimizer.init)
  with_step = lambda state: jax.tree.map(lambda x: x if x.ndim else jnp.full_like(x, step), state)
  return TableState(tables, {layer: with_step(init(table)) for layer, table in tables.items()})


def _padded_table(folder: Folder, name: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """A table [R_padded, C] as it is trained: the stored rows, then zeros."""
  tensor, table = folder.tensor(name), np.zeros(shape, dtype)
  for start, stop in slice_ranges(tensor.shape[0], tensor.row_bytes):
    table[start:stop] = folder.read(name, start, stop)
  return jnp.asarray(table)


@dataclasses.dataclass
class ExportedTable:
  """A table in an exported folder, as records of rows that were all written."""

  folder: Folder
  name: str
  schema: RowSchema

  def written(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Gives (ids int32 [n], records [n]) of all rows in order, a block at a time."""
    for start, stop in slice_ranges(self.schema.rows, self.schema.dtype.itemsize):
      rows_nC = self.folder.read(self.name, start, stop)
      yield np.arange(start, stop, dtype=np.int32), self.schema.fresh_records(rows_nC)


def exported_tables(folder: Folder, setup: TrainSetup) -> list[ExportedTable]:
  """The folder's tables, in the order of layers, for the checkpoint of a run that offloads them."""
  schemas, name = setup.tables.schemas, engram_format.table_name
  return [ExportedTable(folder, name(layer), schemas[layer]) for layer in setup.tables.layers]


def _leaves_by_tensor(shapes: TrainState, part: str) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(getattr(shapes, part))
  return {_tensor_name(part, path): leaf for path, leaf in leaves}


def _tensor_name(part: str, path: Any) -> str:
  return engram_format.tensor_name(f"{part}/{path_name(path)}")
