"""A folder of runs, known by index, that any number of processes and hosts may work through.

    sweep.json     what is run: budget, arms, seeds, commit, versions; never changed once written
    source/        the code of that commit: the runs import it and nothing that is being edited
    configs/       budget.yaml, and a file for each arm that says in what it differs
    runs/ARM-sN/   one folder a run, as train.py writes it     logs/ARM-sN.txt   what it said
    results/N.json the result of run N, written when it has ended with code 0

Runs are ordered by seed, then arm, so that arms are interleaved in time and whatever drifts on a
machine drifts for all of them. A run that was killed goes on where it was; one that has a result is
not run again.
"""

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterable
from typing import Any, Self

import yaml

from engram_jax.config import Config, load_config
from engram_jax.config.bounded import read_bounded
from engram_jax.core.manifest import replace_file
from engram_jax.errors import ConfigError, StorageError
from engram_jax.research.arms import Arm, Claim, Design
from engram_jax.research.source import (
  find_commit,
  known_fields,
  library_versions,
  write_source,
)

FORMAT = 1
SPEC, SOURCE, CONFIGS, RUNS, LOGS, RESULTS = (
  "sweep.json",
  "source",
  "configs",
  "runs",
  "logs",
  "results",
)
# Set for every run: nothing is written beside its numbers, and all validation documents are read.
QUIET = {
  "train.sample_tokens": 0,
  "run.tensorboard": False,
  "train.keep_checkpoints": 1,
  "train.eval_batches": 10**9,
}


@dataclasses.dataclass(frozen=True)
class Run:
  """One (arm, seed) of a sweep."""

  index: int
  arm: str
  seed: int

  @property
  def name(self) -> str:
    """The name of its folder."""
    return f"{self.arm}-s{self.seed}"


