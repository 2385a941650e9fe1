"""train.py on two processes of four devices: it stops together, and goes on in one of eight."""

import re
import signal
import time

import numpy as np
from hosts import metrics, spawn_training, wait_for_all

BATCH, STEPS = 8, 12
# Smooth where the tiny config jumps, so that runs stay together; see tests/eight/test_step.py.
RUN = ("--model.engram.gate", "sigmoid", "--model.moe.top_k", "4", "--train.steps", STEPS)
RUN += ("--train.batch_size", BATCH, "--train.eval_every", STEPS, "--model.residual.branches", 1)


def test_two_hosts_train_as_one_stop_together_and_their_run_moves_to_another_mesh(lab, tmp_path):
  done = lab.training(tmp_path / "one", *RUN)
  assert done.code == 0, done.err
  expected = {line["step"]: line["loss"] for line in metrics(tmp_path / "one")}

  root, split = tmp_path / "two", ("--mesh.data", 2, "--mesh.fsdp", 4)
  running = spawn_training(lab, root, *RUN, *split, processes=2, devices=4)
  deadline = time.monotonic() + 200
  while time.monotonic() < deadline and all(p.poll() is None for p in running):
    if len(metrics(root)) >= 2:
      running[1].send_signal(signal.SIGTERM)  # one host is told, both stop
      break
    time.sleep(0.02)
  first, second = wait_for_all(running, 240)
  assert (first.code, second.code) == (75, 75), (first.err, second.err)
  assert "stopped by another process" in first.err
  assert 2 <= metrics(root)[-1]["step"] < STEPS
  assert not re.search(r"^step ", second.err, re.MULTILINE)  # process 0 alone tells of them

  other = ("--mesh.fsdp", 2, "--mesh.expert", 4, "--mesh.data", 1)
  (one,) = wait_for_all(spawn_training(lab, root, *RUN, *other), 240)
  assert one.code == 0, one.err
  found = {line["step"]: line["loss"] for line in metrics(root)}
  assert sorted(found) == sorted(expected)
  np.testing.assert_allclose([found[i] for i in expected], list(expected.values()), rtol=1e-4)
