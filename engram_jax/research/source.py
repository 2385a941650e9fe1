"""The code of a commit in a folder of its own, and the libraries that it runs with."""

import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile

import engram_jax
from engram_jax.errors import ConfigError

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "grain", "tokenizers", "orbax-checkpoint")
ACCELERATORS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")  # where they are installed


def find_commit(revision: str) -> tuple[str, pathlib.Path | None]:
  """(the commit's full name, the checkout's root); of an installed package its version and None."""
  root = pathlib.Path(engram_jax.__file__).parents[1]
  if not (root / ".git").exists():
    if revision != "HEAD":
      raise ConfigError(f"--commit {revision}: this package is installed, not a git checkout")
    return f"version {engram_jax.__version__}", None
  found = subprocess.run(
    ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"],
    cwd=root,
    capture_output=True,
    text=True,
  )
  if found.returncode:
    raise ConfigError(f"--commit {revision}: git knows no such commit in {root}")
  return found.stdout.strip(), root


def is_changed(root: pathlib.Path) -> bool:
  """Says whether a checkout has changes that no commit has."""
  status = ["git", "status", "--porcelain", "--untracked-files=no"]
  return bool(subprocess.run(status, cwd=root, capture_output=True, text=True).stdout.strip())


def write_source(root: pathlib.Path | None, commit: str, folder: pathlib.Path) -> None:
  """Writes the files of a commit into a folder, in one step; leaves one that is there."""
  if folder.is_dir():
    return
  with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as part:
    target = pathlib.Path(part) / "source"
    if root is None:
      _copy_installed(target)
    else:
      paths = ["engram_jax", "configs", "train.py", "eval.py"]
      archive = pathlib.Path(part) / "source.tar"
      subprocess.run(["git", "archive", "-o", str(archive), commit, *paths], cwd=root, check=True)
      with tarfile.open(archive) as files:
        files.extractall(target, filter="data")
    try:
      os.rename(target, folder)
    except OSError:
      if not folder.is_dir():  # else another process wrote the same meanwhile
        raise


def _copy_installed(target: pathlib.Path) -> None:
  """Copies an installed package and its train.py, as they are."""
  package = pathlib.Path(engram_jax.__file__).parent
  ignored = shutil.ignore_patterns("__pycache__")
  shutil.copytree(package, target / "engram_jax", ignore=ignored)
  shutil.copy(package / "scripts" / "train.py", target)


def library_versions() -> dict[str, str]:
  """Versions of Python, of the libraries that a number may depend on, and JAX's platforms."""
  installed = {d.name: d.version for d in importlib.metadata.distributions()}
  versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
  versions |= {name: installed[name] for name in ACCELERATORS if name in installed}
  versions |= {"platforms": os.environ.get("JAX_PLATFORMS", "")}
  return {"python": platform.python_version(), "machine": platform.machine()} | versions


def known_fields(folder: pathlib.Path) -> frozenset[str]:
  """Dotted paths of the config fields that the code in a folder has."""
  program = (
    "import json; from engram_jax.config.load import fields; print(json.dumps(list(fields())))"
  )
  environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
  done = subprocess.run(
    [sys.executable, "-c", program], env=environment, cwd=folder, capture_output=True, text=True
  )
  if done.returncode:
    last = done.stderr.strip().splitlines()[-1:]
    raise ConfigError(f"the code in {folder} does not run: {' '.join(last)}")
  return frozenset(json.loads(done.stdout))
