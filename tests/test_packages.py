"""The installed package: its dependencies are few, and its wheel holds all that commands need."""

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement

import engram_jax

ROOT = pathlib.Path(engram_jax.__file__).parents[1]
LIMIT = 60


def normal(name: str) -> str:
  """The name as the package index compares it (PEP 503)."""
  return re.sub(r"[-_.]+", "-", name).lower()


def closure(name: str) -> set[str]:
  """All distributions that installing `name` without extras installs, itself included.

  Extras that a requirement names (`jax[tpu]`) are followed, as pip does.
  """
  found: set[tuple[str, str]] = set()
  waiting = [(normal(name), "")]
  while waiting:
    package, extra = waiting.pop()
    if (package, extra) in found:
      continue
    found.add((package, extra))
    for text in importlib.metadata.requires(package) or ():
      requirement = Requirement(text)
      if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
        continue
      waiting += [(normal(requirement.name), more) for more in ("", *requirement.extras)]
  return {package for package, _ in found}


def test_a_core_install_is_small_and_holds_no_other_framework():
  packages = closure("engram_jax")
  assert {"jax", "flax", "optax", "grain", "numpy"} <= packages  # the walk found something
  assert len(packages) <= LIMIT, sorted(packages)
  assert not packages & {"torch", "tensorflow", "tensorflow-cpu", "tf-nightly", "keras"}


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory) -> pathlib.Path:
  """A folder with the contents of the wheel that this repository builds."""
  folder = tmp_path_factory.mktemp("wheel")
  command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT]
  subprocess.run(command, check=True)
  (wheel,) = folder.glob("engram_jax-*.whl")
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder / "unpacked")
  return folder / "unpacked"


@pytest.mark.slow
@pytest.mark.parametrize(
  ("argv", "output"),
  [
    (["--version"], f"engram_jax {engram_jax.__version__}\n"),
    (["plan", "--config", "configs/tiny.yaml", "--json"], '"parts"'),
    (["train", "--help"], "configs/tiny.yaml"),
    (["eval", "--help"], "--run"),
  ],
  ids=["version", "plan", "train", "eval"],
)
def test_an_installed_wheel_runs_from_any_folder(unpacked_wheel, tmp_path, argv, output):
  environment = os.environ | {"PYTHONPATH": str(unpacked_wheel), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "engram_jax", *argv]
  done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert output in done.stdout
