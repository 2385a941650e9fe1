"""A run's folder: config.yaml, tokenizer.json, metrics.jsonl, checkpoints/, tensorboard/.

A folder belongs to one resolved config for good: the same config resumes it, another is refused.
Only the fields of `_CHANGEABLE`, such as the number of devices, may change from one start to the
next.

With several processes all call these functions; process 0 alone reads, writes and locks, and its
result or error is that of all.
"""

import fcntl
import pathlib
from typing import Any

from engram_jax.config import Config, load_config
from engram_jax.core.distributed import is_main, on_main
from engram_jax.core.manifest import PARTIAL, replace_file
from engram_jax.errors import ConfigError, StorageError

CONFIG = "config.yaml"
TOKENIZER = "tokenizer.json"
CHECKPOINTS = "checkpoints"
PROFILE = "profile"
_LOCK = ".lock"
# What a process that was killed before its folder became a run may have left there.
_BEFORE_CONFIG = (_LOCK, TOKENIZER, TOKENIZER + PARTIAL, CONFIG + PARTIAL)


def check_config(cfg: Config) -> bool:
  """Says whether the run exists already.

  Raises ConfigError if its folder holds another config or other files.

  It only reads: a refused command has written nothing.
  """
  return on_main(lambda: _check_config(cfg))


def _check_config(cfg: Config) -> bool:
  directory = cfg.run.directory
  saved = directory / CONFIG
  if not saved.exists():
    foreign = [path.name for path in directory.glob("*") if path.name not in _BEFORE_CONFIG]
    if foreign:
      raise ConfigError(
        f"run.name={cfg.run.name!r}: {directory} holds {foreign[0]!r} but no {CONFIG}: not a run "
        "of this project; choose another --run.name"
      )
    return False
  different = _differences(_flat(load_config(saved).model_dump()), _flat(cfg.model_dump()))
  if different:
    lines = "\n".join(f"  {key}: {old!r} there, {new!r} now" for key, old, new in different)
    raise ConfigError(
      f"run.name={cfg.run.name!r}: {directory} was made with another config:\n{lines}\n"
      "give the same values to resume it, or another --run.name"
    )
  return True


class RunDirectory:
  """The folder of one running job, locked against a second one; a context manager.

  Attributes:
    path: of the folder.
    is_existing: the run existed already when it was locked.

  Raises ConfigError as `check_config` does, or where another process is training in the folder, and
  StorageError where it cannot be written.
  """

  def __init__(self, cfg: Config, tokenizer_json: str):
    self.path = cfg.run.directory
    self.is_existing = on_main(lambda: self._open(cfg, tokenizer_json))

  def _open(self, cfg: Config, tokenizer_json: str) -> bool:
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self._lock = open(self.path / _LOCK, "w")  # noqa: SIM115 (held until __exit__)
    except OSError as error:
      raise StorageError(f"run folder {self.path} cannot be written: {error}") from None
    try:
      # lockf, not flock: a forked child, which may outlive us, does not inherit it.
      fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      self._lock.close()
      raise ConfigError(
        f"run.name={cfg.run.name!r}: another process is training in {self.path}; wait for it, "
        "stop it, or choose another --run.name"
      ) from None
    try:
      known = _check_config(cfg)
      if not known:
        replace_file(self.path / TOKENIZER, tokenizer_json.encode())
        replace_file(
          self.path / CONFIG, cfg.to_yaml().encode()
        )  # last: with it the folder is a run
    except BaseException:
      self._lock.close()
      raise
    return known

  def __enter__(self) -> "RunDirectory":
    return self

  def __exit__(self, *_: Any) -> None:
    if is_main():
      self._lock.close()


def open_run(directory: str | pathlib.Path) -> Config:
  """Returns the config of a run on disk, with the folder's present place.

  Raises ConfigError where the folder is no run.
  """
  path = pathlib.Path(directory)
  if not (path / CONFIG).is_file():
    raise ConfigError(f"run {path}: no {CONFIG} there; give a folder that train.py wrote")
  root, name = str(path.resolve().parent), path.resolve().name
  return load_config(path / CONFIG, {"run.root": root, "run.name": name})


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    nested = isinstance(value, dict)
    flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
  return flat


# The folder, the input threads, the devices and the compiled programs of a run do not change what
# its numbers mean. A name that ends in a dot stands for all fields below it.
_CHANGEABLE = (
  "run.root",
  "run.tensorboard",
  "train.profile",
  "data.threads",
  "data.workers",
  "data.cache",
  "mesh.",
  "distributed.",
  "model.attention.kernel",
  "model.scan_layers",
  "model.remat",
  "model.moe.dispatch",
  "model.engram.exchange_capacity",
  "model.engram.placement",
)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
  return [(k, old[k], new[k]) for k in old if not _is_changeable(k) and old[k] != new[k]]


def _is_changeable(key: str) -> bool:
  return any(key.startswith(name) if name.endswith(".") else key == name for name in _CHANGEABLE)
