"""train.py on two processes of four devices: it stops together, and goes on in one of eight."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
from hosts import ROOT, free_port

BATCH, STEPS = 8, 12
# Smooth where the tiny config jumps, so that runs stay together; see tests/eight/test_step.py.
RUN = ("--model.engram.gate", "sigmoid", "--model.moe.top_k", "4", "--train.steps", STEPS)
RUN += ("--train.batch_size", BATCH, "--train.eval_every", STEPS, "--model.residual.branches", 1)


def start(lab, root, *more, processes=1, devices=8):
  """One train.py per process, of one run."""
  flags = f"{lab.environment['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
  environment = lab.environment | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
  command = [sys.executable, "train.py", "--config", lab.config, "--run.root", root, *RUN, *more]
  port = free_port()
  join = lambda i: ["--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.process", i]
  words = [
    [*command, *(join(i) + ["--distributed.processes", processes] if processes > 1 else [])]
    for i in range(processes)
  ]
  return [
    subprocess.Popen([*map(str, w)], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for w in words
  ]


def finish(running, seconds=240):
  try:
    said = [process.communicate(timeout=seconds)[1] for process in running]
  finally:
    for process in running:
      process.kill()
  return [process.returncode for process in running], said


def lines(root):
  return [json.loads(line) for line in (root / "t" / "metrics.jsonl").read_text().splitlines()]


def test_two_hosts_train_as_one_stop_together_and_their_run_moves_to_another_mesh(lab, tmp_path):
  done = lab.training(tmp_path / "one", *RUN)
  assert done.code == 0, done.err
  expected = {line["step"]: line["loss"] for line in lines(tmp_path / "one")}

  root, split = tmp_path / "two", ("--mesh.data", 2, "--mesh.fsdp", 4)
  running = start(lab, root, *split, processes=2, devices=4)
  deadline = time.monotonic() + 200
  while time.monotonic() < deadline and all(p.poll() is None for p in running):
    written = root / "t" / "metrics.jsonl"
    if written.exists() and written.read_text().count("\n") >= 2:
      running[1].send_signal(signal.SIGTERM)  # one host is told, both stop
      break
    time.sleep(0.02)
  codes, said = finish(running)
  assert codes == [75, 75], said
  assert "stopped by another process" in said[0]
  assert 2 <= lines(root)[-1]["step"] < STEPS
  assert said[1].count("step ") == 0  # process 0 alone speaks

  codes, more = finish(start(lab, root, "--mesh.fsdp", 2, "--mesh.expert", 4, "--mesh.data", 1))
  assert codes == [0], more
  found = {line["step"]: line["loss"] for line in lines(root)}
  assert sorted(found) == sorted(expected)
  np.testing.assert_allclose([found[i] for i in expected], list(expected.values()), rtol=1e-4)
