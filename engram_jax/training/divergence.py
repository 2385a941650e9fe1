"""Watching the numbers of a run: what was not finite and where, spikes, and when to give up."""

import collections
import pathlib
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.core.rules import path_name
from engram_jax.errors import NonFiniteError
from engram_jax.training.state import TrainSetup, TrainState, state_shapes, stored
from engram_jax.training.step import NONFINITE_LEAF

SPIKE = 5.0  # times the median of the steps before: rare in sound runs, and read as trouble
WINDOW, FIRST = 64, 16  # steps of that median, and how many it needs


def gradient_names(setup: TrainSetup) -> list[str]:
  """Names of what `first_nonfinite` is given by a step: the parameters' leaves, then the rows."""
  leaves = jax.tree.leaves_with_path(state_shapes(setup).params)
  return [*(f"params/{path_name(path)}" for path, _ in leaves), "the rows of the tables"]


class Divergence:
  """A watch over each step's metrics; all processes come to the same answer."""

  def __init__(self, setup: TrainSetup, run: pathlib.Path, report: Callable[[str], None]):
    """Watches a run, whose folder is `run`, from its first step, or from where it resumes.

    report: is told of spikes, and of the first step of each streak that is not finite, in a line.
    """
    self._names, self._report = gradient_names(setup), report
    self._limit = setup.config.train.nonfinite_limit
    self._run = run
    self._before = {name: collections.deque[float](maxlen=WINDOW) for name in ("loss", "grad_norm")}

  def check(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Reads the metrics of a step, and waits for it if it is still running.

    Raises NonFiniteError at the `train.nonfinite_limit`th step in a row that was not finite.
    """
    names = (*self._before, "nonfinite_in_row", NONFINITE_LEAF)
    values: dict[str, Any] = jax.device_get({name: metrics[name] for name in names})
    streak = int(values["nonfinite_in_row"])
    if not streak:
      self._say_spikes(step, values)
      return
    where = self._describe(step, values)
    if streak >= self._limit:
      raise NonFiniteError(
        f"{streak} steps in a row had a loss or gradient that is not finite "
        f"(train.nonfinite_limit={self._limit}), the last of them {where}. Parameters are as they "
        f"were after step {step - streak}, the last before them. The same command meets the same "
        "batches again; go on from the newest checkpoint with --run.extend True and a lower "
        "--train.optimizer.learning_rate or another --data.seed, or start another run from it: "
        f"--run.name NAME --train.init_from {self._run}"
      )
    if streak == 1:
      self._report(f"{where}: not finite; the step changed nothing")

  def is_sound(self, step: int, metrics: Mapping[str, jax.Array]) -> bool:
    """Says whether a step lies outside a streak of non-finite ones, which is not to be saved.

    A checkpoint of one has the parameters of the last sound step, and would in time push it out.
    """
    streak = int(metrics["nonfinite_in_row"])
    if streak:
      self._report(f"step {step} is not saved: {streak} steps in a row were not finite")
    return not streak

  def _describe(self, step: int, values: Mapping[str, Any]) -> str:
    index = int(values[NONFINITE_LEAF])
    text = f"step {step} (batch {step - 1}): loss {float(values['loss'])}"
    if index >= 0:
      text += f", first gradient that is not finite: of {self._names[index]}"
    return text

  def _say_spikes(self, step: int, values: Mapping[str, Any]) -> None:
    for name, before in self._before.items():
      value = float(values[name])
      usual = statistics.median(before) if len(before) >= FIRST else 0.0
      if usual > 0 and value > SPIKE * usual:
        self._report(
          f"step {step} (batch {step - 1}): spike of {name}, {value:.4g} is {value / usual:.1f} "
          f"times the median of the {len(before)} steps before, {usual:.4g}"
        )
      before.append(value)


def require_finite(step: int, loss: float, state: TrainState) -> None:
  """Raises NonFiniteError for a validation loss that is not finite, naming the state's leaves."""
  if np.isfinite(loss):
    return
  bad = nonfinite_leaves(state)
  shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
  raise NonFiniteError(
    f"step {step}: the validation loss is {loss}; "
    + (f"not finite in the state: {shown}" if bad else "every number of the state is finite")
    + ". The step was not saved; see the losses before it for where the run diverged"
  )


def nonfinite_leaves(state: TrainState) -> list[str]:
  """Names, as in checkpoints, of the state's arrays on devices that hold a NaN or an infinity."""
  leaves = jax.tree.leaves_with_path(stored(state))
  floats = {path_name(p): x for p, x in leaves if jnp.issubdtype(x.dtype, jnp.floating)}
  finite = jax.jit(lambda arrays: {k: jnp.isfinite(x).all() for k, x in arrays.items()})(floats)
  return [name for name, ok in jax.device_get(finite).items() if not ok]
