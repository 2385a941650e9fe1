"""Runs with offloaded tables are exported and imported as those with tables on the device are."""

import json

import numpy as np
import pytest

from engram_jax import __main__ as package
from engram_jax.core import manifest
from engram_jax.inference.stores.file import FileRows
from engram_jax.tables.saved_run import load_run

pytestmark = pytest.mark.usefixtures("beside_the_text")

# From step 12 on nothing moves, unless the schedule is another than the run's.
DECAYED = ("--train.schedule.decay_at", 0.5, "--train.schedule.decay_to", 0)
BF16 = ("--model.engram.table_dtype", "bfloat16")
CASES = {  # rows that lag behind; rows of two bytes that are never all in memory
  "device": ("--train.optimizer.table", "adam_catch_up", *BF16),
  "host": ("--train.optimizer.table", "adam_catch_up", *BF16),
  "file": BF16,
}


def shard_bytes(folder):
  return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def read_weights(run, step):
  """{path: array} of parameters, and the rows of the table."""
  with load_run(run, step, print) as saved:
    tree = manifest.read(saved.checkpoints.folder(step))["tree"]
    paths = [path for path in tree if path.startswith("params/")]
    arrays = {path: saved.checkpoints.open_array(step, path).read() for path in paths}
    rows = list(saved.rows(1))
  assert {part.dtype for part in rows} == {np.dtype("float32")}
  return arrays | {"rows": np.concatenate(rows)}


def options(placement):
  return ("--model.engram.placement", placement, *CASES[placement], *DECAYED)


@pytest.fixture(scope="module")
def runs(lab):
  for placement in CASES:
    done = lab.training(lab.folder / placement, *options(placement))
    assert done.code == 0, done.err
  return {placement: lab.folder / placement / "t" for placement in CASES}


@pytest.fixture(scope="module")
def command(lab):
  """`python -m engram_jax ...` in this process."""
  return lambda *argv: lab.run(package, *argv)


@pytest.fixture(scope="module")
def exported(lab, runs, command):
  """Exports of step 16, when rows lag behind."""
  for placement, run in runs.items():
    to = lab.folder / f"{placement}-exported"
    done = command("convert", "export", "--run", run, "--to", to, "--step", 16)
    assert done.code == 0, done.err
  return {placement: lab.folder / f"{placement}-exported" for placement in CASES}


def test_rows_that_lag_behind_on_the_host_are_exported_up_to_date(exported):
  assert shard_bytes(exported["host"]) == shard_bytes(exported["device"])


@pytest.mark.parametrize("placement", CASES)
def test_a_run_comes_back_and_goes_on_where_its_schedule_was(
  lab, runs, exported, command, placement
):
  run = lab.folder / f"{placement}-imported" / "t"
  done = command("convert", "import", "--from", exported[placement], "--run", run)
  assert done.code == 0, done.err
  checkpoint = run / "checkpoints" / "step_00000016"
  assert (checkpoint / "rows").exists() == (placement != "device")

  metrics = []
  for folder in (runs[placement], run):
    done = lab.evaluation(folder, "--step", 16, "--json", "--tokens", 2)
    assert done.code == 0, done.err
    metrics.append(json.loads(done.out) | {"run": None})
  assert metrics[0] == metrics[1]

  before = read_weights(run, 16)
  done = lab.training(run.parent, *options(placement))
  assert done.code == 0, done.err
  assert "after step 16" in done.err
  rates = [
    json.loads(line)["learning_rate"] for line in (run / "metrics.jsonl").read_text().splitlines()
  ]
  assert rates == [0] * 8
  for path, value in read_weights(run, 24).items():  # these rates were used
    np.testing.assert_array_equal(value, before[path], path)


def test_a_table_in_a_file_becomes_one_that_is_read_row_by_row(runs, command, tmp_path):
  to = tmp_path / "t.engram"
  done = command("convert", "table", "--run", runs["file"], "--to", to, "--dtype", "bf16")
  assert done.code == 0, done.err
  rows = read_weights(runs["file"], 24)["rows"]
  with FileRows(to) as store:
    np.testing.assert_array_equal(store.fetch_layer(1, np.arange(len(rows))), rows)
