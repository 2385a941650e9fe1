"""train.py: a run is written whole, stops and resumes to the bit, and refuses bad input."""

import json
import math
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from jax.profiler import ProfileData

import engram_jax
from engram_jax.config import load_config

ROOT = pathlib.Path(engram_jax.__file__).parents[1]
STEPS = 24


@pytest.fixture(scope="module")
def whole(lab):
  """The folder of a run that nothing interrupted, and what it said."""
  done = lab.training(lab.folder / "whole")
  assert done.code == 0, done.err
  return lab.folder / "whole" / "t", done.err


def lines(run: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(run: pathlib.Path) -> list[dict]:
  """Numbers that a run computed: its metrics without the clock's."""
  clock = ("tokens_per_second", "mfu", "checkpoint/")
  return [{k: v for k, v in line.items() if not k.startswith(clock)} for line in lines(run)]


def files(folder: pathlib.Path) -> dict[str, bytes]:
  paths = (path for path in folder.rglob("*") if path.is_file())
  return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def saved(run: pathlib.Path) -> list[str]:
  return sorted(path.name for path in (run / "checkpoints").iterdir())


def copy(run: pathlib.Path, root: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(run, root / run.name))


def damage(checkpoint: pathlib.Path) -> None:
  largest = max(
    (path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
  )
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)


@pytest.fixture
def at_step(lab, monkeypatch):
  """`at_step(n, action)`: the action happens while step n's metrics are written."""

  def at_step(step, action):
    write = lab.train.MetricsWriter.write

    def and_then(self, number, values):
      write(self, number, values)
      if number == step and "loss" in values:
        action()

    monkeypatch.setattr(lab.train.MetricsWriter, "write", and_then)

  return at_step


# --- a run ------------------------------------------------------------------------------------


def test_a_run_writes_its_config_metrics_checkpoints_and_board(lab, whole):
  run, _ = whole
  assert {path.name for path in run.iterdir()} == {
    ".lock",
    "checkpoints",
    "checkpoints.json",
    "config.yaml",
    "metrics.jsonl",
    "tensorboard",
    "tokenizer.json",
  }
  assert load_config(run / "config.yaml").model == load_config(lab.config).model
  assert saved(run) == ["step_00000016", "step_00000024"]
  assert any((run / "tensorboard").iterdir())


def test_metrics_have_a_line_per_step_and_the_first_loss_is_that_of_chance(whole):
  training = lines(whole[0])
  assert [line["step"] for line in training] == list(range(1, STEPS + 1))
  assert training[0]["loss"] == pytest.approx(math.log(300), abs=0.1)
  for line in training:
    assert line["tokens_per_second"] > 0
    assert line["nonfinite_total"] == 0
    assert line["expert_balance"] >= 1
    assert 0 < line["unique_rows/layer_1"] <= 1
    assert 0 < line["gate_mean/layer_1"] < 1
  validation = [line for line in lines(whole[0]) if "validation/loss" in line]
  assert [line["step"] for line in validation] == [12, 24]
  for line in validation:
    assert line["validation/perplexity"] == pytest.approx(math.exp(line["validation/loss"]))
  assert validation[1]["validation/loss"] < validation[0]["validation/loss"]


def test_the_start_says_what_was_decided(whole):
  said = whole[1]
  for words in (
    "text files at",
    "300 ids",
    "parameters without the token embedding",
    "active per token",
    "block 1 has 420 rows",
    "2 windows x 32 = 64 tokens",
    "matmul peak",
    "validation loss",
    "def|",
  ):
    assert words in said, words


def test_a_finished_run_says_so_and_changes_nothing(lab, whole, tmp_path):
  run = copy(whole[0], tmp_path)
  before = files(run)
  done = lab.training(tmp_path)
  assert done.code == 0
  assert "is finished (24 steps)" in done.err
  assert files(run) == before


def test_a_profile_holds_the_steps_by_number_and_the_operations_by_scope(lab, tmp_path):
  words = ("--train.profile", "3:4", "--train.steps", 6)
  done = lab.training(tmp_path, *words)
  assert done.code == 0, done.err
  folder = tmp_path / "t" / "profile"
  assert f"trace of steps 3:4 in {folder}" in done.err
  (trace,) = folder.rglob("*.xplane.pb")
  content = trace.read_bytes()
  for scope in ("sparse_retrieval", "context_aware_gating", "short_conv", "table_update"):
    assert scope.encode() in content, scope
  planes = ProfileData.from_file(str(trace)).planes
  traced = {
    dict(event.stats)["step_num"]
    for plane in planes
    for line in plane.lines
    for event in line.events
    if event.name == "train"
  }
  assert traced == {3, 4}


# --- stopping and resuming --------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_saves_and_leaves_with_75_and_the_same_command_resumes(
  lab, whole, tmp_path, at_step, number
):
  sent = []

  def send():
    sent.append(time.monotonic())
    os.kill(os.getpid(), number)

  at_step(13, send)
  done = lab.training(tmp_path)
  assert done.code == 75, done.err
  assert time.monotonic() - sent[0] < 10
  assert f"stopped by {number.name}, step 13 saved" in done.err
  assert saved(tmp_path / "t")[-1] == "step_00000013"
  assert [line["step"] for line in lines(tmp_path / "t") if "loss" in line][-1] == 13

  done = lab.training(tmp_path)
  assert done.code == 0, done.err
  assert "after step 13" in done.err
  assert numbers(tmp_path / "t") == numbers(whole[0])


