"""`python -m engram_jax sweep KIND`: does the memory help, how much of it, and is it memory at all?

allocation  experts against rows at equal size        capacity  more rows on one backbone
controls    what is left without what it remembers    ablation  one part changed at a time
ladder      memory and twin at several sizes          report    tables from a CSV, without a run
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro
import yaml
from tqdm import tqdm

from engram_jax.cli import log, run_kind
from engram_jax.config import Config, load_config
from engram_jax.errors import EXIT_STOPPED, ConfigError
from engram_jax.research import arms
from engram_jax.research.allocation import Budget, changed
from engram_jax.research.arms import Design
from engram_jax.research.runner import StopSweep, work
from engram_jax.research.source import find_commit, is_changed
from engram_jax.research.sweep import QUIET, Sweep, choose, prepare_sweep

ROW_STARTS = tuple(500 * 2**k for k in range(8))


@dataclasses.dataclass(frozen=True)
class SweepArgs:
  """Options of every sweep."""

  budget: str = "micro"
  """Config that the sweep begins at: a name in configs/, or a file."""
  seeds: int = 6
  """Seeds of each arm, from 0 on; fewer than six claim nothing."""
  set: tuple[str, ...] = ()
  """Fields changed in all arms, such as data.source=english train.steps=600."""
  root: pathlib.Path = pathlib.Path("runs/sweeps")
  """Folder of sweeps; this one's is root/name."""
  name: str = ""
  """Name of the sweep; KIND-BUDGET if left out."""
  commit: str = "HEAD"
  """Commit whose code the runs import."""
  jobs: int = 1
  """Runs at a time on this machine, each on its share of the CPUs."""
  index: str = ""
  """Runs to do, such as 3 or 0-5,9; all if left out."""
  share: str = ""
  """I/N: every N-th run from the I-th on, for host I of N that share a folder."""
  list: bool = False
  """Print the runs and the sizes of the arms, and do none."""
  csv: pathlib.Path | None = None
  """File for one row a run, when all are done; root/name/results.csv if left out."""
  json: bool = False
  """One JSON object on stdout, everything else on stderr."""


@dataclasses.dataclass(frozen=True)
class ControlsArgs(SweepArgs):
  """Options of `sweep controls`."""

  quick: bool = False
  """The arms that decide between rows and projections: a verdict in an hour on two cores."""


@dataclasses.dataclass(frozen=True)
class AllocationArgs(SweepArgs):
  """Options of `sweep allocation`."""

  rho: str = "1.0,0.95,0.85,0.75,0.6,0.4,0.25,0.1"
  """The experts' shares of the sparse parameters, with commas; 1 is no memory."""


@dataclasses.dataclass(frozen=True)
class CapacityArgs(SweepArgs):
  """Options of `sweep capacity`."""

  rows: str = ",".join(map(str, ROW_STARTS))
  """Rows a head, with commas."""


@dataclasses.dataclass(frozen=True)
class LadderArgs(SweepArgs):
  """Options of `sweep ladder`."""

  budget: str = "micro,mini,tiny"
  """Configs with commas, smallest first."""
  tokens_per_parameter: float = 1.2
  """Training tokens of each model over its active parameters."""


@dataclasses.dataclass(frozen=True)
class ReportArgs:
  """Options of `sweep report`."""

  csv: pathlib.Path
  """File that a sweep wrote."""
  json: bool = False
  """One JSON object on stdout, everything else on stderr."""


def main(argv: Sequence[str]) -> int:
  """Trains many models and says what the memory is worth, with controls and intervals."""
  return run_kind("sweep", KINDS, argv, about=__doc__, unknown="sweep has no kind")


def controls(argv: Sequence[str]) -> int:
  """Controls: one row, other windows, frozen rows, plain bigrams, and other rivals."""
  args = _parse(ControlsArgs, "controls", argv)
  return _run("controls", args, lambda cfg: arms.controls(cfg, quick=args.quick))


def allocation(argv: Sequence[str]) -> int:
  """Splits of the sparse parameters between experts and rows, at equal size."""
  args = _parse(AllocationArgs, "allocation", argv)
  rhos = _numbers("rho", args.rho, float)
  return _run("allocation", args, lambda cfg: arms.allocation(cfg, rhos))


def capacity(argv: Sequence[str]) -> int:
  """Tables that double on one backbone: do more rows keep helping?"""
  args = _parse(CapacityArgs, "capacity", argv)
  rows = _numbers("rows", args.rows, int)
  return _run("capacity", args, lambda cfg: arms.capacity(cfg, rows))


def ablation(argv: Sequence[str]) -> int:
  """Parts of the memory changed one at a time: gate, convolution, place, optimizer."""
  args = _parse(SweepArgs, "ablation", argv)
  return _run("ablation", args, arms.ablation)


