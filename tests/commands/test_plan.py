"""`python -m engram_jax plan`: exact numbers, no arrays, and mistakes named."""

import json
import subprocess
import sys

import jax
import pytest

from engram_jax.aot.topology import topology
from engram_jax.commands import plan
from engram_jax.config import EngramConfig, load_config
from engram_jax.errors import ConfigError
from engram_jax.memory.table import padded_rows
from engram_jax.model.counts import count
from engram_jax.training.state import init_state, make_setup

SMALL = {"model.width": 16, "model.vocab_size": 300, "train.batch_size": 1}


def run_plan(*argv: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", "engram_jax", "plan", *argv], capture_output=True, text=True
  )


def test_json_is_one_object_with_everything():
  done = run_plan("--config", "configs/moe_27b.yaml", "--json", "--train.steps", "3000")
  assert done.returncode == 0, done.stderr
  assert done.stderr == ""
  result = json.loads(done.stdout)
  counts = count(load_config("configs/moe_27b.yaml").model)
  assert result["parts"] == counts.parts
  assert result["total_parameters"] == counts.total_parameters
  assert result["active_parameters"] == counts.active_parameters
  assert result["memory_parameters"] == 0
  assert result["all_parameters"] == sum(result["parts"].values())
  assert result["rows"] == {}
  assert result["tokens_per_step"] == 1280 * 4096
  assert result["training_tokens"] == 3000 * 1280 * 4096
  assert result["training_flops_per_token"] == 3 * result["flops_per_token"]
  assert result["training_flops"] == result["training_flops_per_token"] * result["training_tokens"]
  assert result["bytes"].keys() == plan.BYTES.keys()


def test_an_unknown_key_leaves_with_code_2_and_the_nearest():
  done = run_plan("--config", "configs/moe_27b.yaml", "--model.engram.layrs", "1")
  assert (done.returncode, done.stdout) == (2, "")
  assert "model.engram.layrs" in done.stderr
  assert "--model.engram.layers" in done.stderr


def test_an_impossible_config_leaves_with_code_2():
  done = run_plan("--config", "configs/no_such.yaml", "--json")
  assert (done.returncode, done.stdout) == (2, "")
  assert "configs/no_such.yaml: no such config file" in done.stderr


def test_planning_does_not_import_jax():
  code = """
import contextlib, io, sys
from engram_jax.commands.plan import main
with contextlib.redirect_stdout(io.StringIO()):
  main(["--config", "configs/engram_40b.yaml", "--topology", "v5p:4x4x8"])
sys.exit("jax" in sys.modules)
"""
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_tables_show_parts_sums_rows_and_bytes(capsys):
  assert plan.main(["--config", "configs/engram_27b.yaml"]) == 0
  output = capsys.readouterr().out
  report = plan.make_plan(load_config("configs/engram_27b.yaml"))
  numbers = [
    *report["parts"].values(),
    *report["rows"].values(),
    *(report[name] for name in plan.SUMS),
  ]
  assert [n for n in numbers if f"{n:,}" not in output] == []
  assert all(word in output for name in plan.BYTES for word in name.split("_"))


def test_bytes_are_those_of_the_training_state():
  cfg = load_config("configs/tiny.yaml", SMALL)
  state = jax.eval_shape(lambda: init_state(make_setup(cfg, plan.table_layout(cfg.model))))
  sizes = plan.make_plan(cfg)["bytes"]

  def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

  assert nbytes(state.params) == sizes["parameters"]
  assert nbytes(state.tables.tables) == sizes["tables"]
  # Optimizers keep a few counters besides.
  assert 0 < nbytes(state.tables.optimizer) - sizes["table_optimizer"] < 64
  assert 0 < nbytes(state.optimizer) - sizes["optimizer"] < 64


def test_touched_rows_are_no_more_than_looked_up_and_no_more_than_there_are():
  tiny = load_config("configs/tiny.yaml", SMALL)
  small_tables = load_config("configs/tiny.yaml", SMALL | {"model.engram.rows_per_head": 11})
  engram = tiny.model.engram
  looked_up = len(engram.layers) * tiny.data.sequence_length * engram.hash_heads
  assert plan.make_plan(tiny)["bytes"]["table_gradients"] == 4 * looked_up * engram.row_width
  rows = sum(plan.make_plan(small_tables)["rows"].values())
  assert plan.make_plan(small_tables)["bytes"]["table_gradients"] == 4 * rows * engram.row_width


