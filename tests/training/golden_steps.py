"""Losses and gradient norms of the first training steps, kept in tests/golden/steps.json.

    python tests/training/golden_steps.py            compares all cases
    python tests/training/golden_steps.py --write    replaces the file

Three steps, because the second loss sees the first update and the third a row's absence. Programs
are compiled quickly rather than well, which changes their last bits: the figures are of such ones.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "steps.json"
TABLES = ("adam", "adam_catch_up", "adagrad", "sinkhorn")
STEPS, B, T, V = 3, 8, 16, 304
CONFIG = {
  "model.vocab_size": V,
  "model.width": 16,
  "model.layers": 2,
  "model.attention.heads": 2,
  "model.attention.latent": 8,
  "model.attention.nope_dim": 8,
  "model.attention.rope_dim": 4,
  "model.attention.value_dim": 8,
  "model.moe.routed_experts": 4,
  "model.moe.expert_width": 16,
  "model.moe.dense_width": 32,
  "model.residual.branches": 2,
  "model.residual.sinkhorn_iterations": 2,
  "model.engram.layers": [0, 1],
  "model.engram.heads": 2,
  "model.engram.row_width": 4,
  "model.engram.rows_per_head": 509,
  "data.sequence_length": T,
  "train.batch_size": B,
  "train.optimizer.learning_rate": 1e-2,
  "train.optimizer.newton_schulz_steps": 2,
  "train.schedule.warmup_steps": 2,
}
# Where a score or a gate's logit passes zero, top-k and the signed square root jump, and the last
# bit of a sum decides: cases that are compared across devices leave them out.
SMOOTH = {
  "model.moe.routed_experts": 0,
  "model.residual.branches": 1,
  "model.engram.gate": "sigmoid",
}
MESH = {"data": 2, "fsdp": 2, "tensor": 2}

MOVED = """\
a golden step moved. If nothing was meant to change a number, find the commit that did:
`git bisect run python tests/training/golden_steps.py`. If another sum was meant, run it with
--write, look at what moved and by how much (`git diff tests/golden/steps.json`), and say why in
the commit."""


def changes(table: str, placement: str = "device") -> dict:
  """Overrides of a case; "default" is Adam with the gate and the experts of configs/tiny.yaml."""
  if table == "default":
    return CONFIG | {"model.engram.placement": placement}
  smooth = SMOOTH | {"train.optimizer.table": table, "model.engram.placement": placement}
  return CONFIG | smooth | ({"model.engram.exchange_capacity": 0.3} if table == "adagrad" else {})


def batch(step: int, layout) -> dict[str, np.ndarray]:
  """Random tokens; row ids of a pool that two steps share, so that some rows are missed once."""
  random, pool = np.random.default_rng(step), np.random.default_rng(step // 2)
  tokens = random.integers(0, V, (B, T + 1)).astype(np.int32)
  shape = (B, T, layout.hash_heads)
  rows = [random.choice(pool.integers(0, layout.rows[n], 300), shape) for n in layout.layers]
  return {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "mask": random.random((B, T)) < 0.9,
    "segments": np.zeros((B, T), np.int32),
    "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy(),
    "row_ids": np.stack(rows).astype(np.int32),
  }


def run(table: str, placement: str) -> dict[str, list[float]]:
  """{"loss": ..., "grad_norm": ...} of the steps; placement: device, host, or eight."""
  import jax

  from engram_jax.config import load_config
  from engram_jax.core.mesh import make_mesh, to_global
  from engram_jax.model.counts import table_layout
  from engram_jax.training.state import init_state, make_setup
  from engram_jax.training.step import make_train_step

  cfg = load_config(None, changes(table, "host" if placement == "host" else "device"))
  layout = table_layout(cfg.model)
  sizes, devices = (MESH, jax.devices()) if placement == "eight" else ({}, jax.devices()[:1])
  mesh = make_mesh(sizes, devices)
  setup = make_setup(cfg, layout, mesh)
  seen: dict[str, list[float]] = {"loss": [], "grad_norm": []}
  with setup.tables as tables:
    state, step = init_state(setup), make_train_step(setup)
    for each in tables.prefetch(state.tables, (batch(i, layout) for i in range(STEPS))):
      state, metrics = step(state, to_global(each, mesh, B))
      for name in seen:
        seen[name].append(float(metrics[name]))
  return seen


def golden(table: str, placement: str) -> dict[str, list[float]]:
  """Values of the file; tables on the host give the numbers of tables on the device."""
  stored = json.loads(GOLDEN.read_text())
  return stored["eight" if placement == "eight" else "device"][table]


def assert_close(found: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
  """AssertionError, saying what to do, unless these are the numbers of the file."""
  for name, rtol in (("loss", 1e-6), ("grad_norm", 2e-5)):
    np.testing.assert_allclose(found[name], expected[name], rtol=rtol, err_msg=MOVED)


def main() -> None:
  import jax

  jax.config.update("jax_disable_most_optimizations", True)
  if "--eight" in sys.argv:
    jax.config.update("jax_num_cpu_devices", 8)
    print(json.dumps({table: run(table, "eight") for table in TABLES}))
    return
  command = [sys.executable, __file__, "--eight"]
  done = subprocess.run(command, env=os.environ, stdout=subprocess.PIPE, text=True, check=True)
  found = {
    "device": {table: run(table, "device") for table in ("default", *TABLES)},
    "eight": json.loads(done.stdout),
  }
  if "--write" in sys.argv:
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    return
  for placement, tables in (found | {"host": {t: run(t, "host") for t in TABLES}}).items():
    for table, values in tables.items():
      assert_close(values, golden(table, placement))


if __name__ == "__main__":
  main()
