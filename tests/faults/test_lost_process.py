"""A process that dies or stands still ends the others: code 6, a line that names it, and stacks."""

import os
import pathlib
import random
import signal
import subprocess
import time
from collections.abc import Callable

import numpy as np
import pytest
from hosts import ProcessResult, metrics, spawn_processes, spawn_training, wait_for_all

HEARTBEAT = 10

# Collectives until the end of time, but for a process that is told to fail.
BODY = """
def body():
  from engram_jax.errors import DataError
  from jax.experimental import multihost_utils

  failing, kind = map(int, arguments[1:]) if len(arguments) > 1 else (-1, 0)
  distributed.keep_stacks_in(arguments[0])
  for step in range(1_000_000):
    if step == 3:
      print("ready", flush=True)
      if failing in (process, processes):
        raise [DataError("no such file"), KeyError("own"), ValueError("INTERNAL: device")][kind]
    multihost_utils.process_allgather(np.ones(3))
"""


def spawn(*arguments: object, processes: int = 2) -> list[subprocess.Popen]:
  """Processes of one device that are in the middle of their collectives."""
  running = spawn_processes(BODY, arguments, processes=processes, devices=1, heartbeat=HEARTBEAT)
  for process in running:
    while process.stdout.readline() not in ("ready\n", ""):
      pass
  return running


def lose(
  running: list[subprocess.Popen], victim: int, how: signal.Signals, seconds: float = 60
) -> list[ProcessResult]:
  """Sends a process a signal; returns what the others say until they end, and then kills it."""
  running[victim].send_signal(how)
  survivors = [process for process in running if process is not running[victim]]
  try:
    return wait_for_all(survivors, seconds)
  finally:
    running[victim].kill()
    running[victim].communicate()


def check(results: list[ProcessResult], victim: int, folder: pathlib.Path, processes: int) -> None:
  """Each survivor left with code 6, and its last line names the lost process and its stacks."""
  numbers = [number for number in range(processes) if number != victim]
  for number, result in zip(numbers, results, strict=True):
    assert result.code == 6, result.err[-4000:]
    line = result.err.splitlines()[-1]
    assert line.startswith(f"error: process {victim} of {processes} was lost")
    stacks = folder / f"lost_process_{number}.txt"
    assert str(stacks) in line
    assert "Thread" in stacks.read_text()
    assert "Traceback" not in result.err


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [1, 0])
def test_a_lost_process_is_named_by_the_survivor(tmp_path, victim, how):
  """Before, the survivor ended by SIGABRT, after C++ text or a traceback of its collective."""
  check(lose(spawn(tmp_path), victim, how), victim, tmp_path, 2)


def test_an_error_of_one_process_is_no_loss_but_ends_the_others_too(tmp_path):
  zero, one, two = wait_for_all(spawn(tmp_path, 1, 0, processes=3))
  assert (zero.code, one.code, two.code) == (6, 3, 6)
  assert one.err.splitlines()[-1] == "error: no such file"
  for result in (zero, two):
    assert "error: process 1 of 3 ended with an error (DataError: no such file)" in result.err


@pytest.mark.parametrize(("kind", "code"), [(0, 3), (2, 1)])
def test_an_error_of_all_processes_is_their_own(tmp_path, kind, code):
  for result in wait_for_all(spawn(tmp_path, 2, kind)):
    assert result.code == code
    assert "process" not in result.err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("kind", [1, 2])
def test_an_unexpected_error_of_one_process_keeps_its_traceback(tmp_path, failing, kind):
  results = wait_for_all(spawn(tmp_path, failing, kind))
  assert results[failing].code == 1
  assert ("KeyError", "INTERNAL: device")[kind - 1] in results[failing].err.splitlines()[-1]
  assert results[1 - failing].code == 6
  assert f"process {failing} of 2 ended with an error" in results[1 - failing].err


# --- train.py ----------------------------------------------------------------------------------

STEPS = 24
# Smooth where the tiny config jumps, so that runs stay together; see tests/eight/test_step.py.
RUN = ("--model.engram.gate", "sigmoid", "--model.moe.top_k", "4", "--model.residual.branches", 1)
RUN += ("--train.batch_size", 4, "--train.eval_every", STEPS, "--train.steps", STEPS)
RUN += ("--train.checkpoint_every", 4, "--distributed.heartbeat", HEARTBEAT)


def wait_until(running: list[subprocess.Popen], condition: Callable[[], bool]) -> None:
  deadline = time.monotonic() + 200
  while not condition() and time.monotonic() < deadline:
    assert all(process.poll() is None for process in running)
    time.sleep(0.01)


def test_a_training_run_that_lost_a_process_resumes(lab, tmp_path):
  """In one process, of the tiny config that other tests have compiled for it."""
  heartbeat = ("--distributed.heartbeat", HEARTBEAT)
  running = spawn_training(lab, tmp_path, *heartbeat, processes=2, devices=1)
  checkpoints = tmp_path / "t" / "checkpoints"
  wait_until(running, lambda: any(checkpoints.glob("step_*/manifest.json")))
  check(lose(running, 1, signal.SIGKILL), 1, tmp_path / "t", 2)

  (last,) = newest(checkpoints)
  done = lab.training(tmp_path)
  assert done.code == 0, done.err
  assert f"after step {int(last.name[5:])}" in done.err
  assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 25))


def newest(checkpoints: pathlib.Path) -> list[pathlib.Path]:
  """The newest complete checkpoint, or none."""
  return sorted(checkpoints.glob("step_????????"))[-1:]


@pytest.mark.slow
def test_four_processes_lose_one_again_and_again_and_end_where_an_undisturbed_run_does(
  lab, tmp_path, monkeypatch
):
  """A random one at random moments, every other time in the middle of a save."""
  # Else two collectives of one step may wait for one another for ever, where there are few cores.
  flag = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
  monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} {flag}")
  assert lab.training(tmp_path / "one", *RUN).code == 0
  expected = {line["step"]: line["loss"] for line in metrics(tmp_path / "one")}
  root, draw = tmp_path / "four", random.Random(0)
  checkpoints = root / "t" / "checkpoints"
  for attempt in range(3):
    running = spawn_training(lab, root, *RUN, processes=4, devices=1)
    begin = len(metrics(root))
    goal, delay = begin + draw.randint(2, 5), draw.random() / 10
    wait_until(running, lambda goal=goal: len(metrics(root)) >= goal)
    if attempt % 2:
      before = set(os.listdir(checkpoints))
      wait_until(running, lambda before=before: bool(set(os.listdir(checkpoints)) - before))
    time.sleep(delay)
    victim = draw.randrange(4)
    check(lose(running, victim, signal.SIGKILL, 120), victim, root / "t", 4)
  last = newest(checkpoints)
  results = wait_for_all(spawn_training(lab, root, *RUN, processes=4, devices=1), 240)
  assert [result.code for result in results] == [0] * 4, results[0].err
  assert f"after step {int(last[0].name[5:])}" in results[0].err
  found = {line["step"]: line["loss"] for line in metrics(root)}
  assert sorted(found) == sorted(expected)
  np.testing.assert_allclose([found[i] for i in expected], list(expected.values()), rtol=1e-4)
