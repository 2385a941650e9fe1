"""A run that starts from another's weights: with the same memory, or with the first it is given.

Parameters are kept per layer under names that a memory does not change, so a model trained without
one goes on with one as it is: what the source has is taken, what only a memory brings stays as
initialised, and no key is renamed. Moments, step and data order start anew.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.rules import path_name
from engram_jax.core.run_directory import CHECKPOINTS, open_run
from engram_jax.errors import ConfigError
from engram_jax.memory.fingerprint import check_identity
from engram_jax.memory.hashing import HashLayout
from engram_jax.training.host import saved
from engram_jax.training.state import Recipe, TrainState, make_recipe, state_shapes, up_to_date


class Source(NamedTuple):
  """Another run's newest sound step."""

  run: pathlib.Path
  step: int
  recipe: Recipe
  layout: HashLayout | None

  def give(self, state: TrainState) -> TrainState:
    """`state`, just initialised, with the source's parameters, biases and tables."""
    with Checkpoints(self.run / CHECKPOINTS, keep=None) as checkpoints:
      old = saved.restore(checkpoints, self.step, self.recipe, self.layout, None)
    old = up_to_date(self.recipe, old)
    return state._replace(
      params=_taken(state.params, old.params),
      biases=_taken(state.biases, old.biases),
      tables=_rounded(old.tables, state.tables) if self.layout else state.tables,
    )


def find_source(
  run: str,
  recipe: Recipe,
  layout: HashLayout | None,
  meaning: dict[str, Any],
  say: Callable[[str], None],
) -> Source:
  """Where `train.init_from` points, checked against the new run; reads no array.

  The source's tables may lie anywhere. Those of another dtype are rounded to the new run's, which
  is said.

  Raises ConfigError for a folder that is no run or holds no sound checkpoint, another tokenizer,
  another memory than none or the same, a memory that would be lost, or other shapes.
  """
  folder = pathlib.Path(run)
  cfg = open_run(folder)
  with Checkpoints(folder / CHECKPOINTS, keep=None) as checkpoints:
    step = checkpoints.newest_valid(say)
    if step is None:
      raise ConfigError(f"train.init_from={run!r} holds no sound checkpoint yet; train it first")
    meta = checkpoints.meta(step)
  _check_memory(run, meta, meaning, recipe)
  old_layout = layout if meta["hash_layout"] else None
  old = make_recipe(cfg.on_device(), old_layout, recipe.mesh)
  there, here = state_shapes(old, old_layout), state_shapes(recipe, layout)
  _check_shapes(run, there, here)
  if there.tables and there.tables[0].dtype != here.tables[0].dtype:
    say(
      f"train.init_from={run!r}: its tables of {there.tables[0].dtype} become "
      f"{here.tables[0].dtype} (model.engram.table_dtype), rounded to the nearest"
    )
  return Source(folder, step, old, old_layout)


def _check_memory(run: str, meta: dict[str, Any], meaning: dict[str, Any], recipe: Recipe) -> None:
  where = f"train.init_from={run!r}"
  check_identity(meta, {"tokenizer_digest": meaning["tokenizer_digest"]}, where)
  if meta["hash_layout"] is None:
    return
  if meaning["hash_layout"] is None:
    raise ConfigError(f"{where} has a memory, which model.engram.layers=[] would drop")
  check_identity(meta, {k: meaning[k] for k in ("token_map_digest", "hash_layout_digest")}, where)
  placement = recipe.config.model.engram.placement
  if placement != "device":
    raise ConfigError(
      f"{where} has a memory, whose tables go to the device: model.engram.placement={placement!r} "
      "cannot start from it; give placement=device"
    )


def _check_shapes(run: str, old: TrainState, new: TrainState) -> None:
  there, here = _leaves((old.params, old.biases)), _leaves((new.params, new.biases))
  for path in [*here, *there]:
    a, b = there.get(path), here.get(path)
    if (a is None and "/engram/" in path) or (
      a is not None and b is not None and a.shape == b.shape
    ):
      continue
    shape = lambda x: "nothing" if x is None else f"{x.dtype} {list(x.shape)}"
    raise ConfigError(
      f"train.init_from={run!r} is another model: {path.partition('/')[2]} is {shape(a)} there, "
      f"{shape(b)} here; give it the same model section, apart from a memory"
    )


def _rounded(old: tuple[jax.Array, ...], new: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
  cast = jax.jit(lambda tables: tuple(x.astype(y.dtype) for x, y in zip(tables, new, strict=True)))
  return old if all(x.dtype == y.dtype for x, y in zip(old, new, strict=True)) else cast(old)


def _taken(new: Any, old: Any) -> Any:
  found = _leaves(old)
  return jax.tree_util.tree_map_with_path(lambda path, x: found.get(path_name(path), x), new)


def _leaves(tree: Any) -> dict[str, Any]:
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
