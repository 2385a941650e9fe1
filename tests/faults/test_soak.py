"""A run that is killed, stopped, starved of disk and damaged at random ends as an undisturbed one.

    SOAK_MINUTES=5 KILLS=20 python -m pytest -m slow tests/faults/test_soak.py -s

Each start of the same command meets one fault, drawn from a seed. Afterwards a start without any
ends the run. Its losses are those of the undisturbed run at every step, apart from lines that a
full disk refused. Goodput is the share of the steps made that were needed.
"""

import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

import engram_jax

ROOT = pathlib.Path(engram_jax.__file__).parents[1]
MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))
KILLS = int(os.environ.get("KILLS", "300"))
FAULTS = ("kill", "kill", "stop", "twice", "full", "flip")
STEPS = 100_000
OPTIONS = ("--train.checkpoint_every", 20, "--train.eval_every", 1_000, "--train.log_every", 1)
SIZE_LIMIT = 4096  # bytes of a file, in place of a full disk


class Soak:
  """The starts of one run and what became of them."""

  def __init__(self, lab, root: pathlib.Path, seed: int):
    self.lab, self.root, self.rng = lab, root, random.Random(seed)
    self.run, self.err = root / "t", root.with_suffix(".err")
    self.starts: dict[str, int] = {}
    self.made, self.peaks, self.folders = 0, [], []

  def start(self, *options: object, preexec=None) -> subprocess.Popen:
    words = ["train.py", "--config", self.lab.config, "--run.root", self.root, *OPTIONS]
    words += ["--train.steps", STEPS, *options]
    with open(self.err, "w") as err:
      return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=self.lab.environment,
        stderr=err,
        preexec_fn=preexec,
      )

  def said(self, process: subprocess.Popen) -> str:
    """What the last start said; waits for its end."""
    process.wait(timeout=120)
    return self.err.read_text()

  def fault(self, kinds: tuple[str, ...], longest: float) -> None:
    """One start with one fault within `longest` seconds; the run is resumable after it."""
    kind = self.rng.choice(kinds)
    self.starts[kind] = self.starts.get(kind, 0) + 1
    if kind == "flip":
      self.flip()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE_LIMIT, SIZE_LIMIT))
    process = self.start(preexec=limit if kind == "full" else None)
    begin = self.reached()
    while process.poll() is None and "mesh: " not in self.err.read_text():
      time.sleep(0.1)  # Python's own Ctrl-C while it imports is no fault of a run
    if self.rng.random() < 0.8:  # the others meet it while it restores and compiles
      while process.poll() is None and kind != "full" and self.reached() <= begin:
        time.sleep(0.02)
    first, patience = time.monotonic(), self.rng.uniform(0, longest)
    while process.poll() is None and time.monotonic() - first < patience:
      time.sleep(0.1)
    self.peaks.append(peak_memory(process.pid))
    if process.poll() is None and kind == "stop":
      process.send_signal(signal.SIGTERM)
    elif process.poll() is None and kind == "twice":
      process.send_signal(signal.SIGINT)
      time.sleep(0.3)
      process.send_signal(signal.SIGINT)
    elif process.poll() is None:
      process.kill()
    err = self.said(process)
    allowed = {"kill": (-9,), "flip": (-9, 5), "full": (-9, 5), "stop": (75,), "twice": (75, 130)}
    assert process.returncode in (*allowed[kind], 0), (kind, process.returncode, err[-2000:])
    assert "Traceback" not in err, err[-4000:]
    self.made += max(0, self.reached() - begin)
    self.folders.append(len(list((self.run / "checkpoints").glob("*"))) if self.run.exists() else 0)

  def flip(self) -> None:
    """Changes a bit of the newest checkpoint, as long as another is there."""
    steps = sorted((self.run / "checkpoints").glob("step_????????"))
    if len(steps) > 1:
      path = self.rng.choice([p for p in steps[-1].rglob("*") if p.is_file() and p.stat().st_size])
      content = bytearray(path.read_bytes())
      content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
      path.write_bytes(content)

  def committed(self) -> int:
    """The newest step that is saved."""
    steps = (self.run / "checkpoints").glob("step_????????")
    return max((int(path.name[5:]) for path in steps), default=0)

  def reached(self) -> int:
    """The step of the last whole line of metrics; asked fifty times a second."""
    path = self.run / "metrics.jsonl"
    if not path.exists():
      return 0
    with open(path, "rb") as file:
      file.seek(max(0, path.stat().st_size - 10_000))
      whole = file.read().split(b"\n")[:-1]
    return json.loads(whole[-1])["step"] if whole else 0


def losses(run: pathlib.Path) -> dict[int, float]:
  path = run / "metrics.jsonl"
  found = {}
  for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
    content = json.loads(line)
    found[content["step"]] = content["loss"]
  return found


def peak_memory(pid: int) -> int:
  """Bytes of a process's largest resident set; 0 once it has ended."""
  try:
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
  except OSError:
    return 0
  return next((int(x.split()[1]) << 10 for x in text.splitlines() if x.startswith("VmHWM")), 0)


@pytest.mark.slow
def test_a_run_under_random_faults_ends_as_an_undisturbed_one(lab, tmp_path):
  soak = Soak(lab, tmp_path / "soak", seed=0)
  deadline = time.monotonic() + 60 * MINUTES
  while time.monotonic() < deadline and soak.reached() < STEPS - 100:
    soak.fault(FAULTS, longest=20)
  compare(lab, soak, tmp_path)


@pytest.mark.slow
def test_kills_lose_nothing(lab, tmp_path):
  """With programs compiled before, most kills come while steps are made and saved."""
  begin, kills = time.monotonic(), Soak(lab, tmp_path / "kills", seed=1)
  while kills.starts.get("kill", 0) < KILLS and kills.reached() < STEPS - 100:
    before = kills.committed()
    kills.fault(("kill",), longest=4)
    assert kills.committed() >= before
  print(f"\n{time.monotonic() - begin:.0f} seconds")
  compare(lab, kills, tmp_path)


def compare(lab, soak: Soak, folder: pathlib.Path) -> None:
  """Ends the run without faults, some steps on, and compares it with an undisturbed one."""
  reached = soak.reached()
  whole = Soak(lab, folder / "whole", seed=0)
  for run in (soak, whole):  # to a step that both can have within minutes
    process = run.start()
    while process.poll() is None and run.reached() < reached + 50:
      time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    err = run.said(process)
    assert process.returncode in (0, 75), err[-2000:]
  expected, found = losses(whole.run), losses(soak.run)
  both = found.keys() & expected.keys()
  assert {step: found[step] for step in both} == {step: expected[step] for step in both}
  assert len(both) > 40
  assert soak.made > sum(soak.starts.values())
  assert max(soak.folders) <= 4  # two kept, one being written, one being removed
  peaks = [peak for peak in soak.peaks if peak]
  print(
    f"\n{sum(soak.starts.values())} starts {soak.starts}, {reached} steps kept of {soak.made} made "
    f"(goodput {reached / max(1, soak.made):.2f}), peak memory {peaks[0] >> 20} MiB at first, "
    f"{max(peaks) >> 20} MiB at most, at most {max(soak.folders)} checkpoint folders"
  )
