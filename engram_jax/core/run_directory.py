"""A run's folder: config.yaml, tokenizer.json, metrics.jsonl, checkpoints/, tensorboard/.

A folder belongs to one resolved config: the same config resumes it, another is refused, but for the
fields that core/run_changes.py lets change from one start to the next.

With several processes all call these functions; process 0 alone reads, writes and locks, and its
result or error is that of all.
"""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterable
from typing import IO, Any

from engram_jax.config import NAMED_TOKENIZERS, Config, load_config
from engram_jax.config.bounded import cut, read_bounded, user_path
from engram_jax.core.distributed import is_main, on_main
from engram_jax.core.manifest import PARTIAL, replace_file
from engram_jax.core.run_advice import CONFIG, TOKENIZER, advise
from engram_jax.core.run_changes import Change, find_changes, write_changes
from engram_jax.errors import ConfigError, StorageError

CHECKPOINTS = "checkpoints"
PROFILE = "profile"
_LOCK = ".lock"
# What a process that was killed before its folder became a run may have left there.
_BEFORE_CONFIG = (_LOCK, TOKENIZER, TOKENIZER + PARTIAL, CONFIG + PARTIAL)


def check_config(cfg: Config) -> bool:
  """Says whether the run exists already.

  Raises ConfigError if its folder holds another config or other files, or another process is
  training in it; StorageError where it cannot be read.

  It only reads: a refused command has written nothing.
  """
  return on_main(lambda: _check_readable(cfg))


def _check_readable(cfg: Config) -> bool:
  try:
    _check_unused(cfg)
    return _check_config(cfg)[0]
  except OSError as error:
    raise StorageError(f"run folder {cfg.run.directory} cannot be read: {error}") from None


def _check_unused(cfg: Config) -> None:
  """Raises ConfigError where another process holds the lock, before data is prepared for long."""
  try:
    lock = open(cfg.run.directory / _LOCK, "r+b")  # noqa: SIM115 (closed below)
  except OSError:  # no run yet, or not ours to write: what follows says so
    return
  with lock:
    _acquire(lock, cfg)


def _acquire(lock: IO[Any], cfg: Config) -> None:
  try:
    # lockf, not flock: a forked child, which may outlive us, does not inherit it.
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    raise ConfigError(
      f"run.name={cfg.run.name!r}: another process is training in {cfg.run.directory}"
      f"{_holder(cfg.run.directory)}; wait for it, stop it, or choose another --run.name"
    ) from None


def _holder(directory: pathlib.Path) -> str:
  """The holder of the lock in words, as it wrote them; empty if it did not."""
  try:
    content = json.loads(read_bounded(directory / _LOCK, 1 << 10))
    pid, host, started = content["pid"], content["host"], content["started"]
  except (OSError, ValueError, TypeError, KeyError):
    return ""
  return f" (process {pid} on {host}, since {started})"


def _check_config(cfg: Config) -> tuple[bool, list[Change]]:
  """Says whether the run exists, and what of its config has changed."""
  directory = cfg.run.directory
  saved = directory / CONFIG
  if not saved.exists():
    foreign = [path.name for path in directory.glob("*") if path.name not in _BEFORE_CONFIG]
    if foreign:
      raise ConfigError(
        f"run.name={cfg.run.name!r}: {directory} holds {foreign[0]!r} but no {CONFIG}: not a run "
        "of this project; choose another --run.name"
      )
    return False, []
  return True, find_changes(absolute_paths(load_config(saved)), absolute_paths(cfg))


def absolute_paths(cfg: Config) -> Config:
  """The config with the paths of its text made absolute: a run is opened from any folder."""
  full = lambda path: str(user_path(path, "data.path").absolute())
  data = cfg.data
  update = {"path": full(data.path)} if data.path is not None else {}
  if data.tokenizer not in NAMED_TOKENIZERS:
    update["tokenizer"] = full(data.tokenizer)
  return cfg.model_copy(update={"data": data.model_copy(update=update)})


