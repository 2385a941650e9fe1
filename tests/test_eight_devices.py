"""Runs tests/eight in a process of its own, with eight simulated devices."""

import os
import pathlib
import subprocess
import sys

FOLDER = pathlib.Path(__file__).with_name("eight")


def test_everything_on_eight_devices():
  """One process for all files: they share its start and, in the session's folder, its programs."""
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", str(FOLDER)]
  done = subprocess.run(
    command, env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
