"""A run that diverges says where, keeps what was sound before, and does not look finished."""

import json
import pathlib
import re
import signal

import jax
import jax.numpy as jnp
import pytest

from engram_jax.config import load_config
from engram_jax.errors import NonFiniteError
from engram_jax.training import divergence
from engram_jax.training.divergence import SPIKE, Divergence, require_finite
from engram_jax.training.state import init_state, make_setup
from engram_jax.training.step import NONFINITE_LEAF


def steps(run: pathlib.Path) -> list[str]:
  return sorted(path.name for path in (run / "checkpoints").iterdir())


def sound(run: pathlib.Path, name: str) -> bool:
  content = json.loads((run / "checkpoints" / name / "manifest.json").read_text())
  return not content["content"]["meta"].get("unsound", False)


@pytest.fixture
def poisoned(lab, monkeypatch):
  """`poisoned(steps)`: the batches of these steps have a loss that is not finite.

  The step itself is the real one: its state then holds a NaN in one leaf, which is put back after.
  """

  def poisoned(bad):
    make = lab.train.make_train_step

    def make_poisoned(setup):
      step = make(setup)

      def run(state, batch):
        if int(state.step) + 1 not in bad:
          return step(state, batch)
        path, leaf = smallest(state.params)
        changed = put(state.params, path, leaf * jnp.nan)
        after, metrics = step(state._replace(params=changed), batch)
        return after._replace(params=put(after.params, path, leaf)), metrics

      return run

    monkeypatch.setattr(lab.train, "make_train_step", make_poisoned)

  return poisoned


def smallest(params):
  """A leaf whose NaN reaches the loss: the last norm before the head."""
  leaves = jax.tree.leaves_with_path(params)
  path, leaf = min(
    ((path, leaf) for path, leaf in leaves if "norm" in jax.tree_util.keystr(path)),
    key=lambda item: item[1].size,
  )
  return path, jnp.copy(leaf)


def put(params, path, value):
  return jax.tree.map_with_path(lambda p, x: value if p == path else x, params)


def test_a_streak_names_its_batch_and_leaf_and_keeps_the_last_step_before_it(
  lab, tmp_path, poisoned, monkeypatch
):
  """Saves inside the streak would push the last sound step out: they are not made."""
  poisoned(set(range(9, 25)))
  words = ("--train.checkpoint_every", 2, "--train.nonfinite_limit", 10)
  done = lab.training(tmp_path, *words)
  assert done.code == 4, done.err
  run = tmp_path / "t"
  assert steps(run) == ["step_00000006", "step_00000008"]
  first = next(line for line in done.err.splitlines() if line.startswith("step 9 (batch 8): loss"))
  assert re.search(r"loss nan, first gradient that is not finite: of params/\S+: not finite", first)
  said = done.err.splitlines()[-1]
  assert "10 steps in a row" in said
  assert "step 18 (batch 17)" in said
  assert "after step 8" in said
  assert f"--train.init_from {run}" in said
  monkeypatch.undo()
  rate = ("--train.optimizer.learning_rate", 1e-4, "--train.steps", 6)
  again = lab.training(tmp_path, "--run.name", "u", "--train.init_from", run, *rate)
  assert again.code == 0, again.err
  assert f"weights of {run}, step 8" in again.err


def test_a_short_streak_is_passed_over(lab, tmp_path, poisoned):
  poisoned({8, 9})
  done = lab.training(tmp_path)
  assert done.code == 0, done.err
  assert "step 8 is not saved: 1 steps in a row were not finite" in done.err
  assert steps(tmp_path / "t") == ["step_00000016", "step_00000024"]


def test_a_stop_inside_a_streak_saves_and_keeps_the_sound_step(
  lab, tmp_path, poisoned, monkeypatch
):
  poisoned(set(range(9, 13)))
  write = lab.train.MetricsWriter.write

  def stop(self, number, values):
    write(self, number, values)
    if number == 10:
      signal.raise_signal(signal.SIGTERM)

  monkeypatch.setattr(lab.train.MetricsWriter, "write", stop)
  done = lab.training(tmp_path, "--train.keep_checkpoints", 1)
  assert done.code == 75, done.err
  run = tmp_path / "t"
  assert steps(run) == ["step_00000008", "step_00000010"]
  assert sound(run, "step_00000008")
  assert not sound(run, "step_00000010")


def test_a_validation_loss_that_is_not_finite_ends_with_4_and_is_not_saved(
  lab, tmp_path, monkeypatch
):
  evaluate = lab.train.evaluate

  def to_nan(*args, **options):
    result = evaluate(*args, **options)
    return result | {"loss": float("nan"), "perplexity": float("nan")}

  monkeypatch.setattr(lab.train, "evaluate", to_nan)
  done = lab.training(tmp_path, "--train.eval_every", 24)
  assert done.code == 4, done.err
  assert "step 24: the validation loss is nan" in done.err
  assert "finished" not in done.err
  assert steps(tmp_path / "t") == ["step_00000008", "step_00000016"]
  last = (tmp_path / "t" / "metrics.jsonl").read_text().splitlines()[-1]
  assert json.loads(last)["nonfinite"]["validation/loss"] == "nan"


@pytest.fixture(scope="module")
def setup(lab):
  return make_setup(load_config(lab.config, {"model.engram.layers": []}))


def metrics(loss: float, norm: float = 1.0, streak: int = 0, leaf: int = -1) -> dict:
  values = {"loss": loss, "grad_norm": norm, "nonfinite_in_row": streak, NONFINITE_LEAF: leaf}
  return {name: jnp.asarray(value) for name, value in values.items()}


@pytest.mark.parametrize("times", [10, 100])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_spike_is_said_with_its_batch(setup, name, times):
  said: list[str] = []
  watch = Divergence(setup, pathlib.Path("runs/t"), said.append)
  usual = {"loss": 4.0, "grad_norm": 0.5}
  for step in range(1, 21):
    watch.check(step, metrics(usual["loss"], usual["grad_norm"]))
  assert said == []
  spike = usual | {name: times * usual[name]}
  watch.check(21, metrics(spike["loss"], spike["grad_norm"]))
  (line,) = said
  assert line.startswith(f"step 21 (batch 20): spike of {name}, ")
  assert f"is {times}.0 times the median of the 20 steps before" in line
  watch.check(22, metrics(usual["loss"], (SPIKE - 0.1) * usual["grad_norm"]))
  assert len(said) == 1


def test_the_state_s_own_leaves_are_named(lab):
  setup = make_setup(load_config(lab.config, {"model.engram.layers": []}))
  state = init_state(setup)
  require_finite(3, 5.0, state)
  with pytest.raises(NonFiniteError, match="every number of the state is finite"):
    require_finite(3, float("inf"), state)
  path, leaf = smallest(state.params)
  broken = state._replace(params=put(state.params, path, leaf * jnp.inf * 0))
  name = divergence.path_name(path)
  with pytest.raises(NonFiniteError, match=f"not finite in the state: params/{name}"):
    require_finite(3, float("nan"), broken)