class RunDirectory:
  """The folder of one running job, locked against a second one; a context manager.

  Attributes:
    path: of the folder.
    is_existing: the run existed already when it was locked.
    changes: to its config, which `write_changes` writes down once it goes on.

  A tokenizer.json that is missing is written again.

  Raises ConfigError as `check_config` does, or where another process is training in the folder, and
  StorageError where it cannot be written.
  """

  def __init__(self, cfg: Config, tokenizer_json: str):
    self.path, self._config = cfg.run.directory, absolute_paths(cfg)
    self.is_existing, found = on_main(lambda: self._open(cfg, tokenizer_json))
    self.changes = [Change(*change) for change in found]

  def _open(self, cfg: Config, tokenizer_json: str) -> tuple[bool, list[Change]]:
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self._lock = open(self.path / _LOCK, "a")  # noqa: SIM115 (held until __exit__)
    except OSError as error:
      raise StorageError(f"run folder {self.path} cannot be written: {error}") from None
    try:
      _acquire(self._lock, cfg)
      known, changes = _check_config(cfg)
      self._describe_holder()
      tokenizer = self.path / TOKENIZER
      if not known or not tokenizer.exists():
        replace_file(tokenizer, tokenizer_json.encode())
      if not known:  # last: with it the folder is a run
        replace_file(self.path / CONFIG, self._config.to_yaml().encode())
      self._identity = _identity(self.path)
    except OSError as error:
      self._lock.close()
      raise StorageError(f"run folder {self.path} cannot be written: {error}") from None
    except BaseException:
      self._lock.close()
      raise
    return known, changes

  def write_changes(self, step: int) -> None:
    """Writes the changes to the run's config down, as holding from after this step on."""
    if self.changes:
      on_main(lambda: write_changes(self.path, CONFIG, self._config, step, self.changes))

  def _describe_holder(self) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": now}
    self._lock.truncate(0)
    self._lock.write(json.dumps(holder))
    self._lock.flush()

  def require_present(self) -> None:
    """Raises StorageError where the folder was moved or removed since it was opened."""
    on_main(self._require_present)

  def _require_present(self) -> None:
    try:
      is_same = _identity(self.path) == self._identity and (self.path / CONFIG).is_file()
    except OSError as error:
      raise StorageError(f"run folder {self.path} cannot be read: {error.strerror}") from None
    if not is_same:
      raise StorageError(f"run folder {self.path} is not the one that this run began in")

  def set_aside(self, names: Iterable[str]) -> pathlib.Path:
    """Moves what the run holds under these names into a new folder before-N; returns its path."""
    return self.path / on_main(lambda: self._set_aside(names))

  def _set_aside(self, names: Iterable[str]) -> str:
    number = 1
    while (folder := self.path / f"before-{number}").exists():
      number += 1
    try:
      folder.mkdir()
      for name in names:
        if (self.path / name).exists():
          (self.path / name).rename(folder / name)
    except OSError as error:
      raise StorageError(f"{folder} cannot be written: {error}") from None
    return folder.name

  def __enter__(self) -> "RunDirectory":
    return self

  def __exit__(self, *_: Any) -> None:
    if is_main():
      with contextlib.suppress(OSError), self._lock:  # closed in any case
        self._lock.truncate(0)


def _identity(path: pathlib.Path) -> tuple[int, int]:
  status = path.stat()
  return status.st_dev, status.st_ino


def open_run(directory: str | pathlib.Path) -> Config:
  """Returns the config of a run on disk, with the folder's present place.

  Raises ConfigError where the folder is no run.
  """
  path = pathlib.Path(directory)
  if not os.path.isfile(path / CONFIG):  # False too for a path that is too long for one
    raise ConfigError(f"run {cut(str(path), 1000)}: no {CONFIG} there; {advise(path)}")
  root, name = str(path.resolve().parent), path.resolve().name
  return load_config(path / CONFIG, {"run.root": root, "run.name": name})
