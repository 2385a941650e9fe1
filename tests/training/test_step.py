"""One training step: what moves, what does not, and what a number that is not one may change."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import load_config
from engram_jax.data.pipeline import prepare
from engram_jax.training.evaluate import evaluate, make_eval_step
from engram_jax.training.state import init_state
from engram_jax.training.step import make_train_step

LAYER = 1  # the one with a memory


@pytest.fixture(scope="module")
def world(lab):
  """Setup, prepared data, compiled step, and the state after two steps (moments are not zero)."""
  cfg = load_config(lab.config)
  data = prepare(cfg, lambda line: None)
  setup = lab.train.make_setup(cfg, data.vocabulary.layout)
  step = lab.train.make_train_step(setup)
  state = init_state(setup)
  for i in range(2):
    state, _ = step(state, batch_at(data, i))
  return setup, data, step, state


def batch_at(data, step: int) -> dict:
  return data.training_pipeline().batch_at(step)


def copy_of(state):
  """A copy of a tree of arrays, which may be donated."""
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
  new, metrics = step(copy_of(state), batch)
  still = jax.tree.map(lambda a, b: bool((a == b).all()), state.params, new.params)
  stayed = {jax.tree_util.keystr(path) for path, s in jax.tree.leaves_with_path(still) if s}
  # Mixing the streams changes nothing where they are still copies of one another, nor in the last
  # block, after which they are averaged: there the gradient is zero up to rounding.
  assert all("_res']" in path for path in stayed), stayed
  touched = np.unique(batch["row_ids"][0])
  before, after = (np.asarray(s.tables.tables[LAYER]) for s in (state, new))
  np.testing.assert_array_equal(np.flatnonzero((before != after).any(-1)), touched)
  before, after = (s.tables.optimizer[LAYER] for s in (state, new))
  counted = np.flatnonzero(np.asarray(after.touched_R) - np.asarray(before.touched_R))
  np.testing.assert_array_equal(counted, touched)
  for old, now in ((before.mu_RC, after.mu_RC), (before.nu_RC, after.nu_RC)):
    rest = np.setdiff1d(np.arange(old.shape[0]), touched)
    np.testing.assert_array_equal(np.asarray(old)[rest], np.asarray(now)[rest])
  assert metrics["unique_rows/layer_1"] == pytest.approx(touched.size / batch["row_ids"].size)


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("where", ["parameter", "row"])
def test_a_value_that_is_not_finite_changes_only_the_counters(world, where, value):
  _, data, step, state = world
  batch = batch_at(data, 2)
  if where == "row":
    row = int(batch["row_ids"][0, 0, 0, 0])
    table = state.tables.tables[LAYER].at[row].set(value)
    tables = copy_of(state.tables)._replace(tables={LAYER: table})
    poisoned = copy_of(state)._replace(tables=tables)
  else:
    leaves, tree = jax.tree.flatten(copy_of(state.params))
    largest = max(range(len(leaves)), key=lambda i: leaves[i].size)
    leaves[largest] = leaves[largest].at[:].set(value)
    poisoned = copy_of(state)._replace(params=jax.tree.unflatten(tree, leaves))
  after, metrics = step(copy_of(poisoned), batch)
  assert_only_counters_moved(poisoned, after, nonfinite_streak=1)
  assert int(metrics["nonfinite_total"]) == 1


def test_the_count_in_a_row_starts_again_after_a_good_step(world):
  _, data, step, state = world
  state = copy_of(state)._replace(nonfinite_streak=jnp.int32(7), nonfinite_total=jnp.int32(9))
  after, _ = step(state, batch_at(data, 2))
  assert (int(after.nonfinite_streak), int(after.nonfinite_total)) == (0, 9)


def test_masked_targets_do_not_count(world):
  _, data, step, state = world
  batch = batch_at(data, 2)
  masked = batch | {"mask": np.array(batch["mask"])}
  masked["mask"][0] = False
  changed = masked | {"targets": np.where(masked["mask"], masked["targets"], 7)}
  one, metrics = step(copy_of(state), masked)
  two, _ = step(copy_of(state), changed)
  chex.assert_trees_all_equal(one, two)
  assert int(metrics["tokens"]) == masked["mask"].sum()


def test_a_step_is_a_function_of_state_and_batch(world):
  _, data, step, state = world
  one, two = (step(copy_of(state), batch_at(data, 5))[0] for _ in range(2))
  chex.assert_trees_all_equal(one, two)


def test_micro_batches_add_up_to_the_whole_batch(world):
  setup, data, step, state = world
  train = setup.config.train.model_copy(update={"accumulate": 2})
  parts = make_train_step(setup._replace(config=setup.config.model_copy(update={"train": train})))
  for i in range(2, 5):  # each from the same state: a gate's slope near zero sets runs apart
    batch = batch_at(data, i)
    batch = batch | {"mask": np.array(batch["mask"])}
    batch["mask"][0, 8:] = False  # the halves have different numbers of targets
    one, whole = step(copy_of(state), batch)
    two, halves = parts(copy_of(state), batch)
    chex.assert_trees_all_close(halves, whole, rtol=5e-4, atol=1e-6)
    chex.assert_trees_all_close(two.params, one.params, atol=1e-5)
    chex.assert_trees_all_close(two.tables, one.tables, atol=1e-5)
    chex.assert_trees_all_close(two.biases, one.biases, atol=1e-6)
    state = one


def test_memory_off_is_a_table_of_zeros(world):
  setup, data, _, state = world
  step, batch = make_eval_step(setup), batch_at(data, 2)
  zeros = jax.tree.map(jnp.zeros_like, state.tables.tables)
  zeroed = state._replace(tables=state.tables._replace(tables=zeros))

  def losses(state, memory):
    """The losses [B, T] of the step that `evaluate` takes."""
    seen = []

    def seen_step(*args):
      seen.append(step(*args))
      return seen[-1]

    evaluate(seen_step, setup, state, [batch], data.token_bytes, data.source_names, memory=memory)
    (nll_BT,) = seen
    return np.asarray(nll_BT)

  off = losses(state, memory=False)
  np.testing.assert_array_equal(off, losses(zeroed, memory=True))
  assert not np.array_equal(off, losses(state, memory=True))


def test_training_and_evaluation_agree_on_the_loss(world):
  setup, data, step, state = world
  batch = batch_at(data, 2)
  rows = setup.tables.lookup(state.tables, setup.tables.batch_ids(batch))
  nll_BT = make_eval_step(setup)(state.params, state.biases, tuple(rows.values()), batch)
  mean = float(nll_BT.sum()) / batch["mask"].sum()
  _, metrics = step(copy_of(state), batch)
  assert float(metrics["loss"]) == pytest.approx(mean, rel=1e-5)
