"""The train step on eight devices gives the losses of one, whatever the split."""

import functools

import jax
import numpy as np
import pytest

from engram_jax.aot.collectives import collectives, has_array_with_rows
from engram_jax.aot.report import lower_train_step
from engram_jax.config import load_config
from engram_jax.core.mesh import make_mesh, to_global
from engram_jax.model.counts import table_layout
from engram_jax.training.state import init_state, make_setup
from engram_jax.training.step import make_train_step

B, T, V, STEPS = 8, 16, 304, 20
SMALL = {
  "model.vocab_size": V,
  "model.width": 16,
  "model.layers": 2,
  "model.attention.heads": 4,
  "model.attention.latent": 8,
  "model.attention.nope_dim": 8,
  "model.attention.rope_dim": 4,
  "model.attention.value_dim": 8,
  "model.moe.routed_experts": 4,
  # Where a score or a gate's logit passes zero, top-k and the signed square root jump (the slope of
  # the latter is 500 there): the last bit of a sum decides, and two runs drift apart however exact
  # each step is. Both are tested by themselves.
  "model.moe.top_k": 4,
  "model.engram.gate": "sigmoid",
  "model.moe.expert_width": 16,
  "model.moe.dense_width": 32,
  "model.residual.branches": 1,
  "model.engram.layers": [0, 1],
  "model.engram.heads": 2,
  "model.engram.row_width": 4,
  "model.engram.rows_per_head": 1009,
  "data.sequence_length": T,
  "train.batch_size": B,
  "train.optimizer.learning_rate": 1e-3,
  "train.optimizer.newton_schulz_steps": 2,
  "train.schedule.warmup_steps": 2,
}
SPLITS = {
  "all but data": (
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"model.engram.exchange_capacity": 0.2},
  ),
  "micro-batches, overflow rounds": (
    {"data": 2, "fsdp": 2},
    {"train.accumulate": 2, "model.engram.exchange_capacity": 0.05},
  ),
}
SLOW = {
  "data": ({"data": 8}, {}),  # divided by it, the batch is in "micro-batches" too
  "fsdp, catch-up": ({"fsdp": 8}, {"train.optimizer.table": "adam_catch_up"}),
  "expert and data, adagrad": ({"data": 2, "expert": 4}, {"train.optimizer.table": "adagrad"}),
  "tensor, sinkhorn": ({"fsdp": 2, "tensor": 4}, {"train.optimizer.table": "sinkhorn"}),
}


def batch(step: int, layout) -> dict[str, np.ndarray]:
  """Tokens of any kind, and row ids of which some are far more frequent than others."""
  random = np.random.default_rng(step)
  token = lambda high: random.integers(0, high, (B, T), np.int32)
  rows = [random.zipf(1.3, (B, T, 4)) * 7919 % layout.rows[layer] for layer in layout.layers]
  return {
    "tokens": token(V),
    "targets": token(V),
    "mask": random.random((B, T)) < 0.9,
    "segments": np.zeros((B, T), np.int32),
    "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy(),
    "row_ids": np.stack(rows).astype(np.int32),
  }


def losses(cfg, mesh) -> tuple[list[float], list[np.ndarray], float]:
  """20 losses, the tables after them, and the most rounds any exchange took."""
  layout = table_layout(cfg.model)
  setup = make_setup(cfg, layout, mesh)
  state, step = init_state(setup), make_train_step(setup)
  seen, rounds = [], 0.0
  for i in range(STEPS):
    state, metrics = step(state, to_global(batch(i, layout), mesh, B))
    seen.append(float(metrics["loss"]))
    rounds = max(rounds, float(metrics.get("exchange_rounds", 0)))
  tables = [np.asarray(state.tables.tables[n])[: layout.rows[n]] for n in layout.layers]
  return seen, tables, rounds


@functools.cache
def alone(table: str):
  cfg = load_config(None, SMALL | {"train.optimizer.table": table})
  return losses(cfg, make_mesh({}, jax.devices()[:1]))


@pytest.mark.parametrize(
  "name", [*SPLITS, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]
)
def test_every_split_gives_the_losses_of_one_device(name):
  sizes, changes = (SPLITS | SLOW)[name]
  cfg = load_config(None, SMALL | changes)
  devices = jax.devices()[: int(np.prod(list(sizes.values())))]
  here, tables, rounds = losses(cfg, make_mesh(sizes, devices))
  expected, expected_tables, _ = alone(cfg.train.optimizer.table)
  np.testing.assert_allclose(here, expected, rtol=1e-5)
  for ours, theirs in zip(tables, expected_tables, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
  assert (rounds > 1) == (cfg.model.engram.exchange_capacity < 1)


def test_the_step_makes_nothing_as_large_as_a_table_and_moves_no_part_of_one(optimized):
  """20 times the table is the same program with other numbers in a few places."""
  mesh = make_mesh({"fsdp": 8})
  # A small backbone, whose size does not matter here, and one memory.
  backbone = {"model.moe.routed_experts": 0, "model.layers": 1, "model.engram.layers": [0]}
  large = load_config(None, SMALL | backbone | {"model.engram.rows_per_head": 400_009})
  compiled = lower_train_step(large, mesh).compile()
  text, rows = compiled.as_text(), 1_600_512
  assert rows in {-(-n // 1024) * 1024 for n in table_layout(large.model).rows.values()}
  assert not has_array_with_rows(text, rows)
  assert all(rows // 8 not in a.dims for c in collectives(text) for a in c.shapes)
  shard_bytes = rows // 8 * 4 * 4
  assert compiled.memory_analysis().temp_size_in_bytes < shard_bytes
