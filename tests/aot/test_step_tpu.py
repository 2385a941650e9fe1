"""The whole train step, as the TPU's compiler takes it; it needs no TPU."""

import re

import pytest

from engram_jax.aot.report import compile_report, lower_train_step
from engram_jax.aot.topology import abstract_devices, topology
from engram_jax.config import load_config
from engram_jax.core.mesh import make_mesh
from engram_jax.memory.table import padded_rows
from engram_jax.model.counts import table_layout

SLICE = topology("v5p:2x2x2")
TINY = {"model.layers": 2, "mesh.data": 1, "mesh.fsdp": 8}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized")]


def test_micro_batches_compile():
  """A pass of the compiler fails on them, or worse, where it is not switched off."""
  pytest.importorskip("libtpu")
  cfg = load_config("configs/tiny.yaml", TINY | {"train.accumulate": 2})
  found = compile_report(lower_train_step, cfg, SLICE, code=False)
  assert found["fits"]
  assert found["flops"] > 0


def test_the_step_takes_and_gives_tables_by_rows():
  """The table, its two moments, each as an argument and as a result."""
  pytest.importorskip("libtpu")
  cfg = load_config("configs/tiny.yaml", TINY)
  mesh = make_mesh(cfg.mesh_sizes(SLICE.devices), abstract_devices(SLICE))
  rows = padded_rows(table_layout(cfg.model).rows[1])
  table = rf"tensor<{rows}x{cfg.model.engram.row_width}xf32>"
  text = lower_train_step(cfg, mesh).as_text()
  signature = text[text.index("@main") :].splitlines()[0]
  assert len(re.findall(table + r' \{[^}]*?mhlo.layout_mode = "\{1,0\}"', signature)) == 6
