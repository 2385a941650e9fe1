"""`python -m engram_jax convert import`: a run made of what `convert export` wrote.

Its checkpoint has the form of the placement in its config: tables on the device go through memory
whole, those on the host or in a file a block at a time.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from engram_jax.config import Config, build
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.rules import path_name
from engram_jax.core.run_directory import CHECKPOINTS
from engram_jax.core.run_directory import CONFIG as RUN_CONFIG
from engram_jax.core.run_directory import TOKENIZER as RUN_TOKENIZER
from engram_jax.errors import ConfigError
from engram_jax.interop import engram_format as layout_of_runs
from engram_jax.interop.folder import CONFIG, TOKENIZER, Folder
from engram_jax.interop.safetensors import NAMES
from engram_jax.interop.writer import new_folder, ranges, write_text
from engram_jax.memory.hashing import HashLayout
from engram_jax.tables.row_checkpoint import write_written
from engram_jax.tables.row_schema import RowSchema
from engram_jax.tables.state import TableState
from engram_jax.training.optimizer import at_step
from engram_jax.training.state import TrainSetup, TrainState, make_setup, state_shapes, stored


@dataclasses.dataclass(frozen=True)
class Args:
  source: Annotated[pathlib.Path, tyro.conf.arg(name="from")]
  """Folder that `convert export` wrote."""
  run: pathlib.Path
  """Folder of the run to make; nothing is overwritten."""
  json: bool = False
  """One JSON object on stdout."""


def main(args: Sequence[str]) -> int:
  """A run that eval.py and train.py open, of an exported folder; optimizer moments start anew."""
  own = tyro.cli(Args, prog="python -m engram_jax convert import", args=args, description=__doc__)
  with Folder(own.source) as folder:
    cfg, step, meta, setup, layout = checked(folder, own.run)
    shapes = state_shapes(setup)
    with new_folder(own.run) as part:
      state = restored(folder, setup, shapes, step)
      offloaded = exported_tables(folder, setup, layout) if setup.tables.is_offloaded else []
      files = functools.partial(write_written, offloaded) if offloaded else None
      with Checkpoints(part / CHECKPOINTS, keep=1) as checkpoints:
        checkpoints.save(step, stored(state), meta | {"next_batch": step}, files=files)
      text = (own.source / TOKENIZER).read_text(encoding="utf-8")
      write_text(part / RUN_TOKENIZER, text)
      write_text(part / RUN_CONFIG, cfg.to_yaml())
  result = {"run": str(own.run), "step": step}
  said = f"{own.run}: step {step}; evaluate it with: python eval.py --run {own.run}"
  print(json.dumps(result) if own.json else said)
  return 0


class Checked(NamedTuple):
  """What a folder says, once it was found to fit together."""

  config: Config
  step: int
  meta: dict[str, Any]
  setup: TrainSetup
  layout: HashLayout | None


def checked(folder: Folder, run: pathlib.Path) -> Checked:
  """An exported folder, for a run in that place; no number is read.

  Raises ConfigError or StorageError for whatever does not fit.
  """
  if not layout_of_runs.matches(folder.config):
    raise ConfigError(
      f"--from {folder.path}: its {CONFIG} is not one that `convert export` wrote; the memory of "
      "another model can be read with `python -m engram_jax inspect`"
    )
  cfg, step, meta = layout_of_runs.read_config(folder)
  cfg = renamed(cfg, run)
  _, layout = layout_of_runs.verified_layout(folder, cfg, meta)
  layout_of_runs.check_tables(folder, cfg.model.engram, layout)
  setup = make_setup(cfg, layout)
  check_parameters(folder, state_shapes(setup))
  return Checked(cfg, step, meta, setup, layout)


def renamed(cfg: Config, run: pathlib.Path) -> Config:
  """The config for a run in that folder; ConfigError for a name that a run cannot have."""
  place = run.absolute()
  tree = cfg.model_dump()
  tree["run"] |= {"root": str(place.parent), "name": place.name}
  return build(tree, f"--run {run}")


def check_parameters(folder: Folder, shapes: TrainState) -> None:
  """ConfigError unless the folder holds the parameters of this state and nothing else."""
  wanted = {**_named(shapes, "params"), **_named(shapes, "biases")}
  for name, leaf in wanted.items():
    folder.check(name, NAMES[np.dtype(leaf.dtype)], leaf.shape)
  parts = ("params.", "biases.")
  extra = [name for name in folder.names if name.startswith(parts) and name not in wanted]
  if extra:
    raise ConfigError(f"{folder.path}: {extra[0]} is no parameter of the model in its {CONFIG}")


def restored(folder: Folder, setup: TrainSetup, shapes: TrainState, step: int) -> TrainState:
  """The state after `step` steps with the folder's numbers.

  Optimizers are at that step of their schedule and know no gradient. Tables off the device have
  their optimizer's scalars alone here: `exported_tables` are their rows.
  """
  read = lambda part: jax.tree_util.tree_map_with_path(
    lambda path, _: jnp.asarray(folder.read(_tensor(part, path))), getattr(shapes, part)
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
    scalars = lambda schema: tuple(jnp.full_like(n, step) for n in schema.first_scalars())
    schemas = setup.tables.schemas.items()
    return TableState({}, {n: s.scalars_alone(scalars(s)) for n, s in schemas})
  tables = {
    n: _padded(folder, layout_of_runs.table_name(n), like)
    for n, like in shapes.tables.tables.items()
  }
  begin = jax.jit(setup.tables.optimizer.init)
  at = lambda state: jax.tree.map(lambda x: x if x.ndim else jnp.full_like(x, step), state)
  return TableState(tables, {n: at(begin(table)) for n, table in tables.items()})


@dataclasses.dataclass(frozen=True)
class ExportedTable:
  """A table in an exported folder, as records of rows that were all written."""

  folder: Folder
  name: str
  schema: RowSchema

  def written(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids int32 [n], records [n]) of all rows in order, a block at a time."""
    for start, stop in ranges(self.schema.rows, self.schema.dtype.itemsize):
      rows_UC = self.folder.read(self.name, start, stop)
      yield np.arange(start, stop, dtype=np.int32), self.schema.fresh_records(rows_UC)


def exported_tables(folder: Folder, setup: TrainSetup, layout: HashLayout) -> list[ExportedTable]:
  """The folder's tables for a checkpoint of a run that does not have them on the device."""
  schemas, name = setup.tables.schemas, layout_of_runs.table_name
  return [ExportedTable(folder, name(n), schemas[n]) for n in layout.layers]


def _padded(folder: Folder, name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
  """A table as it is trained: the stored rows, then zeros."""
  tensor = folder.tensor(name)
  table = np.zeros(like.shape, like.dtype)
  for start, stop in ranges(tensor.shape[0], tensor.row_bytes):
    table[start:stop] = folder.read(name, start, stop)
  return jnp.asarray(table)


def _named(shapes: TrainState, part: str) -> dict[str, Any]:
  leaves = jax.tree_util.tree_flatten_with_path(getattr(shapes, part))[0]
  return {_tensor(part, path): leaf for path, leaf in leaves}


def _tensor(part: str, path: Any) -> str:
  return layout_of_runs.tensor_name(f"{part}/{path_name(path)}")