def ladder(argv: Sequence[str]) -> int:
  """Memory and twin at several sizes: does the gain last?"""
  args = _parse(LadderArgs, "ladder", argv)
  configs = {name: _config(name, args) for name in args.budget.split(",")}
  for name, cfg in configs.items():
    tokens = args.tokens_per_parameter * Budget.of(cfg).active
    steps = max(round(tokens / (cfg.train.batch_size * cfg.data.sequence_length)), 1)
    # Ten points of a curve, on which to find the step at which the twin's last loss is reached.
    configs[name] = changed(cfg, {"train.steps": steps, "train.eval_every": max(steps // 10, 1)})
  design = arms.ladder(configs)
  return _execute("ladder", args, configs, design)


def report(argv: Sequence[str]) -> int:
  """The table, plot and statistics of a CSV, without any run."""
  args = _parse(ReportArgs, "report", argv)
  from engram_jax.research.report import report_csv

  return _say(report_csv(args.csv), args.json)


KINDS: dict[str, Callable[[Sequence[str]], int]] = {
  "controls": controls,
  "allocation": allocation,
  "capacity": capacity,
  "ablation": ablation,
  "ladder": ladder,
  "report": report,
}


def _parse(kind: type, name: str, argv: Sequence[str]) -> Any:
  """The options of a kind, checked; ConfigError for what cannot be."""
  args = tyro.cli(
    kind, prog=f"python -m engram_jax sweep {name}", description=KINDS[name].__doc__, args=argv
  )
  for field, lowest in (("seeds", 1), ("jobs", 1)):
    value = getattr(args, field, lowest)
    if not lowest <= value <= 1000:
      raise ConfigError(f"--{field} {value} must be from {lowest} to 1000")
  return args


def _numbers(name: str, text: str, kind: type) -> list:
  try:
    return [kind(piece) for piece in text.split(",")]
  except ValueError:
    raise ConfigError(f"--{name} {text!r} must be numbers with commas between them") from None


def _config(budget: str, args: SweepArgs) -> Config:
  """A budget's config with the fields that are set for all arms."""
  path = budget if budget.endswith((".yaml", ".yml")) else f"configs/{budget}.yaml"
  overrides: dict[str, Any] = dict(QUIET)
  for setting in args.set:
    field, equals, value = setting.partition("=")
    if not equals:
      raise ConfigError(f"--set {setting!r} must be FIELD=VALUE, such as train.steps=600")
    try:
      overrides[field] = yaml.safe_load(value)
    except yaml.YAMLError as error:
      raise ConfigError(f"--set {setting!r}: {' '.join(str(error).split())}") from None
  return load_config(path, overrides)


def _run(kind: str, args: SweepArgs, make: Callable[[Config], Design]) -> int:
  cfg = _config(args.budget, args)
  return _execute(kind, args, {"": cfg}, make(cfg))


def _execute(kind: str, args: SweepArgs, configs: dict[str, Config], design: Design) -> int:
  """Prepares the sweep's folder, does the runs, and reports on those that are done."""
  budget = ",".join(pathlib.Path(name).stem for name in args.budget.split(","))
  folder = args.root / (args.name or f"{kind}-{budget}")
  _, root = find_commit(args.commit)
  sizes = _sizes(configs, design)
  if args.list:
    return _list(args, folder, design, sizes)
  from engram_jax.research.report import require_libraries

  require_libraries()
  if root is not None and is_changed(root):
    log(
      "the runs import the commit's code; budget and arms are of this checkout, which has changes"
    )
  label = ", ".join([budget, *args.set])
  sweep = prepare_sweep(folder, kind, label, configs, design, args.seeds, args.commit)
  runs = choose(sweep.runs, args.index, args.share)
  log(f"{folder}: {len(runs)} of {len(sweep.runs)} runs, commit {sweep.commit[:12]}")
  try:
    failed = work(sweep, runs, args.jobs, lambda line: tqdm.write(line, file=sys.stderr))
  except (StopSweep, KeyboardInterrupt):
    log("stopped; the same command goes on")
    return EXIT_STOPPED
  if failed:
    log(f"{len(failed)} runs failed; the same command tries them again")
  return max(_report(sweep, args), 1 if failed else 0)


def _sizes(configs: dict[str, Config], design: Design) -> dict[str, Budget]:
  return {arm.name: Budget.of(changed(configs[arm.budget], arm.changes)) for arm in design.arms}


def _list(args: SweepArgs, folder: pathlib.Path, design: Design, sizes: dict[str, Budget]) -> int:
  """Prints what a sweep would do."""
  rows = [
    {"arm": arm.name, "about": arm.about, "changes": arm.changes, **sizes[arm.name]._asdict()}
    for arm in design.arms
  ]
  if args.json:
    print(json.dumps({"folder": str(folder), "seeds": args.seeds, "arms": rows}))
    return 0
  print(f"{folder}: {len(rows)} arms x {args.seeds} seeds")
  for row in rows:
    print(
      f"{row['arm']:18}{row['total']:>14,}{row['active']:>12,} active{row['flops']:>14,.0f} FLOPs  "
      f"{row['about']}"
    )
  for claim in design.claims:
    print(f"  {claim.question} ({claim.arm} - {claim.against})")
  return 0


def _report(sweep: Sweep, args: SweepArgs) -> int:
  from engram_jax.research.report import report_sweep

  found = report_sweep(sweep, args.csv or sweep.folder / "results.csv")
  return 0 if found is None else _say(found, args.json)


def _say(found: dict[str, Any], as_json: bool) -> int:
  if as_json:
    print(json.dumps(found))
  else:
    print(found["text"])
  return 0
