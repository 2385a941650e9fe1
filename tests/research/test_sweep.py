"""Sweeps run real processes from a commit's code: resumable, repeatable, never pooled."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT

from engram_jax.commands import sweep as command
from engram_jax.config import load_config
from engram_jax.config.load import fields
from engram_jax.errors import ConfigError, DataError
from engram_jax.research import runner
from engram_jax.research.arms import Arm, Claim, Design
from engram_jax.research.report import read_csv, report_csv, report_sweep
from engram_jax.research.runner import cpu_shares, work
from engram_jax.research.source import find_commit
from engram_jax.research.sweep import QUIET, Run, Sweep, _of_fields, choose, prepare_sweep

DESIGN = Design(
  (
    Arm("memory", {}, "as it is"),
    Arm("one_row", {"model.engram.address": "one_row"}, "one row a head"),
  ),
  (Claim("Is it the rows?", "one_row", "memory"),),
)


@pytest.fixture(scope="module")
def budget(lab):
  short = {"train.steps": 4, "train.eval_every": 2, "train.checkpoint_every": 2}
  return load_config(lab.config, QUIET | short)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("sweeps") / "s"


@pytest.fixture(scope="module")
def sweep(lab, budget, folder):
  """Two arms of two seeds, all done; its runs find the programs that other tests compiled."""
  with pytest.MonkeyPatch.context() as patch:
    for name, value in lab.environment.items():
      patch.setenv(name, value)
    sweep = prepare(folder, budget)
    lines = []
    assert work(sweep, sweep.runs, 2, lines.append) == []
    assert len(lines) == 4
    yield sweep


def prepare(folder, budget, design=DESIGN, seeds=2, revision="HEAD"):
  return prepare_sweep(folder, "controls", "t", {"": budget}, design, seeds, revision)


def test_results_are_those_of_the_runs(sweep):
  assert [run.name for run in sweep.runs] == ["memory-s0", "one_row-s0", "memory-s1", "one_row-s1"]
  for run in sweep.runs:
    result = sweep.result(run)
    lines = (sweep.folder / "runs" / run.name / "metrics.jsonl").read_text().splitlines()
    assert result["loss"] == json.loads(lines[-1])["validation/loss"]
    assert result["commit"] == sweep.commit == find_commit("HEAD")[0]
    assert [step for step, _ in result["curve"]] == [2, 4]
    assert set(result["sources"]) == {"bisect", "copy", "dis", "heapq"} & set(result["sources"])
    assert result["sources"]
  assert sweep.result(sweep.runs[0])["loss"] != sweep.result(sweep.runs[2])["loss"]


def test_an_arms_file_says_in_what_it_differs(sweep):
  text = (sweep.folder / "configs" / "one_row.yaml").read_text()
  assert yaml.safe_load(text) == {
    "extends": "budget.yaml",
    "model": {"engram": {"address": "one_row"}},
  }


def test_runs_import_the_commits_code(sweep):
  assert (sweep.folder / "source" / "engram_jax" / "memory" / "hashing.py").is_file()
  assert str(sweep.folder / "source" / "train.py") in sweep.command(sweep.runs[0])
  assert sweep.environment()["PYTHONPATH"] == str(sweep.folder / "source")


def test_a_run_again_has_the_same_loss_bit_for_bit_and_the_others_are_left(sweep):
  run, before = sweep.runs[1], [sweep.result(run) for run in sweep.runs]
  shutil.rmtree(sweep.folder / "runs" / run.name)
  (sweep.folder / "results" / "1.json").unlink()
  lines = []
  assert work(sweep, sweep.runs, 2, lines.append) == []
  assert lines[0] == "3 of 4 runs have a result already"
  again = sweep.result(run)
  assert {k: again[k] for k in ("loss", "curve", "sources", "training_loss")} == {
    k: before[1][k] for k in ("loss", "curve", "sources", "training_loss")
  }
  assert [sweep.result(run) for run in sweep.runs if run.index != 1] == before[:1] + before[2:]


def test_runs_of_another_number_of_cpus_are_refused(sweep, monkeypatch):
  monkeypatch.setattr(runner, "cpu_shares", lambda jobs: [frozenset(range(7))] * jobs)
  with pytest.raises(ConfigError, match="gives each run 7 CPUs, but runs of"):
    work(sweep, sweep.runs, 1, print)


def test_a_folder_is_one_sweep_for_good(sweep, budget):
  more = prepare(sweep.folder, budget, seeds=3)
  assert len(more.runs) == 6
  assert Sweep.open(sweep.folder).runs == more.runs
  with pytest.raises(ConfigError, match=r"--seeds 2: .* has 3 already"):
    prepare(sweep.folder, budget)
  other = budget.model_copy(update={"train": budget.train.model_copy(update={"steps": 5})})
  with pytest.raises(ConfigError, match=r"holds another sweep \(configs/budget\.yaml"):
    prepare(sweep.folder, other, seeds=3)
  with pytest.raises(ConfigError, match=r"holds another sweep \(arms: .*never\s+pooled"):
    prepare(sweep.folder, budget, Design(DESIGN.arms[:1], ()), seeds=3)
  with pytest.raises(ConfigError, match="git knows no such commit"):
    prepare(sweep.folder, budget, revision="no-such-branch")
  (sweep.folder / "sweep.json").write_text(
    (sweep.folder / "sweep.json").read_text().replace(sweep.commit, "0" * 40)
  )
  with pytest.raises(ConfigError, match=r"another sweep \(commit: 0+ there"):
    prepare(sweep.folder, budget, seeds=3)
  (sweep.folder / "sweep.json").write_text(json.dumps(more.describe()))


def test_fields_that_the_commit_has_not_are_left_out_at_their_default(budget):
  known = frozenset(fields()) - {"data.seed", "train.z_loss"}
  tree = _of_fields(budget, known)
  assert "seed" not in tree["data"]
  assert "z_loss" not in tree["train"]
  assert tree["model"] == budget.model_dump(mode="json")["model"]
  other = budget.model_copy(update={"data": budget.data.model_copy(update={"seed": 3})})
  with pytest.raises(ConfigError, match=r"data\.seed=3: the code of --commit has no such field"):
    _of_fields(other, known)


def test_a_run_that_fails_is_named_and_the_others_go_on(lab, budget, sweep, tmp_path):
  arms = (Arm("bad", {"data.path": str(tmp_path / "nothing")}, "no text"), DESIGN.arms[0])
  failing = prepare(tmp_path / "f", budget, Design(arms, ()), seeds=1)
  lines = []
  failed = work(failing, failing.runs, 1, lines.append)
  assert [run.arm for run in failed] == ["bad"]
  assert "failed with code 2" in lines[0]
  assert "no such file or folder" in lines[0]
  assert failing.result(failing.runs[1]) is not None


def test_the_report_says_what_the_csv_says(sweep, tmp_path):
  found = report_sweep(sweep, tmp_path / "c.csv")
  rows = read_csv(tmp_path / "c.csv")
  assert {row["loss"] for row in rows} == {sweep.result(run)["loss"] for run in sweep.runs[:4]}
  again = report_csv(tmp_path / "c.csv")
  assert again == found
  (claim,) = found["claims"]
  losses = {(row["arm"], row["seed"]): row["loss"] for row in rows}
  differences = [losses["one_row", s] - losses["memory", s] for s in (0, 1)]
  assert claim["mean"] == pytest.approx(sum(differences) / 2)
  assert claim["verdict"] == "too few seeds"
  assert f"{claim['mean']:+.4f}" in found["text"]
  for suffix in (".png", ".md", ".statistics.json", ".design.json"):
    assert (tmp_path / f"c{suffix}").stat().st_size > 100
  assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_csvs_of_other_kinds_are_refused(sweep, tmp_path):
  report_sweep(sweep, tmp_path / "c.csv")
  with open(tmp_path / "c.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  rows[1]["commit"] = "f" * 40
  write(tmp_path / "c.csv", rows)
  with pytest.raises(DataError, match="2 commits: they are never pooled"):
    report_csv(tmp_path / "c.csv")
  rows[1]["loss"] = "much"
  write(tmp_path / "c.csv", rows)
  with pytest.raises(DataError, match=r"c\.csv, line 3: no run of a sweep"):
    report_csv(tmp_path / "c.csv")
  with pytest.raises(ConfigError, match="--csv"):
    report_csv(tmp_path / "none.csv")


def write(path, rows):
  with open(path, "w", newline="") as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)


def test_indices_and_shares_choose_runs():
  runs = [Run(i, "a", i) for i in range(10)]
  chosen = lambda index="", share="": [run.index for run in choose(runs, index, share)]
  assert chosen() == list(range(10))
  assert chosen("0-2,9") == [0, 1, 2, 9]
  assert sorted(chosen(share="0/3") + chosen(share="1/3") + chosen(share="2/3")) == chosen()
  assert chosen("0-5", "1/2") == [1, 3, 5]
  for index in ("10", "x", "3-", "-1"):
    with pytest.raises(ConfigError, match="--index"):
      chosen(index)
  for share in ("3/3", "1", "a/b", "-1/2"):
    with pytest.raises(ConfigError, match="--share"):
      chosen(share=share)


def test_jobs_have_equal_shares_of_the_cpus():
  for jobs in (1, 2, 3, 5):
    shares = cpu_shares(jobs)
    assert len(shares) == jobs
    assert len({len(share) for share in shares}) == 1
    assert all(shares)


def test_the_list_says_sizes_and_runs_nothing(tmp_path, capsys):
  words = ["controls", "--root", str(tmp_path / "none"), "--list", "--json"]
  assert command.main(words) == 0
  listed = json.loads(capsys.readouterr().out)
  assert [arm["arm"] for arm in listed["arms"]][:2] == ["memory", "twin"]
  assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["controls", "--seeds", "0"], "--seeds 0 must be from 1"),
    (["controls", "--set", "train.steps"], "--set 'train.steps' must be FIELD=VALUE"),
    (["controls", "--set", "train.step=3"], "did you mean 'train.steps'"),
    (["controls", "--set", "data.path=[x"], "--set 'data.path=[x'"),
    (["controls", "--budget", "nothing"], "nothing.yaml"),
    (["controls", "--budget", "tiny_moe"], "a sweep begins at a model with one memory"),
    (["allocation", "--rho", "a"], "--rho 'a' must be numbers"),
    (["allocation", "--rho", "1.5"], "--rho 1.5 must be above 0"),
    (["capacity", "--rows", "1,x"], "--rows '1,x' must be numbers"),
    (["report", "--csv", "nothing.csv"], "--csv nothing.csv"),
  ],
)
def test_wrong_words_are_refused_before_anything_is_written(words, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError) as error:
    command.main(words)
  assert message in str(error.value)
  assert not list(tmp_path.iterdir())


def test_a_signal_stops_runs_that_save_and_the_same_command_goes_on(lab, tmp_path):
  words = [sys.executable, "-m", "engram_jax", "sweep", "capacity", "--rows", "101", "--seeds", "1"]
  words += ["--budget", str(lab.config), "--root", str(tmp_path), "--name", "s", "--index", "1"]
  words += ["--set", "train.steps=4000", "train.checkpoint_every=4000"]
  start = lambda: subprocess.Popen(
    words, env=lab.environment, cwd=ROOT, stderr=subprocess.PIPE, text=True
  )
  sweep, metrics = start(), tmp_path / "s" / "runs" / "rows_101-s0" / "metrics.jsonl"
  wait_for(lambda: metrics.exists() and metrics.stat().st_size, sweep)
  sweep.send_signal(signal.SIGTERM)
  _, said = sweep.communicate(timeout=120)
  assert sweep.returncode == 75, said
  assert "stopped; the same command goes on" in said
  log = tmp_path / "s" / "logs" / "rows_101-s0.txt"
  assert "saved; the same command resumes" in log.read_text()
  assert not list((tmp_path / "s" / "results").iterdir())

  again = start()
  wait_for(lambda: "resumed" in log.read_text(), again)
  again.send_signal(signal.SIGINT)
  _, said = again.communicate(timeout=120)
  assert again.returncode == 75, said


def wait_for(happened, process):
  deadline = time.monotonic() + 240
  while not happened():
    assert process.poll() is None, process.stderr.read()
    assert time.monotonic() < deadline
    time.sleep(0.2)
