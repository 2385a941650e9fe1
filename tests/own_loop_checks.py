"""Checks of docs/own_loop.py on any mesh; tests/tables and tests/eight run the file itself."""

import importlib.util
import pathlib
from types import ModuleType

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from compilation import USER_EMITTERS
from flax import nnx
from jax.sharding import Mesh

from engram_jax.aot.collectives import makers
from engram_jax.memory.compress import TokenCompressor
from engram_jax.memory.hashing import HashLayout, row_ids
from engram_jax.memory.table import lookup
from engram_jax.tables import adam

PATH = pathlib.Path(__file__).parents[1] / "docs" / "own_loop.py"
ADAM = (1e-2, 0.9, 0.95, 1e-3)  # an eps that no rounding of a small gradient shows through


def load() -> ModuleType:
  """docs/own_loop.py as a module."""
  spec = importlib.util.spec_from_file_location("own_loop", PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def check(loop: ModuleType, mesh: Mesh) -> None:
  """A step moves touched rows as a dense table and dense Adam would, and no other row; its program
  makes no gradient of a table's size; the loss falls."""
  layout = HashLayout.of(loop.MEMORY, TokenCompressor.identity(loop.V))
  state, step = loop.make_training(mesh, adam(*ADAM))
  before = jax.tree.map(np.asarray, state[2].tables)
  tokens = next(loop.batches(mesh))
  dense, dense_loss = dense_step(loop, layout, state, tokens)
  # With the emitters that a user has: those of tests/conftest.py write rows in a loop.
  compiled = step.lower(state, tokens).compile(USER_EMITTERS)
  state, loss = compiled(state, tokens)

  chex.assert_trees_all_close(loss, dense_loss, rtol=1e-5)
  for layer, table in state[2].tables.items():
    touched = np.unique(row_ids(layout, layer, np.asarray(tokens)[:, :-1]))
    table, expected = np.asarray(table), np.asarray(dense[layer])
    chex.assert_trees_all_close(table[touched], expected[touched], atol=1e-6)
    assert (table[touched] != before[layer][touched]).any(1).all()
    rest = np.setdiff1d(np.arange(len(table)), touched)
    chex.assert_trees_all_equal(table[rest], before[layer][rest])

  rows = max(table.shape[0] for table in before.values()) // mesh.size
  made = {i.opcode for i in makers(compiled.as_text(), rows)}
  assert made <= {"scatter", "fusion"}, made  # written in place: a gradient would be a broadcast
  own = sum(x.nbytes for x in jax.tree.leaves(state[2])) // mesh.size
  assert compiled.memory_analysis().alias_size_in_bytes >= own

  losses = [loss]
  for _, tokens in zip(range(8), loop.batches(mesh), strict=False):
    state, loss = compiled(state, tokens)
    losses.append(loss)
  assert losses[-1] < losses[0] - 0.2


def dense_step(loop, layout: HashLayout, state, tokens):
  """(tables, loss) of a step of dense Adam, by the gradient of whole tables, on one device."""
  graphdef, _ = nnx.split(loop.Transformer(rngs=nnx.Rngs(0)), nnx.Param)
  params, tables = jax.tree.map(jnp.asarray, jax.device_get((state[0], state[2].tables)))
  tokens = jnp.asarray(jax.device_get(tokens))

  def loss_fn(tables):
    inputs = tokens[:, :-1]
    rows = {n: lookup(tables[n], row_ids(layout, n, inputs)) for n in tables}
    logits_BTV = nnx.merge(graphdef, params)(inputs, rows)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens[:, 1:]).mean()

  loss, grads = jax.jit(jax.value_and_grad(loss_fn))(tables)
  optimizer = optax.adam(*ADAM)
  updates, _ = optimizer.update(grads, optimizer.init(tables))
  return optax.apply_updates(tables, updates), loss
