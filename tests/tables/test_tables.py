"""Tables in a loop by hand: every placement gives the numbers of tables on the device."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import EngramConfig
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.memory.compress import TokenCompressor
from engram_jax.memory.hashing import HashLayout, row_ids
from engram_jax.memory.table import init_table
from engram_jax.tables import Tables, adagrad, adam, adam_catch_up, sinkhorn

V, B, T, C, STEPS = 40, 2, 6, 4, 4
LAYERS = (0, 2)
CONFIG = EngramConfig(layers=LAYERS, heads=2, row_width=C, rows_per_head=101)
LAYOUT = HashLayout.of(CONFIG, TokenCompressor.identity(V))
OPTIMIZERS = {f.__name__: f for f in (adagrad, adam, adam_catch_up, sinkhorn)}
PLACEMENTS = ("device", "host", "file")
KEY = jax.random.key(3)


def make(placement: str, tmp_path, optimizer="adam", dtype="float32") -> Tables:
  cfg = CONFIG.model_copy(update={"placement": placement, "table_dtype": dtype})
  return Tables(cfg, LAYOUT, OPTIMIZERS[optimizer](1e-2), folder=tmp_path)


def ids_at(step: int) -> dict[int, np.ndarray]:
  """Row ids of tokens that two steps share, so that rows are met again, and some missed once."""
  tokens = np.random.default_rng(step // 2).integers(0, V, (B, T))
  return {n: row_ids(LAYOUT, n, (tokens + 7 * (step % 2 == 1)) % V) for n in LAYERS}


def loss(rows, touched, weights):
  return sum(jnp.sum(jnp.sin(x) * weights) for x in touched.expand(rows).values())


grad = jax.jit(jax.grad(loss))


def trained(tables: Tables, steps=range(STEPS), state=None, **options):
  """The state after these steps, each of three calls outside jit."""
  state = tables.init(KEY) if state is None else state
  for i in steps:
    touched = tables.fetch(state, ids_at(i))
    weights = jax.random.normal(jax.random.key(i), (B, T, 4, C))
    state = tables.update(state, touched, grad(touched.rows, touched, weights), **options)
  return state


def every_row(tables: Tables, state) -> dict[int, np.ndarray]:
  return {n: np.asarray(tables.lookup(state, every_id())[n]) for n in LAYERS}


def every_id() -> dict[int, np.ndarray]:
  return {n: np.arange(LAYOUT.rows[n]) for n in LAYERS}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_placement_trains_the_same_rows(tmp_path, optimizer):
  found = {}
  for placement in PLACEMENTS[: 2 if optimizer == "adam_catch_up" else 3]:
    with make(placement, tmp_path, optimizer) as tables:
      state = tables.flush(trained(tables))
      found[placement] = every_row(tables, state)
  for placement, rows in found.items():
    chex.assert_trees_all_close(rows, found["device"], atol=1e-7, custom_message=placement)
  start = every_row(tables := make("device", tmp_path), tables.init(KEY))
  for n, rows in found["device"].items():
    touched = np.unique(np.stack([ids_at(i)[n] for i in range(STEPS)]))
    moved = np.flatnonzero((rows != start[n]).any(1))
    assert set(moved) <= set(touched)
    assert len(moved) > 0.9 * len(touched)


def test_under_one_jit_and_outside_of_it_are_the_same(tmp_path):
  tables = make("device", tmp_path, "adam_catch_up")
  weights = jax.random.normal(jax.random.key(0), (B, T, 4, C))

  def step(state, ids):
    touched = tables.fetch(state, ids)
    return tables.update(state, touched, jax.grad(loss)(touched.rows, touched, weights))

  one = two = tables.init(KEY)
  jitted = jax.jit(step)
  for i in range(STEPS):
    one, two = step(one, ids_at(i)), jitted(two, ids_at(i))
  chex.assert_trees_all_close(one, two, atol=1e-6)


def test_expanded_rows_are_those_of_the_table(tmp_path):
  for placement in PLACEMENTS:
    with make(placement, tmp_path) as tables:
      state, ids = tables.init(KEY), ids_at(0)
      touched = tables.fetch(state, ids)
      chex.assert_trees_all_equal(touched.expand(touched.rows), tables.lookup(state, ids))
      chex.assert_shape(touched.expand(touched.rows)[2], (B, T, 4, C))


def test_rows_are_those_of_init_table(tmp_path):
  tables = make("device", tmp_path)
  state = tables.init(KEY)
  for n in LAYERS:
    key = jax.random.fold_in(KEY, 1 + n)
    chex.assert_trees_all_equal(state.tables[n], init_table(key, LAYOUT.rows[n], C, std=0.02))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_step_that_is_not_ok_leaves_all_as_it_was(tmp_path, placement):
  with make(placement, tmp_path) as tables:
    state = trained(tables, range(2))
    before, count = every_row(tables, state), jax.device_get(state.optimizer[0].count)
    state = trained(tables, range(2, 3), state, ok=False)
    chex.assert_trees_all_equal(every_row(tables, state), before)
    assert state.optimizer[0].count == count == 2


@pytest.mark.parametrize("optimizer", ["adam", "adagrad", "sinkhorn"])
def test_scale_multiplies_the_learning_rate_of_a_step(tmp_path, optimizer):
  tables = make("device", tmp_path, optimizer)
  start = every_row(tables, tables.init(KEY))
  one, half = (every_row(tables, trained(tables, [0], scale=s)) for s in (None, 0.5))
  for n in LAYERS:
    np.testing.assert_allclose(half[n] - start[n], (one[n] - start[n]) / 2, atol=1e-7)


def test_grad_scale_multiplies_the_gradients(tmp_path):
  tables = make("device", tmp_path, "adagrad")
  one, zero = (trained(tables, [0], grad_scale=s) for s in (1.0, 0.0))
  twice = trained(tables, [0], grad_scale=2.0)
  square = {k: s.optimizer[0].square_R for k, s in (("one", one), ("twice", twice))}
  np.testing.assert_allclose(square["twice"], 4 * square["one"], rtol=1e-5)
  chex.assert_trees_all_equal(zero.tables, tables.init(KEY).tables)


def test_rows_that_catch_up_have_no_scale(tmp_path):
  tables = make("device", tmp_path, "adam_catch_up")
  with pytest.raises(ValueError, match="a learning rate that is a function of the step"):
    trained(tables, [0], scale=0.5)


def test_row_ids_are_asked_for_every_layer_with_a_table(tmp_path):
  tables = make("device", tmp_path)
  ids = ids_at(0)
  with pytest.raises(ValueError, match=r"row ids of layers \[0\].*\(0, 2\)"):
    tables.fetch(tables.init(KEY), {0: ids[0]})


@pytest.mark.parametrize("saved", PLACEMENTS)
@pytest.mark.parametrize("restored", PLACEMENTS)
def test_a_state_goes_on_under_any_placement(tmp_path, saved, restored):
  rest = {"params": {"w": jnp.arange(3.0)}, "step": jnp.int32(2)}
  with make("device", tmp_path) as tables:
    expected = every_row(tables, trained(tables))
  with Checkpoints(tmp_path / "saved", keep=1) as checkpoints:
    with make(saved, tmp_path) as tables:
      state = trained(tables, range(2))
      tables.save(checkpoints, 2, state, rest, {"note": "half"})
      checkpoints.wait()
    with make(restored, tmp_path) as tables:
      state, found = tables.restore(checkpoints, 2, rest, KEY)
      chex.assert_trees_all_equal(found, rest)
      assert checkpoints.meta(2) == {"note": "half"}
      state = trained(tables, range(2, STEPS), state)
      chex.assert_trees_all_close(every_row(tables, state), expected, atol=1e-7)


def test_tables_off_the_devices_are_for_one_of_them():
  mesh = type("Mesh", (), {"size": 2})()
  cfg = CONFIG.model_copy(update={"placement": "host"})
  with pytest.raises(ValueError, match="placement='host' is for one device, not for 2"):
    Tables(cfg, LAYOUT, adam(1e-2), mesh)


def test_without_a_memory_there_is_nothing_to_do(tmp_path):
  tables = Tables(EngramConfig(), None, adam(1e-2))
  state = tables.init(KEY)
  touched = tables.fetch(state, {})
  assert jax.tree.leaves((state, touched)) == []
  assert tables.update(tables.flush(state), touched, {}) == state
