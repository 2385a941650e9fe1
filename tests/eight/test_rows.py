"""Table optimizers on a table whose rows are divided over eight devices: what one device gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from engram_jax.config import OptimizerConfig
from engram_jax.core.mesh import AXES, make_mesh
from engram_jax.tables.table_optimizer import table_optimizer

R, C, U, STEPS, DEVICES = 64, 8, 5, 4, 8
KINDS = ("adam", "adam_catch_up", "adagrad", "sinkhorn")
BY_ROWS, EVERYWHERE = PartitionSpec(AXES), PartitionSpec()


def _specs(state):
  return jax.tree.map(lambda x: BY_ROWS if x.ndim else EVERYWHERE, state)


def _batches():
  """(ids [8, U], grads [8, U, C], ok): local ids of every shard, rising, then fill; one shard of
  the first batch has none, and the third step is not ok."""
  rng = np.random.default_rng(0)
  for step in range(STEPS):
    ids = np.full((DEVICES, U), 2**31 - 1, np.int32)
    for shard in range(DEVICES):
      count = 0 if (step, shard) == (0, 3) else rng.integers(1, U + 1)
      ids[shard, :count] = np.sort(rng.choice(R // DEVICES, count, replace=False))
    yield ids, rng.normal(size=(DEVICES, U, C)).astype(np.float32), step != 2


def _whole(ids, grads):
  """The batch for one device: ids of the whole table, its fill last."""
  inside = ids < R // DEVICES
  rows = (ids + np.arange(DEVICES)[:, None] * (R // DEVICES))[inside].astype(np.int32)
  fill = ids.size - rows.size
  return (
    np.append(rows, np.full(fill, 2**31 - 1, np.int32)),
    np.append(grads[inside], np.full((fill, C), np.nan, np.float32), 0),
  )


def _step_on_shards(optimizer, mesh, state):
  def step(table, state, ids, grads, ok):
    first_row = jax.lax.axis_index(AXES) * table.shape[0]
    table, state = optimizer.sync(table, state, ids[0], first_row=first_row)
    return optimizer.update(grads[0], state, table, ids[0], ok, first_row=first_row, axes=AXES)

  specs = (BY_ROWS, _specs(state))
  in_specs = (*specs, BY_ROWS, BY_ROWS, EVERYWHERE)
  return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=specs))


def _flush_on_shards(optimizer, mesh, state):
  def flush(table, state):
    return optimizer.flush(table, state, first_row=jax.lax.axis_index(AXES) * table.shape[0])

  specs = (BY_ROWS, _specs(state))
  return jax.jit(jax.shard_map(flush, mesh=mesh, in_specs=specs, out_specs=specs))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_eight_shards_give_what_one_device_gives(kind, dtype):
  optimizer = table_optimizer(OptimizerConfig(table=kind), lambda step: 4e-3 / (1.0 + step))
  mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  table = jax.random.normal(jax.random.key(0), (R, C)).astype(dtype)
  state = optimizer.init(table)
  place = lambda x: jax.device_put(x, NamedSharding(mesh, BY_ROWS if x.ndim else EVERYWHERE))
  shards = jax.tree.map(place, (table, state))
  one = (table, state)
  step = _step_on_shards(optimizer, mesh, state)

  @jax.jit
  def step_one(table, state, ids, grads, ok):
    return optimizer.update(grads, *reversed(optimizer.sync(table, state, ids)), ids, ok)

  for ids, grads, ok in _batches():
    shards = step(*shards, ids, grads, np.bool_(ok))
    one = step_one(*one, *_whole(ids, grads), np.bool_(ok))
  shards = _flush_on_shards(optimizer, mesh, state)(*shards)
  one = jax.jit(optimizer.flush)(*one)

  for a, b in zip(jax.tree.leaves(shards), jax.tree.leaves(one), strict=True):
    spacing = 2**-7 if a.dtype == jnp.bfloat16 else 1e-6
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, atol=1e-6, rtol=spacing)
    # A sum over a row or over devices may round differently; the noise may not.
    if spacing == 2**-7:
      assert (a != b).mean() <= (0.02 if kind in ("adagrad", "sinkhorn") else 0)
  assert shards[1].count == STEPS - 1
  assert shards[0].sharding == NamedSharding(mesh, BY_ROWS)
