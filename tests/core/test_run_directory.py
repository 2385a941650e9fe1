"""A run's folder belongs to one config, whatever devices it runs on."""

import json

import pytest

from engram_jax.config import load_config
from engram_jax.core.run_changes import HISTORY
from engram_jax.core.run_directory import RunDirectory, check_config
from engram_jax.errors import ConfigError


def config(root, **fields):
  return load_config(None, {"run.root": str(root)} | fields)


@pytest.fixture
def run(tmp_path):
  with RunDirectory(config(tmp_path), "{}"):
    pass
  return tmp_path


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("mesh.data", 1),
    ("mesh.tensor", 2),
    ("distributed.processes", 1),
    ("distributed.timeout", 5),
    ("model.attention.kernel", "flash"),
    ("model.scan_layers", True),
    ("model.remat", "block"),
    ("model.moe.dispatch", "dense"),
    ("model.engram.exchange_capacity", 2.0),
    ("train.log_every", 3),
    ("train.eval_every", 7),
    ("train.checkpoint_every", 5),
    ("train.accumulate", 2),
    ("train.nonfinite_limit", 3),
    ("train.sample_prompt", "def"),
    ("data.workers", 2),
    ("data.source", "stdlib"),  # the digest of its text is compared later
    ("data.tokenizer", "deepseek"),
  ],
)
def test_a_run_goes_on_over_other_devices_and_with_other_programs(run, field, value):
  assert check_config(config(run, **{field: value}))


@pytest.mark.parametrize(("field", "value"), [("train.seed", 1), ("train.batch_size", 32)])
def test_a_run_does_not_go_on_with_another_config(run, field, value):
  with pytest.raises(ConfigError, match=rf"{field}: \d+ there, {value} now"):
    check_config(config(run, **{field: value}))


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("train.steps", 800),
    ("train.optimizer.learning_rate", 1e-4),
    ("train.schedule.kind", "cosine"),
    ("data.seed", 1),
  ],
)
def test_what_changes_the_steps_to_come_is_taken_by_saying_so_and_written_down(run, field, value):
  with pytest.raises(ConfigError, match=rf"(?s){field}: .* there, .*--run\.extend True goes on"):
    check_config(config(run, **{field: value}))
  extended = config(run, **{field: value, "run.extend": True})
  assert check_config(extended)
  with RunDirectory(extended, "{}") as folder:
    assert [change.field for change in folder.changes] == [field]
    folder.write_changes(4)
    folder.write_changes(4)  # killed between the two files, and started again
  assert check_config(config(run, **{field: value}))  # now that it is the run's own
  (line,) = (extended.run.directory / HISTORY).read_text().splitlines()
  entry = json.loads(line)
  assert entry["after_step"] == 4
  assert entry["changes"][field]["now"] == value
  with pytest.raises(ConfigError, match=r"train\.batch_size: \d+ there, 32 now(?s:.*)name$"):
    check_config(config(run, **{"train.batch_size": 32, "run.extend": True}))


def test_a_run_finds_its_text_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  text = {"data.source": "text", "data.path": "books", "data.tokenizer": "t.json"}
  with RunDirectory(config(tmp_path / "runs", **text), "{}") as folder:
    saved = load_config(folder.path / "config.yaml")
  assert saved.data.path == str(tmp_path / "books")
  assert saved.data.tokenizer == str(tmp_path / "t.json")


def test_what_another_process_made_of_the_folder_meanwhile_is_seen(tmp_path):
  """Between the first look and the lock lies the preparation of data, which may take hours."""
  mine, other = config(tmp_path), config(tmp_path, **{"train.seed": 1})
  assert not check_config(mine)
  assert not check_config(other)
  with RunDirectory(other, "{}") as first:
    assert not first.is_existing
  with pytest.raises(ConfigError, match=r"train.seed: 1 there, 0 now"):
    RunDirectory(mine, "{}")
  with RunDirectory(other, "{}") as second:
    assert second.is_existing
