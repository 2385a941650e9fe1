"""The mesh in configs and on the command line: what cannot be is refused with the numbers."""

import pytest

from engram_jax.cli import parse_config
from engram_jax.config import load_config
from engram_jax.errors import ConfigError

# Overrides, devices, words of the refusal.
MISFITS = [
  ({"mesh.data": 1, "mesh.fsdp": 3}, 8, ["mesh.fsdp=3", "hold 3 devices", "there are 8"]),
  ({"mesh.fsdp": 3}, 8, ["mesh.fsdp=3", "3 must divide it", "there are 8"]),
  ({"train.batch_size": 12}, 8, ["batch_size / train.accumulate=12", "data x fsdp x expert=8"]),
  ({"train.accumulate": 4}, 8, ["train.accumulate=4", "=8"]),
  ({"mesh.expert": 8, "model.moe.routed_experts": 12}, 8, ["routed_experts=12", "mesh.expert=8"]),
  ({"mesh.tensor": 8}, 8, ["attention.heads=4", "mesh.tensor=8"]),
  (
    {"mesh.tensor": 4, "data.sequence_length": 30},
    8,
    ["sequence_length=30", "mesh.tensor=4"],
  ),
]


@pytest.mark.parametrize(("overrides", "devices", "words"), MISFITS)
def test_a_mesh_that_does_not_fit_names_the_numbers(overrides, devices, words):
  cfg = load_config(None, overrides)
  with pytest.raises(ConfigError) as refusal:
    cfg.mesh_sizes(devices)
  assert [word for word in words if word not in str(refusal.value)] == []


def test_one_axis_takes_what_the_others_leave():
  cfg = load_config(None, {"mesh.data": 2, "mesh.fsdp": 0, "mesh.tensor": 2})
  assert cfg.mesh_sizes(8) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
  with pytest.raises(ConfigError, match="data and fsdp are both 0"):
    load_config(None, {"mesh.fsdp": 0})


def test_an_axis_named_twice_is_refused(tmp_path):
  file = tmp_path / "twice.yaml"
  file.write_text("mesh: {data: 1, data: 2}\n")
  with pytest.raises(ConfigError, match="'data' stands twice"):
    load_config(file)
  for words in (["--mesh.data", "1", "--mesh.data", "2"], ["--mesh.fsdp=1", "--mesh.fsdp", "2"]):
    with pytest.raises(ConfigError, match=r"--mesh\.\w+ is given twice"):
      parse_config("train.py", "about", words)


def test_hosts_that_cannot_meet_are_refused():
  with pytest.raises(ConfigError, match="coordinator"):
    load_config(None, {"distributed.processes": 2})
  with pytest.raises(ConfigError, match=r"process=2 is outside processes=2: 0\.\.1"):
    load_config(
      None,
      {
        "distributed.processes": 2,
        "distributed.process": 2,
        "distributed.coordinator": "h:1",
      },
    )
