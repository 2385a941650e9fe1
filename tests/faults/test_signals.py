"""Signals to whole runs: answered at once, saved where there is something to save."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

import engram_jax

ROOT = pathlib.Path(engram_jax.__file__).parents[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_has_made_no_step_leaves_at_the_first_signal(lab, tmp_path, number):
  """With programs that are not cached, it compiles for many seconds after the line that is read."""
  words = [sys.executable, "train.py", "--config", str(lab.config), "--run.root", str(tmp_path)]
  words += ["--model.layers", "12", "--model.scan_layers", "False"]
  with subprocess.Popen(
    words, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE, text=True
  ) as process:
    while not (line := process.stderr.readline()).startswith("mesh: "):
      assert line, process.wait()
    process.send_signal(number)
    answer = process.stderr.readline()
    rest = process.communicate(timeout=60)[1]
  assert answer == f"{number.name}: stopping; there is nothing to save yet\n"
  assert process.returncode == 75, rest
  assert "Traceback" not in rest
  assert not any((tmp_path / "t" / "checkpoints").glob("step_*"))


def test_a_stop_does_not_wait_for_the_rest_of_an_evaluation(lab, tmp_path, monkeypatch):
  evaluate, read = lab.train.evaluate, []

  def stopped(step, setup, state, batches, *args, **options):
    def and_count():
      for batch in batches:
        read.append(batch)
        signal.raise_signal(signal.SIGTERM)  # as if it had come while the first was compiled
        yield batch

    return evaluate(step, setup, state, and_count(), *args, **options)

  monkeypatch.setattr(lab.train, "evaluate", stopped)
  done = lab.training(tmp_path, "--train.eval_batches", 4)
  assert done.code == 75, done.err
  assert len(read) == 1
  assert "step 12: stopped before its validation loss was known" in done.err
  assert "stopped by SIGTERM, step 12 saved" in done.err
  monkeypatch.undo()
  assert "after step 12" in lab.training(tmp_path, "--train.eval_batches", 4).err
