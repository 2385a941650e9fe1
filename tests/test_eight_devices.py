"""Runs each file of tests/eight in a process of its own, with eight simulated devices."""

import os
import pathlib
import subprocess
import sys

import pytest

FILES = sorted(pathlib.Path(__file__).with_name("eight").glob("test_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_on_eight_devices(path):
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", str(path)]
  done = subprocess.run(
    command, env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
