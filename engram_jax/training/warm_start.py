"""A warm start: a run that begins with another's weights, with the same memory or a new one.

Parameters are stored per layer under names that a memory does not change, so a model trained
without one continues with one: leaves of the source are taken, those of a new memory stay as
initialised, and no key is renamed. Moments, step and data order start anew.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.rules import path_name
from engram_jax.core.run_directory import CHECKPOINTS
from engram_jax.errors import ConfigError
from engram_jax.memory.hash_layout import HashLayout
from engram_jax.memory.vocabulary import check_fingerprint
from engram_jax.tables.saved_run import load_run
from engram_jax.tables.state import TableState
from engram_jax.training.state import (
  TrainSetup,
  TrainState,
  flush,
  make_setup,
  restore_state,
  state_shapes,
)


class WarmStart(NamedTuple):
  """The newest valid step of another run, as the source of weights."""

  run: pathlib.Path
  step: int
  setup: TrainSetup

  def apply(self, state: TrainState) -> TrainState:
    """Replaces parameters, biases and tables of an initialised `state` by the other run's."""
    with Checkpoints(self.run / CHECKPOINTS, keep=None) as checkpoints:
      old = restore_state(checkpoints, self.step, self.setup)
    old = flush(self.setup, old)
    return state._replace(
      params=_replace_leaves(state.params, old.params),
      biases=_replace_leaves(state.biases, old.biases),
      tables=_with_tables(state.tables, old.tables.tables),
    )


def find_warm_start(
  run: str,
  setup: TrainSetup,
  layout: HashLayout | None,
  fingerprint: dict[str, Any],
  log: Callable[[str], None],
) -> WarmStart:
  """Opens the run that `train.init_from` names and checks it against the new run; reads no array.

  Any placement of the other run's tables will do. Those of another dtype are rounded to the new
  run's, which is logged.

  Raises ConfigError for a folder that is no run or holds no sound checkpoint, another tokenizer,
  another memory than none or the same, a memory that would be lost, or other shapes.
  """
  with load_run(pathlib.Path(run), None, log, where=f"train.init_from={run!r}") as saved:
    cfg, step, meta = saved.config, saved.step, saved.meta
  _check_memory(run, meta, fingerprint, setup)
  old_layout = layout if meta["hash_layout"] else None
  old = make_setup(cfg.on_device(), old_layout, setup.mesh)
  there, here = state_shapes(old), state_shapes(setup)
  _check_shapes(run, there, here)
  for n, table in there.tables.tables.items():
    if table.dtype != (dtype := here.tables.tables[n].dtype):
      log(
        f"train.init_from={run!r}: its tables of {table.dtype} become {dtype} "
        "(model.engram.table_dtype), rounded to the nearest"
      )
      break
  return WarmStart(pathlib.Path(run), step, old)


def _check_memory(
  run: str, meta: dict[str, Any], fingerprint: dict[str, Any], setup: TrainSetup
) -> None:
  where = f"train.init_from={run!r}"
  check_fingerprint(meta, {"tokenizer_digest": fingerprint["tokenizer_digest"]}, where)
  if meta["hash_layout"] is None:
    return
  if fingerprint["hash_layout"] is None:
    raise ConfigError(f"{where} has a memory, which model.engram.layers=[] would drop")
  check_fingerprint(
    meta, {k: fingerprint[k] for k in ("token_map_digest", "hash_layout_digest")}, where
  )
  placement = setup.config.model.engram.placement
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
      f"{shape(b)} here; without --config it takes that run's model section: `python train.py "
      f"--train.init_from {run} --run.name NAME`, with --model.engram.* for a memory"
    )


def _with_tables(new: TableState, old: dict[int, jax.Array]) -> TableState:
  """Puts the tables of the other run, if it has any, into `new`, in the dtype of `new`."""
  if not old:
    return new
  dtypes = {n: new.tables[n].dtype for n in old}
  if all(old[n].dtype == dtypes[n] for n in old):
    return new._replace(tables=old)
  cast = jax.jit(lambda tables: {n: x.astype(dtypes[n]) for n, x in tables.items()})
  return new._replace(tables=cast(old))


def _replace_leaves(new: Any, old: Any) -> Any:
  """Replaces the leaves of the tree `new` that `old` has too."""
  found = _leaves(old)
  return jax.tree_util.tree_map_with_path(lambda path, x: found.get(path_name(path), x), new)


def _leaves(tree: Any) -> dict[str, Any]:
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
