"""A run's folder belongs to one config, whatever devices it runs on."""

import pytest

from engram_jax.config import load_config
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
  ],
)
def test_a_run_goes_on_over_other_devices_and_with_other_programs(run, field, value):
  assert check_config(config(run, **{field: value}))


@pytest.mark.parametrize(("field", "value"), [("train.seed", 1), ("train.batch_size", 32)])
def test_a_run_does_not_go_on_with_another_config(run, field, value):
  with pytest.raises(ConfigError, match=rf"{field}: \d+ there, {value} now"):
    check_config(config(run, **{field: value}))


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
