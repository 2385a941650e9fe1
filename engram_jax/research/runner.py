"""Works through the runs of a sweep: some at a time, each a process with CPUs of its own."""

import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from engram_jax.config import load_config
from engram_jax.core.manifest import replace_file
from engram_jax.errors import EXIT_STOPPED, ConfigError
from engram_jax.research.allocation import Budget
from engram_jax.research.sweep import LOGS, RESULTS, RUNS, Run, Sweep

POLL_SECONDS = 0.2
VALIDATION = "validation/"


@dataclasses.dataclass
class Job:
  """A run in progress. cpus: the CPUs that it may use; empty where a system does not say."""

  run: Run
  process: subprocess.Popen
  cpus: frozenset[int]
  begin: float


class StopSweep(Exception):
  """A signal has asked the sweep to stop."""


def work(sweep: Sweep, runs: Sequence[Run], jobs: int, log: Callable[[str], None]) -> list[Run]:
  """Does the runs that have no result yet, `jobs` at a time; returns those that failed.

  A signal is passed on to the runs, which save and leave; then KeyboardInterrupt or StopSweep is
  raised, and the same call goes on later.
  """
  free = cpu_shares(jobs)
  _require_cpus(sweep, len(free[0]))
  waiting = [run for run in runs if sweep.result(run) is None]
  done = len(runs) - len(waiting)
  if done:
    log(f"{done} of {len(runs)} runs have a result already")
  working: list[Job] = []
  failed: list[Run] = []
  before = signal.signal(signal.SIGTERM, _stop)
  bar = tqdm(total=len(runs), initial=done, unit="run", disable=not sys.stderr.isatty())
  try:
    while waiting or working:
      while waiting and free:
        working.append(start(sweep, waiting.pop(0), free.pop(0), jobs))
      time.sleep(POLL_SECONDS)
      for job in [job for job in working if job.process.poll() is not None]:
        working.remove(job)
        free.append(job.cpus)
        line, ok = finish(sweep, job)
        bar.update(ok)
        log(line)
        if not ok:
          failed.append(job.run)
  finally:
    _leave(working)
    bar.close()
    signal.signal(signal.SIGTERM, before)
  return failed


def _require_cpus(sweep: Sweep, cpus: int) -> None:
  """ConfigError where runs that are done had another number of CPUs: their last digits follow."""
  results = [sweep.result(run) for run in sweep.runs]
  others = {result["cpus"] for result in results if result is not None} - {cpus}
  if others:
    raise ConfigError(
      f"--jobs gives each run {cpus} CPUs, but runs of {sweep.folder} had {min(others)}: give "
      "--jobs so that they have the same, or another --root"
    )


def _stop(number: int, frame: Any) -> None:
  raise StopSweep


def _leave(working: list[Job]) -> None:
  """Asks runs in progress to save and leave, and waits for them."""
  for job in working:
    job.process.send_signal(signal.SIGTERM)
  for job in working:
    job.process.wait()


def cpu_shares(jobs: int) -> list[frozenset[int]]:
  """Divides this process's CPUs among jobs; what does not divide stays idle.

  A run's last digits follow from the number of its threads, so each has as many as every other.
  """
  if not hasattr(os, "sched_getaffinity"):  # only Linux has it
    return [frozenset()] * jobs
  cpus = sorted(os.sched_getaffinity(0))
  each = max(len(cpus) // jobs, 1)
  starts = [(i * each) % len(cpus) for i in range(jobs)]
  return [frozenset(cpus[s : s + each]) for s in starts]


def start(sweep: Sweep, run: Run, cpus: frozenset[int], jobs: int) -> Job:
  """Starts a run, whose output goes to its log."""
  with open(sweep.folder / LOGS / f"{run.name}.txt", "ab") as log:
    process = subprocess.Popen(
      sweep.command(run),
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=log,
      env=sweep.environment(jobs),
      start_new_session=True,  # Ctrl-C comes to us, and we pass it on once
    )
  if cpus:
    os.sched_setaffinity(process.pid, cpus)  # long before jax makes its threads
  return Job(run, process, cpus, time.monotonic())


def finish(sweep: Sweep, job: Job) -> tuple[str, bool]:
  """Writes the result of a run that has ended; returns a line about it, and whether it has one."""
  run, code = job.run, job.process.returncode
  seconds = time.monotonic() - job.begin
  where = f"run {run.index} ({run.name})"
  if code:
    log = sweep.folder / LOGS / f"{run.name}.txt"
    last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing"]
    stopped = "stopped" if code == EXIT_STOPPED else f"failed with code {code}"
    return f"{where} {stopped} after {seconds:.0f} s: {last[0]} ({log})", False
  try:
    result = read_result(sweep, run) | {"seconds": round(seconds, 1), "cpus": len(job.cpus)}
  except (LookupError, ValueError, OSError) as error:  # its files are not what it left
    return f"{where} ended, but its metrics cannot be read: {error!r}", False
  path = sweep.folder / RESULTS / f"{run.index}.json"
  replace_file(path, json.dumps(result, indent=1).encode())
  return f"{where}: validation loss {result['loss']:.4f}, {seconds:.0f} s", True


def read_result(sweep: Sweep, run: Run) -> dict[str, Any]:
  """The result of a run that has ended, from its metrics and its config."""
  folder = sweep.folder / RUNS / run.name
  cfg = load_config(folder / "config.yaml")
  lines = [json.loads(line) for line in _lines(folder)]
  evaluated = [line for line in lines if f"{VALIDATION}loss" in line]
  last = evaluated[-1]
  if last["step"] != cfg.train.steps:
    raise ValueError(f"its last evaluation is of step {last['step']}, not {cfg.train.steps}")
  size = Budget.of(cfg)
  sources = f"{VALIDATION}source/"
  return {
    "index": run.index,
    "arm": run.arm,
    "seed": run.seed,
    "commit": sweep.commit,
    "steps": last["step"],
    "tokens": cfg.train.batch_size * cfg.data.sequence_length * last["step"],
    "total_parameters": size.total,
    "active_parameters": size.active,
    "flops_per_token": size.flops,
    "loss": last[f"{VALIDATION}loss"],
    "bits_per_byte": last.get(f"{VALIDATION}bits_per_byte", math.nan),
    "training_loss": last["loss"],
    "curve": [[line["step"], line[f"{VALIDATION}loss"]] for line in evaluated],
    "sources": {k.removeprefix(sources): v for k, v in last.items() if k.startswith(sources)},
  }


def _lines(folder: pathlib.Path) -> list[str]:
  return (folder / "metrics.jsonl").read_text().splitlines()
