"""train.py and eval.py with tables on the host or in files: the numbers of tables on the device."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from engram_jax.config import load_config
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.data.pipeline import prepare
from engram_jax.tables import saved_run
from engram_jax.training.state import TrainState, make_setup, restore_state

ROOT = pathlib.Path(__file__).parents[2]
PLACEMENT = "--model.engram.placement"
CLOCKS = ("tokens_per_second", "mfu", "rows/", "checkpoint/")  # what differs from run to run
STEPS = 24


@pytest.fixture(scope="module")
def runs(lab):
  """A run's folder for each placement."""
  folders = {}
  for placement in ("device", "host", "file"):
    done = lab.training(lab.folder / placement, PLACEMENT, placement)
    assert done.code == 0, done.err
    folders[placement] = lab.folder / placement / "t"
  return folders


def numbers(run: pathlib.Path) -> list[dict]:
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in lines]


def on_device(run: pathlib.Path, step: int) -> TrainState:
  """A checkpoint of any placement, as a run on the device finds it."""
  cfg = load_config(run / "config.yaml", {"model.engram.placement": "device"})
  data = prepare(cfg, lambda line: None)
  with Checkpoints(run / "checkpoints", keep=None) as checkpoints:
    return restore_state(checkpoints, step, make_setup(cfg, data.vocabulary.layout))


def assert_same_bits(left, right) -> None:
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("placement", ["host", "file"])
def test_placement_changes_no_number(runs, placement):
  assert numbers(runs[placement]) == numbers(runs["device"])
  for step in (16, 24):
    assert_same_bits(on_device(runs[placement], step), on_device(runs["device"], step))


def test_what_placement_costs_is_measured(runs):
  for placement in ("host", "file"):
    for line in map(json.loads, (runs[placement] / "metrics.jsonl").read_text().splitlines()):
      assert line["rows/wait_seconds"] >= 0
      assert line["rows/bytes_to_device"] > line["rows/bytes_from_device"] > 0
  assert '"rows/' not in (runs["device"] / "metrics.jsonl").read_text()


def test_off_the_device_only_written_rows_are_saved(runs):
  for placement in ("host", "file"):
    manifest = runs[placement] / "checkpoints" / "step_00000024" / "manifest.json"
    content = json.loads(manifest.read_text())["content"]
    assert [name for name in content["tree"] if name.startswith("tables")] == []
    files = {name for name in content["files"] if name.startswith("rows/")}
    assert files == {"rows/0.ids.npy", "rows/0.records.npy"}
    ids = np.load(manifest.parent / "rows" / "0.ids.npy")
    assert 0 < ids.size <= 420  # of 1,024 with padding


def test_files_of_rows_are_gone_when_the_run_is(runs):
  assert {path.name for path in runs["file"].iterdir()} == {
    path.name for path in runs["device"].iterdir()
  }


def test_evaluation_reads_rows_where_they_are(lab, runs):
  results = {}
  for placement, run in runs.items():
    done = lab.evaluation(run, "--json", "--tokens", "4")
    assert done.code == 0, done.err
    results[placement] = json.loads(done.out) | {"run": None}
  assert results["host"] == results["file"] == results["device"]


def test_a_run_goes_on_under_any_placement(lab, runs, tmp_path, monkeypatch):
  write = lab.train.MetricsWriter.write
  stops = {5: "device", 9: "host", 14: "file", STEPS: "device"}  # each after another

  def write_and_stop(self, step, values):
    write(self, step, values)
    if step in stops and step < STEPS and "loss" in values:
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(lab.train.MetricsWriter, "write", write_and_stop)
  for step, placement in stops.items():
    done = lab.training(tmp_path, PLACEMENT, placement)
    assert done.code == (0 if step == STEPS else 75), done.err
    assert f"step {step} saved" in done.err or step == STEPS
  assert numbers(tmp_path / "t") == numbers(runs["device"])
  assert_same_bits(on_device(tmp_path / "t", STEPS), on_device(runs["device"], STEPS))


def test_rows_can_be_read_from_any_checkpoint(runs, monkeypatch):
  monkeypatch.setattr(saved_run, "BLOCK_BYTES", 16 * 100)  # several blocks, and a rest
  tables = {}
  for placement, run in runs.items():
    with saved_run.load_run(run, STEPS, print) as saved:
      blocks = list(saved.rows(1))
    assert len(blocks) > 2
    tables[placement] = np.concatenate(blocks)
  assert tables["device"].shape == (420, 4)
  for table in tables.values():
    assert table.tobytes() == tables["device"].tobytes()


def test_saved_rows_that_were_damaged_are_not_used(lab, runs, tmp_path):
  run = pathlib.Path(shutil.copytree(runs["file"], tmp_path / "t"))
  for step, damage in ((24, -1), (16, 1)):
    path = run / "checkpoints" / f"step_{step:08d}" / "rows" / "0.records.npy"
    os.truncate(path, path.stat().st_size + damage)
  done = lab.training(tmp_path, PLACEMENT, "device")
  assert done.code == 5
  assert re.search(r"step 24: \S+ has \d+ bytes, .*; step 16: \S+ has \d+ bytes, ", done.err)
  done = lab.training(tmp_path, PLACEMENT, "device", "--run.start_over", "True")
  assert done.code == 0, done.err
  assert numbers(run) == numbers(runs["device"])


@pytest.mark.slow
def test_200_steps_of_the_real_program_are_the_same_bits(lab, tmp_path):
  """train.py as it is shipped, all optimizations on, 200 steps."""
  cfg = load_config(lab.config)
  for placement in ("device", "host", "file"):
    words = (sys.executable, "train.py", "--config", lab.config, "--run.root", tmp_path / placement)
    words += ("--train.steps", 200, "--train.checkpoint_every", 200, PLACEMENT, placement)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    subprocess.run([str(word) for word in words], cwd=ROOT, env=environment, check=True)
  runs = {
    placement: tmp_path / placement / cfg.run.name for placement in ("device", "host", "file")
  }
  assert len(numbers(runs["device"])) == 200
  for placement in ("host", "file"):
    assert numbers(runs[placement]) == numbers(runs["device"])
    assert_same_bits(on_device(runs[placement], 200), on_device(runs["device"], 200))
