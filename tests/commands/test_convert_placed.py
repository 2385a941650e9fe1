"""Runs with tables off the device go out and come in again as those on it do."""

import json

import numpy as np
import pytest

from engram_jax import __main__ as command
from engram_jax.core import manifest
from engram_jax.inference.stores.file import FileRows
from engram_jax.tables.saved_run import load_run

# From step 12 on nothing moves, unless the schedule is another than the run's.
DECAYED = ("--train.schedule.decay_at", 0.5, "--train.schedule.decay_to", 0)
BF16 = ("--model.engram.table_dtype", "bfloat16")
CASES = {  # rows that lag behind; rows of two bytes that are never whole in memory
  "device": ("--train.optimizer.table", "adam_catch_up", *BF16),
  "host": ("--train.optimizer.table", "adam_catch_up", *BF16),
  "file": BF16,
}


def shards(folder):
  return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def weights(run, step):
  """{path: array} of parameters, and the rows of the table."""
  with load_run(run, step, print) as saved:
    tree = manifest.read(saved.checkpoints.folder(step))["tree"]
    paths = [path for path in tree if path.startswith("params/")]
    found = {path: saved.checkpoints.open_array(step, path).read() for path in paths}
    rows = list(saved.rows(1))
  assert {part.dtype for part in rows} == {np.dtype("float32")}
  return found | {"rows": np.concatenate(rows)}


def words(place):
  return ("--model.engram.placement", place, *CASES[place], *DECAYED)


@pytest.fixture(scope="module")
def runs(lab):
  for place in CASES:
    done = lab.training(lab.folder / place, *words(place))
    assert done.code == 0, done.err
  return {place: lab.folder / place / "t" for place in CASES}


@pytest.fixture(scope="module")
def say(lab):
  return lambda *words: lab.run(command, *words)


@pytest.fixture(scope="module")
def exported(lab, runs, say):
  """Of step 16, when rows lag behind."""
  for place, run in runs.items():
    to = lab.folder / f"{place}-exported"
    done = say("convert", "export", "--run", run, "--to", to, "--step", 16)
    assert done.code == 0, done.err
  return {place: lab.folder / f"{place}-exported" for place in CASES}


def test_rows_that_lag_behind_on_the_host_are_exported_up_to_date(exported):
  assert shards(exported["host"]) == shards(exported["device"])


@pytest.mark.parametrize("place", CASES)
def test_a_run_comes_back_and_goes_on_where_its_schedule_was(lab, runs, exported, say, place):
  run = lab.folder / f"{place}-imported" / "t"
  done = say("convert", "import", "--from", exported[place], "--run", run)
  assert done.code == 0, done.err
  checkpoint = run / "checkpoints" / "step_00000016"
  assert (checkpoint / "rows").exists() == (place != "device")

  figures = []
  for folder in (runs[place], run):
    done = lab.evaluation(folder, "--step", 16, "--json", "--tokens", 2)
    assert done.code == 0, done.err
    figures.append(json.loads(done.out) | {"run": None})
  assert figures[0] == figures[1]

  before = weights(run, 16)
  done = lab.training(run.parent, *words(place))
  assert done.code == 0, done.err
  assert "after step 16" in done.err
  rates = [
    json.loads(line)["learning_rate"] for line in (run / "metrics.jsonl").read_text().splitlines()
  ]
  assert rates == [0] * 8
  for path, value in weights(run, 24).items():  # these rates were used
    np.testing.assert_array_equal(value, before[path], path)


def test_a_table_in_a_file_becomes_one_that_is_read_row_by_row(runs, say, tmp_path):
  to = tmp_path / "t.engram"
  done = say("convert", "table", "--run", runs["file"], "--to", to, "--dtype", "bf16")
  assert done.code == 0, done.err
  rows = weights(runs["file"], 24)["rows"]
  with FileRows(to) as store:
    np.testing.assert_array_equal(store.layer(1).fetch(np.arange(len(rows))), rows)