def test_a_killed_run_resumes_with_the_same_bits(lab, whole, tmp_path):
  program = tmp_path / "killed.py"
  program.write_text(
    "import os, signal\n"
    "import train\n"
    "from engram_jax.cli import run_command\n"
    "write = train.MetricsWriter.write\n"
    "def and_die(self, step, values):\n"
    "  write(self, step, values)\n"
    "  if step == 21:\n"
    "    os.kill(os.getpid(), signal.SIGKILL)\n"
    "train.MetricsWriter.write = and_die\n"
    "run_command(train.main)\n"
  )
  done = lab.process(program, "--config", lab.config, "--run.root", tmp_path)
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert [line["step"] for line in lines(tmp_path / "t")][-1] == 21
  complete = [name for name in saved(tmp_path / "t") if "." not in name]
  step = int(complete[-1].removeprefix("step_"))
  assert step in (8, 16)  # the save of 16 runs beside steps 17 to 21

  again = lab.training(tmp_path)
  assert again.code == 0, again.err
  assert f"after step {step}" in again.err
  assert numbers(tmp_path / "t") == numbers(whole[0])


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(lab, whole, tmp_path):
  run = copy(whole[0], tmp_path)
  damage(run / "checkpoints" / "step_00000024")
  done = lab.training(tmp_path)
  assert done.code == 0, done.err
  assert "checkpoint of step 24 cannot be used" in done.err
  assert "after step 16" in done.err
  assert numbers(run) == numbers(whole[0])
  assert "is finished" in lab.training(tmp_path).err  # step 24 is sound again


def test_a_second_process_in_the_same_folder_is_refused(lab, whole, tmp_path):
  run = copy(whole[0], tmp_path)
  holder = (
    "import sys; from engram_jax.config import load_config;"
    "from engram_jax.core.run_directory import RunDirectory\n"
    "with RunDirectory(load_config(sys.argv[1], {'run.root': sys.argv[2]}), ''):\n"
    "  print('held', flush=True); sys.stdin.read()"
  )
  words = [sys.executable, "-c", holder, str(lab.config), str(tmp_path)]
  with subprocess.Popen(
    words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout.readline() == "held\n"
    before = files(run)
    done = lab.training(tmp_path)
    assert files(run) == before
    process.stdin.close()
  assert done.code == 2
  holder = f"(process {process.pid} on {socket.gethostname()}, since 20"
  assert f"another process is training in {run} {holder}" in done.err
  assert len(done.err.splitlines()) == 1  # before any data was prepared


def test_a_folder_that_died_before_its_config_was_written_can_be_used(lab, whole, tmp_path):
  run = tmp_path / "t"
  run.mkdir()
  (run / ".lock").touch()
  (run / "tokenizer.json").write_text("{")
  done = lab.training(tmp_path)
  assert done.code == 0, done.err
  assert numbers(run) == numbers(whole[0])


# --- compilation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("placement", "table"),
  [
    ("device", "adam"),
    ("host", "adam"),
    pytest.param("device", "adam_catch_up", marks=pytest.mark.slow),
    pytest.param("host", "adam_catch_up", marks=pytest.mark.slow),
  ],
)
def test_the_step_is_compiled_once_by_a_new_run_and_once_by_one_that_resumes(
  lab, tmp_path, at_step, caplog, placement, table
):
  words = ("--model.engram.placement", placement, "--train.optimizer.table", table)
  words += ("--train.steps", 6, "--train.eval_every", 2)  # an evaluation in each, between steps
  at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
  for code in (75, 0):
    caplog.clear()
    with jax.log_compiles():
      done = lab.unshared().training(tmp_path, *words)
    assert done.code == code, done.err
    said = [record.getMessage() for record in caplog.records]
    assert sum(text.startswith("Compiling jit(step) ") for text in said) == 1
    assert any(text.startswith("Compiling jit(eval_step) ") for text in said)


