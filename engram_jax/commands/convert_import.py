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
from engram_jax.training.host.records import Records, records_of
from engram_jax.training.host.written import write_written
from engram_jax.training.optimizer import begun_at
from engram_jax.training.state import Recipe, TrainState, make_recipe, state_shapes


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
    cfg, step, meaning, recipe, layout = checked(folder, own.run)
    shapes = state_shapes(recipe, layout)
    with new_folder(own.run) as part:
      state = restored(folder, recipe, shapes, step)
      tables = tables_off_device(folder, recipe, layout) if cfg.model.engram.on_host else []
      scalars = lambda form: tuple(jnp.full_like(n, step) for n in form.first_scalars())
      if tables:
        states = tuple(t.records.scalars_alone(scalars(t.records)) for t in tables)
        state = state._replace(row_optimizers=states)
      files = functools.partial(write_written, tables) if tables else None
      with Checkpoints(part / CHECKPOINTS, keep=1) as checkpoints:
        checkpoints.save(step, state, meaning | {"next_batch": step}, files=files)
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
  meaning: dict[str, Any]
  recipe: Recipe
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
  cfg, step, meaning = layout_of_runs.read_config(folder)
  cfg = renamed(cfg, run)
  _, layout = layout_of_runs.verified_layout(folder, cfg, meaning)
  layout_of_runs.check_tables(folder, cfg.model.engram, layout)
  recipe = make_recipe(cfg, layout)
  check_parameters(folder, state_shapes(recipe, layout))
  return Checked(cfg, step, meaning, recipe, layout)


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


def restored(folder: Folder, recipe: Recipe, shapes: TrainState, step: int) -> TrainState:
  """The state after `step` steps with the folder's numbers; optimizers are at that step of their
  schedule and know no gradient. Without tables where these are not on the device."""
  read = lambda part: jax.tree_util.tree_map_with_path(
    lambda path, _: jnp.asarray(folder.read(_tensor(part, path))), getattr(shapes, part)
  )
  params = read("params")
  layers = recipe.config.model.engram.layers if shapes.tables else ()
  tables = tuple(
    _padded(folder, layout_of_runs.table_name(layer), table)
    for layer, table in zip(layers, shapes.tables, strict=True)
  )
  begun = lambda state: jax.tree.map(lambda x: x if x.ndim else jnp.full_like(x, step), state)
  zero = jnp.zeros((), jnp.int32)
  return TrainState(
    step=jnp.full((), step, jnp.int32),
    params=params,
    biases=read("biases"),
    tables=tables,
    optimizer=begun_at(jax.jit(recipe.optimizer.init)(params), step),
    row_optimizers=tuple(begun(jax.jit(recipe.rows.optimizer.init)(table)) for table in tables),
    bad_in_row=zero,
    bad_total=zero,
  )


@dataclasses.dataclass(frozen=True)
class ExportedTable:
  """A table in an exported folder, as records of rows that all were written."""

  folder: Folder
  name: str
  records: Records

  def written(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids int32 [n], records [n]) of all rows in order, a block at a time."""
    for start, stop in ranges(self.records.rows, self.records.dtype.itemsize):
      rows_UC = self.folder.read(self.name, start, stop)
      yield np.arange(start, stop, dtype=np.int32), self.records.begun(rows_UC)


def tables_off_device(folder: Folder, recipe: Recipe, layout: HashLayout) -> list[ExportedTable]:
  """The folder's tables for a checkpoint of a run that does not have them on the device."""
  forms = records_of(recipe.rows.optimizer, recipe.config.model.engram, layout)
  names = map(layout_of_runs.table_name, layout.layers)
  return [ExportedTable(folder, name, form) for name, form in zip(names, forms, strict=True)]


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
