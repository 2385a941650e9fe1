"""One training step: what moves, what does not, and what a number that is not one may change."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import load_config
from engram_jax.data.pipeline import prepare
from engram_jax.training.evaluate import make_eval_step
from engram_jax.training.state import init_state
from engram_jax.training.step import make_train_step


@pytest.fixture(scope="module")
def world(lab):
  """TrainSetup, prepared data, compiled step, and the state after two steps (moments are not zero)."""
  cfg = load_config(lab.config)
  data = prepare(cfg, lambda line: None)
  setup = lab.train.make_setup(cfg)
  step = lab.train.make_train_step(setup)
  state = init_state(setup)
  for i in range(2):
    state, _ = step(state, batch_at(data, i))
  return setup, data, step, state


def batch_at(data, step: int) -> dict:
  return data.training_pipeline().batch_at(step)


def own(state):
  """A copy that may be donated."""
  return jax.tree.map(jnp.copy, state)


def assert_only_counters_moved(before, after, nonfinite_streak: int) -> None:
  chex.assert_trees_all_equal(
    after._replace(
      step=before.step,
      nonfinite_streak=before.nonfinite_streak,
      nonfinite_total=before.nonfinite_total,
    ),
    before,
  )
  assert int(after.step) == int(before.step) + 1
  assert int(after.nonfinite_streak) == nonfinite_streak


def test_a_step_moves_every_matrix_and_only_the_touched_rows(world):
  _, data, step, state = world
  batch = batch_at(data, 2)
  new, metrics = step(own(state), batch)
  still = jax.tree.map(lambda a, b: bool((a == b).all()), state.params, new.params)
  stayed = {jax.tree_util.keystr(path) for path, s in jax.tree.leaves_with_path(still) if s}
  # Mixing the streams changes nothing where they are still copies of one another, nor in the last
  # block, after which they are averaged: there the gradient is zero up to rounding.
  assert all("_res']" in path for path in stayed), stayed
  touched = np.unique(batch["row_ids"][0])
  moved = np.flatnonzero((np.asarray(state.tables[0]) != np.asarray(new.tables[0])).any(-1))
  np.testing.assert_array_equal(moved, touched)
  before, after = state.row_optimizers[0], new.row_optimizers[0]
  counted = np.flatnonzero(np.asarray(after.touched_R) - np.asarray(before.touched_R))
  np.testing.assert_array_equal(counted, touched)
  for old, now in ((before.mu_RC, after.mu_RC), (before.nu_RC, after.nu_RC)):
    rest = np.setdiff1d(np.arange(old.shape[0]), touched)
    np.testing.assert_array_equal(np.asarray(old)[rest], np.asarray(now)[rest])
  assert metrics["unique_rows/layer_1"] == pytest.approx(touched.size / batch["row_ids"].size)


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("place", ["parameter", "row"])
def test_a_value_that_is_not_finite_changes_only_the_counters(world, place, value):
  _, data, step, state = world
  batch = batch_at(data, 2)
  if place == "row":
    row = int(batch["row_ids"][0, 0, 0, 0])
    poisoned = own(state)._replace(tables=(state.tables[0].at[row].set(value),))
  else:
    leaves, tree = jax.tree.flatten(own(state.params))
    largest = max(range(len(leaves)), key=lambda i: leaves[i].size)
    leaves[largest] = leaves[largest].at[:].set(value)
    poisoned = own(state)._replace(params=jax.tree.unflatten(tree, leaves))
  after, metrics = step(own(poisoned), batch)
  assert_only_counters_moved(poisoned, after, nonfinite_streak=1)
  assert int(metrics["nonfinite_total"]) == 1


def test_the_count_in_a_row_starts_again_after_a_good_step(world):
  _, data, step, state = world
  state = own(state)._replace(nonfinite_streak=jnp.int32(7), nonfinite_total=jnp.int32(9))
  after, _ = step(state, batch_at(data, 2))
  assert (int(after.nonfinite_streak), int(after.nonfinite_total)) == (0, 9)


def test_masked_targets_do_not_count(world):
  _, data, step, state = world
  batch = batch_at(data, 2)
  masked = batch | {"mask": np.array(batch["mask"])}
  masked["mask"][0] = False
  changed = masked | {"targets": np.where(masked["mask"], masked["targets"], 7)}
  one, metrics = step(own(state), masked)
  two, _ = step(own(state), changed)
  chex.assert_trees_all_equal(one, two)
  assert int(metrics["tokens"]) == masked["mask"].sum()


def test_a_step_is_a_function_of_state_and_batch(world):
  _, data, step, state = world
  one, two = (step(own(state), batch_at(data, 5))[0] for _ in range(2))
  chex.assert_trees_all_equal(one, two)


def test_micro_batches_add_up_to_the_whole_batch(world):
  setup, data, step, state = world
  train = setup.config.train.model_copy(update={"accumulate": 2})
  parts = make_train_step(setup._replace(config=setup.config.model_copy(update={"train": train})))
  for i in range(2, 5):  # each from the same state: a gate's slope near zero sets runs apart
    batch = batch_at(data, i)
    batch = batch | {"mask": np.array(batch["mask"])}
    batch["mask"][0, 8:] = False  # the halves have different numbers of targets
    one, whole = step(own(state), batch)
    two, halves = parts(own(state), batch)
    chex.assert_trees_all_close(halves, whole, rtol=5e-4, atol=1e-6)
    chex.assert_trees_all_close(two.params, one.params, atol=1e-5)
    chex.assert_trees_all_close(two.tables, one.tables, atol=1e-5)
    chex.assert_trees_all_close(two.biases, one.biases, atol=1e-6)
    state = one


def test_memory_off_is_a_table_of_zeros(world):
  setup, data, _, state = world
  batch = batch_at(data, 2)
  on = make_eval_step(setup)
  off = make_eval_step(setup, memory=False)(state.params, state.biases, state.tables, batch)
  zeros = jax.tree.map(jnp.zeros_like, state.tables)
  np.testing.assert_array_equal(off, on(state.params, state.biases, zeros, batch))
  assert not np.array_equal(off, on(state.params, state.biases, state.tables, batch))


def test_training_and_evaluation_agree_on_the_loss(world):
  setup, data, step, state = world
  batch = batch_at(data, 2)
  nll_BT = make_eval_step(setup)(state.params, state.biases, state.tables, batch)
  mean = float(nll_BT.sum()) / batch["mask"].sum()
  _, metrics = step(own(state), batch)
  assert float(metrics["loss"]) == pytest.approx(mean, rel=1e-5)