# --- numbers that are not ---------------------------------------------------------------------


def test_losses_that_are_not_finite_end_a_run_with_4(lab, tmp_path):
  done = lab.training(
    tmp_path, "--train.optimizer.learning-rate", "1e30", "--train.nonfinite-limit", "3"
  )
  assert done.code == 4, done.err
  assert "3 steps in a row" in done.err
  assert "train.nonfinite_limit=3" in done.err
  bad = [line for line in lines(tmp_path / "t") if line.get("nonfinite_total")]
  assert [line["nonfinite_in_row"] for line in bad][:3] == [1, 2, 3]


# --- bad input: code 2, and nothing is written ------------------------------------------------


def test_another_config_under_the_same_name_is_refused(lab, whole, tmp_path):
  run = copy(whole[0], tmp_path)
  before = files(run)
  done = lab.training(tmp_path, "--train.seed", "1", "--model.width", "32")
  assert done.code == 2
  assert "train.seed: 0 there, 1 now" in done.err
  assert "model.width: 16 there, 32 now" in done.err
  assert files(run) == before


def test_a_folder_of_other_files_is_refused(lab, tmp_path):
  (tmp_path / "t").mkdir()
  (tmp_path / "t" / "notes.txt").write_text("mine")
  done = lab.training(tmp_path)
  assert done.code == 2
  assert "no config.yaml" in done.err
  assert files(tmp_path) == {"t/notes.txt": b"mine"}


BAD = [
  (["--model.wdith", "8"], "--model.width"),
  (["--model.width", "many"], "--model.width"),
  (["--model.moe.top-k", "5"], "top_k=5 is above routed_experts=4"),
  (["--train.accumulate", "3"], "accumulate=3"),
  (["--train.sample-prompt", ""], "sample_prompt=''"),
  (["--data.path", "nowhere"], "nowhere"),
  (["--data.path", "EMPTY"], "EMPTY"),
  (["--data.tokenizer", "none.json"], "none.json"),
  (["--train.batch-size", "100000"], "train.batch_size=100000"),
  (["--model.engram.pad-id", "300"], "pad_id=300"),
  (["--train.profile", "5:3"], "train: profile='5:3' must be FIRST:LAST with 1 <= FIRST <= LAST"),
  (["--train.profile", "20:25"], "profile='20:25' must be FIRST:LAST with 1 <= FIRST <= LAST"),
  (["--train.profile", "3"], "train.profile"),
]


@pytest.mark.parametrize(("args", "words"), BAD, ids=[args[0] + words for args, words in BAD])
def test_bad_input_leaves_with_2_and_writes_nothing(lab, whole, tmp_path, args, words):
  del whole  # the corpus is in the cache
  empty = tmp_path / "empty"
  empty.mkdir()
  args = [str(empty) if word == "EMPTY" else word for word in args]
  done = lab.training(tmp_path / "runs", *args)
  assert done.code == 2, done.err
  assert words.replace("EMPTY", str(empty)) in done.err + done.out
  assert "Traceback" not in done.err
  assert not (tmp_path / "runs").exists()


def test_a_config_file_that_is_missing_or_mistyped_is_refused(lab, tmp_path):
  done = lab.run(lab.train, "--config", tmp_path / "none.yaml")
  assert (done.code, done.err) == (2, f"error: {tmp_path / 'none.yaml'}: no such config file\n")
  (tmp_path / "c.yaml").write_text("model: {wdith: 3}\n")
  done = lab.run(lab.train, "--config", tmp_path / "c.yaml")
  assert done.code == 2
  assert "did you mean 'model.width'?" in done.err


@pytest.mark.parametrize(
  ("words", "code", "said"),
  [
    ([], 0, "plan"),
    (["--help"], 0, "plan"),
    (["plam"], 2, "no command 'plam'; there are: train, eval, analyze, convert, "),
  ],
)
def test_the_commands_are_listed_and_a_wrong_one_refused(lab, words, code, said):
  done = lab.process("-m", "engram_jax", *words)
  assert done.returncode == code
  assert said in done.stdout + done.stderr