@dataclasses.dataclass(frozen=True)
class Sweep:
  """A sweep's folder and what stands in its sweep.json.

  kind: of sweep. budget: name of the config it began at. commit: of the code that its runs import.
  """

  folder: pathlib.Path
  kind: str
  budget: str
  commit: str
  seeds: tuple[int, ...]
  design: Design
  versions: dict[str, str]

  @property
  def runs(self) -> tuple[Run, ...]:
    """All runs, by index."""
    pairs = [(arm.name, seed) for seed in self.seeds for arm in self.design.arms]
    return tuple(Run(i, *pair) for i, pair in enumerate(pairs))

  def config(self, arm: str) -> pathlib.Path:
    """The file of an arm."""
    return self.folder / CONFIGS / f"{arm}.yaml"

  def result(self, run: Run) -> dict[str, Any] | None:
    """The result of a run that has ended; None for one that has not."""
    path = self.folder / RESULTS / f"{run.index}.json"
    try:
      return json.loads(read_bounded(path, 1 << 20))
    except FileNotFoundError:
      return None
    except ValueError:
      raise StorageError(f"{path} is damaged: delete it and the run is looked at again") from None

  def command(self, run: Run) -> list[str]:
    """The command of one run."""
    return [
      *(sys.executable, str(self.folder / SOURCE / "train.py")),
      *("--config", str(self.config(run.arm))),
      *("--run.root", str(self.folder / RUNS), "--run.name", run.name),
      *("--train.seed", str(run.seed), "--data.seed", str(run.seed)),
    ]

  def environment(self, jobs: int = 1) -> dict[str, str]:
    """The environment of its runs: their own source, and one cache of compiled programs for all,
    unless the variables of this process name another.

    jobs: runs at a time, which divide an accelerator's memory.
    """
    cache = {
      "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    if jobs > 1:
      cache["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / jobs:.3f}"
    own = {"PYTHONPATH": str(self.folder / SOURCE), "PYTHONDONTWRITEBYTECODE": "1"}
    return cache | dict(os.environ) | own

  def describe(self) -> dict[str, Any]:
    """The content of sweep.json."""
    return {
      "format": FORMAT,
      "kind": self.kind,
      "budget": self.budget,
      "commit": self.commit,
      "seeds": list(self.seeds),
      "axis": self.design.axis,
      "arms": [dataclasses.asdict(arm) for arm in self.design.arms],
      "claims": [dataclasses.asdict(claim) for claim in self.design.claims],
      "versions": self.versions,
    }

  @classmethod
  def open(cls, folder: pathlib.Path) -> Self:
    """The sweep of a folder; ConfigError where there is none."""
    try:
      tree = json.loads(read_bounded(folder / SPEC, 1 << 24))
      if tree["format"] != FORMAT:
        raise ConfigError(f"{folder / SPEC}: format {tree['format']}: this version reads {FORMAT}")
      arms = tuple(Arm(**arm) for arm in tree["arms"])
      claims = tuple(Claim(**claim) for claim in tree["claims"])
      design = Design(arms, claims, tree["axis"])
      kind, budget, commit = tree["kind"], tree["budget"], tree["commit"]
      return cls(folder, kind, budget, commit, tuple(tree["seeds"]), design, tree["versions"])
    except FileNotFoundError:
      raise ConfigError(f"{folder} is no sweep: it has no {SPEC}") from None
    except (ValueError, KeyError, TypeError) as error:
      raise StorageError(f"{folder / SPEC} is damaged: {error!r}") from None


def prepare_sweep(
  folder: pathlib.Path,
  kind: str,
  budget: str,
  configs: dict[str, Config],
  design: Design,
  seeds: int,
  revision: str,
) -> Sweep:
  """Makes the folder of a sweep, or opens it where it is the same sweep.

  Args:
    folder: of the sweep. kind, budget: for its description.
    configs: the config of each budget that the design's arms name; "" is that of the others.
    seeds: number of seeds, from 0 on. More than there were is the same sweep with more runs.
    revision: the commit to run, as git names it.

  Raises ConfigError where the folder holds another sweep, another commit's or other libraries', and
  where the revision is none.
  """
  commit, root = find_commit(revision)
  sweep = Sweep(folder, kind, budget, commit, tuple(range(seeds)), design, library_versions())
  if (folder / SPEC).exists():
    _require_same(Sweep.open(folder), sweep, configs)
  for name in (CONFIGS, RUNS, LOGS, RESULTS):
    (folder / name).mkdir(parents=True, exist_ok=True)
  write_source(root, commit, folder / SOURCE)
  for name, text in _config_texts(configs, design, known_fields(folder / SOURCE)).items():
    if not (folder / CONFIGS / name).exists():  # else it is the same, as was checked above
      replace_file(folder / CONFIGS / name, text.encode())
  replace_file(folder / SPEC, json.dumps(sweep.describe(), indent=1).encode())
  return sweep


def _config_texts(
  configs: dict[str, Config], design: Design, known: frozenset[str] | None = None
) -> dict[str, str]:
  """The files of configs/: each budget whole, each arm by what differs.

  known: fields of the commit's configs. Others are left out, as long as they have their default.
  """
  named = lambda budget: f"budget{'_' if budget else ''}{budget}.yaml"
  dump = lambda cfg: yaml.safe_dump(_of_fields(cfg, known), sort_keys=False)
  texts = {named(name): dump(cfg) for name, cfg in configs.items()}
  for arm in design.arms:
    tree: dict[str, Any] = {"extends": named(arm.budget)}
    for path, value in arm.changes.items():
      node = tree
      *parents, name = path.split(".")
      for parent in parents:
        node = node.setdefault(parent, {})
      node[name] = list(value) if isinstance(value, tuple | list) else value
    texts[f"{arm.name}.yaml"] = f"# {arm.about}\n" + yaml.safe_dump(tree, sort_keys=False)
  return texts


def _of_fields(cfg: Config, known: frozenset[str] | None) -> dict[str, Any]:
  """The config as a tree of the known fields; ConfigError for another that has no default value."""
  default = Config().model_dump(mode="json")

  def keep(tree: dict[str, Any], usual: dict[str, Any], prefix: str) -> dict[str, Any]:
    kept = {}
    for name, value in tree.items():
      path = prefix + name
      if isinstance(value, dict):
        kept[name] = keep(value, usual[name], f"{path}.")
      elif known is None or path in known:
        kept[name] = value
      elif value != usual[name]:
        raise ConfigError(f"{path}={value!r}: the code of --commit has no such field")
    return kept

  return keep(cfg.model_dump(mode="json"), default, "")


def _require_same(old: Sweep, new: Sweep, configs: dict[str, Config]) -> None:
  """ConfigError unless the new sweep is the old one, or the old one with more seeds."""
  there, now = ({k: v for k, v in s.describe().items() if k != "seeds"} for s in (old, new))
  now = json.loads(json.dumps(now))
  different = [key for key in now if there[key] != now[key]]
  texts = _config_texts(configs, new.design)
  for name, text in texts.items():
    path = old.folder / CONFIGS / name
    if path.exists() and load_config(path).to_yaml() != _load_text(path, text):
      different.append(f"{CONFIGS}/{name}")
  if different:
    pairs = "; ".join(
      f"{key}: {str(there[key])[:60]} there, {str(now[key])[:60]} now" if key in now else key
      for key in different
    )
    raise ConfigError(
      f"{old.folder} holds another sweep ({pairs}): runs of different code or models are never "
      "pooled; give the same, or another --root"
    )
  if len(new.seeds) < len(old.seeds):
    raise ConfigError(f"--seeds {len(new.seeds)}: {old.folder} has {len(old.seeds)} already")


def _load_text(path: pathlib.Path, text: str) -> str:
  """The resolved config of another text for the same file."""
  with tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=path.parent, delete=False) as file:
    file.write(text)
  try:
    return load_config(file.name).to_yaml()
  finally:
    os.unlink(file.name)


def choose(runs: Iterable[Run], index: str, share: str) -> list[Run]:
  """The runs that this process is to do.

  Args:
    index: numbers and ranges such as "3" or "0-5,9"; empty is all.
    share: "I/N", every N-th run from the I-th on, for host I of N; empty is all.

  Raises ConfigError for what is neither, and for an index that no run has.
  """
  chosen = list(runs)
  if index:
    known = {run.index: run for run in chosen}
    chosen = [known[i] if i in known else _refuse(i, len(known)) for i in _numbers(index)]
  if share:
    part, _, parts = share.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
      raise ConfigError(f"--share {share!r} must be I/N with 0 <= I < N, such as 0/4")
    chosen = chosen[int(part) :: int(parts)]
  return chosen


def _numbers(text: str) -> list[int]:
  numbers: list[int] = []
  for piece in text.split(","):
    first, dash, last = piece.strip().partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or len(piece) > 20:
      raise ConfigError(f"--index {text!r} must be numbers and ranges, such as 0-5,9")
    numbers += range(int(first), min(int(last) if dash else int(first), 10**6) + 1)
  return sorted(set(numbers))


def _refuse(index: int, count: int) -> Any:
  raise ConfigError(f"--index {index}: the sweep has runs 0..{count - 1}")