@pytest.mark.parametrize(
  ("optimizer", "dtype", "row"),
  [
    ("adam", "float32", 4 * 4 + 2 * 4 * 4 + 4),
    ("adam_catch_up", "bfloat16", 2 * 4 + 2 * 4 * 4 + 4),
    ("adagrad", "float32", 4 * 4 + 4),
    ("adagrad", "bfloat16", 2 * 4 + 4),
    ("sinkhorn", "bfloat16", 2 * 4 + 2 * 4),
  ],
)
def test_a_rows_bytes_follow_its_type_and_optimizer(optimizer, dtype, row):
  overrides = {"model.engram.table_dtype": dtype, "train.optimizer.table": optimizer}
  cfg = load_config("configs/tiny.yaml", SMALL | overrides | {"model.engram.row_width": 4})
  report = plan.make_plan(cfg)
  padded = sum(padded_rows(n) for n in report["rows"].values())
  assert report["bytes"]["tables"] + report["bytes"]["table_optimizer"] == padded * row


@pytest.mark.parametrize("placement", ["host", "file"])
def test_offloaded_tables_are_host_bytes(placement, capsys):
  on_device = plan.make_plan(load_config("configs/tiny.yaml", SMALL))
  argv = [f"--{name}={value}" for name, value in SMALL.items()]
  assert plan.main([*argv, "--json", f"--model.engram.placement={placement}"]) == 0
  offloaded = json.loads(capsys.readouterr().out)
  assert on_device["host_bytes"] == {}
  moved = ("tables", "table_optimizer")
  assert offloaded["host_bytes"] == {k: on_device["bytes"][k] for k in moved} | {
    "total": sum(on_device["bytes"][k] for k in moved)
  }
  for name, size in offloaded["bytes"].items():
    if name in (*moved, "total"):
      assert size < on_device["bytes"][name]
    else:
      assert size == on_device["bytes"][name]
  # A step holds as many rows of a table as it has gradients for.
  assert offloaded["bytes"]["tables"] == offloaded["bytes"]["table_gradients"]
  assert offloaded["bytes"]["total"] == sum(
    n for k, n in offloaded["bytes"].items() if k != "total"
  )
  assert plan.main([*argv, f"--model.engram.placement={placement}"]) == 0
  assert "on their host" in capsys.readouterr().out


def test_a_topology_divides_the_state():
  cfg = load_config("configs/engram_27b.yaml", {"mesh.data": 2, "mesh.fsdp": 0})
  sizes = plan.make_plan(cfg)["bytes"]
  divided = plan.divided_plan(cfg, topology("v5p:4x4x8"), sizes)
  assert divided["mesh"] == {"data": 2, "fsdp": 64, "expert": 1, "tensor": 1}
  assert divided["bytes_per_device"]["tables"] == -(-sizes["tables"] // 128)
  assert divided["bytes_per_device"]["parameters"] == -(-sizes["parameters"] // 64)
  assert (divided["devices"], "fits" in divided) == (128, False)


def test_mistakes_about_topologies_leave_with_code_2_before_compiling():
  engram = ("--config", "configs/engram_27b.yaml", "--compile")
  for argv, message in (
    ((), "--compile needs --topology"),
    (("--topology", "v5p:banana"), "'v5p:banana' is none of the known ones: v4:{2x2x1,"),
    (("--topology", "v5p:4x4x4", "--mesh.fsdp", "3"), "mesh.fsdp=3"),
    (("--topology", "v5p:4x4x4", "--train.batch_size", "100"), "batch_size"),
    (("--topology", "v5p:4x4x4", "--effort", "fast"), "'fast' is none of O0, O1, O2, O3"),
  ):
    done = run_plan(*engram, *argv)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert message in done.stderr


@pytest.mark.parametrize("rows", [1, 1023, 1024, 1025, 36_199_972])
def test_padding_is_that_of_the_tables(rows):
  assert -(-rows // plan.PAD_MULTIPLE) * plan.PAD_MULTIPLE == padded_rows(rows)


def test_primes_beyond_int32_are_a_config_mistake():
  cfg = load_config("configs/tiny.yaml")
  engram = EngramConfig(layers=(1,), heads=1, rows_per_head=(2**30, 2**30 - 1))
  model = cfg.model.model_copy(update={"engram": engram})
  with pytest.raises(ConfigError, match="no int32 row ids"):
    plan.make_plan(cfg.model_copy(update={"model": model}))
