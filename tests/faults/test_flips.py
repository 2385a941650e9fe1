"""Changed bits of checkpoints, one after another in one process: each is named, none is used."""

import pathlib
import random

import jax.numpy as jnp
import pytest

from engram_jax.core.checkpoint import Checkpoints
from engram_jax.errors import NoUsableCheckpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
  """The folder of the checkpoints of a run, of which one is there."""
  folder = tmp_path_factory.mktemp("flips") / "checkpoints"
  state = {"params": {"w": jnp.arange(3000.0)}, "step": jnp.int32(7), "rows": jnp.ones((40, 8))}
  with Checkpoints(folder, keep=1) as checkpoints:
    checkpoints.save(7, state, {"next_batch": 7})
  return folder


def named(folder: pathlib.Path, count: int) -> int:
  """So many bits anywhere are changed and put back; returns how many changes were named."""
  rng, found = random.Random(0), 0
  paths = [path for path in (folder / "step_00000007").rglob("*") if path.is_file()]
  paths = sorted(path for path in paths if path.stat().st_size)
  for _ in range(count):
    path = rng.choice(paths)
    content = path.read_bytes()
    changed = bytearray(content)
    changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(changed)
    try:
      with Checkpoints(folder, keep=None) as checkpoints:
        checkpoints.newest_valid(pytest.fail)
    except NoUsableCheckpoint as error:
      found += "step 7: " in str(error) and path.name in str(error)
    path.write_bytes(content)
  with Checkpoints(folder, keep=None) as checkpoints:
    assert checkpoints.newest_valid(pytest.fail) == 7
  return found


def test_a_changed_bit_of_a_checkpoint_is_named(saved):
  assert named(saved, 40) == 40


@pytest.mark.slow
def test_a_thousand_changed_bits_are_named(saved):
  assert named(saved, 1000) == 1000
