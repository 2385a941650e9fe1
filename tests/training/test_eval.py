"""eval.py: a run's losses with the memory on and off, its continuations, and what it refuses."""

import json
import math
import pathlib
import re
import shutil

import pytest

from engram_jax.core.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def run(trained):
  """A run's folder; a short one, since what is said of it matters here and not how good it is."""
  return trained


@pytest.fixture(scope="module")
def evaluation(lab, run):
  return lab.evaluation(run, "--json", "--tokens", "6", "--prompt", "def f(", "import")


@pytest.fixture(scope="module")
def result(evaluation):
  assert evaluation.code == 0, evaluation.err
  return json.loads(evaluation.out)


def test_json_is_one_object_and_alone_on_stdout(result, evaluation, run):
  assert evaluation.out.count("\n") == 1
  assert (result["run"], result["step"]) == (str(run), 24)
  assert {"memory_on", "memory_off", "samples"} <= set(result)


@pytest.mark.parametrize("memory", ["memory_on", "memory_off"])
def test_figures_agree_with_one_another(result, memory):
  everything = result[memory]
  parts = list(everything["by_source"].values())
  for figures in [everything, *parts]:
    nats = figures["loss"] * figures["tokens"]
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / figures["bytes"])
  for key in ("tokens", "bytes"):
    assert sum(part[key] for part in parts) == everything[key]
  assert sum(p["loss"] * p["tokens"] for p in parts) == pytest.approx(
    everything["loss"] * everything["tokens"]
  )


def test_the_memory_changes_the_loss_of_the_same_tokens(result):
  on, off = result["memory_on"], result["memory_off"]
  assert on["tokens"] == off["tokens"]
  assert on["bytes"] == off["bytes"]
  assert on["loss"] != off["loss"]


def test_the_loss_is_that_of_the_last_line_of_training(lab, run):
  last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
  done = lab.evaluation(run, "--json", "--tokens", "0", "--batches", "2")
  here = json.loads(done.out)["memory_on"]
  assert last["validation/loss"] == here["loss"]
  assert last["validation/tokens"] == here["tokens"]


def test_each_prompt_is_continued_greedily_and_sampled(lab, result, run):
  assert [sample["prompt"] for sample in result["samples"]] == ["def f(", "import"]
  for sample in result["samples"]:
    assert sample["greedy"]
    assert sample["sampled"]
  words = ("--json", "--tokens", "6", "--batches", "1", "--prompt", "def f(", "import")
  again = json.loads(lab.evaluation(run, *words).out)["samples"]
  assert again == result["samples"]
  other = json.loads(lab.evaluation(run, *words, "--seed", "1").out)["samples"]
  assert [sample["greedy"] for sample in other] == [s["greedy"] for s in again]
  assert [sample["sampled"] for sample in other] != [s["sampled"] for s in again]


def test_the_table_for_people_names_every_source(lab, result, run):
  done = lab.evaluation(run, "--tokens", "0")
  assert done.code == 0, done.err
  for source in ("all", *result["memory_on"]["by_source"]):
    assert source in done.out
  assert f"{result['memory_off']['loss']:.4f}" in done.out


def test_evaluating_writes_nothing_into_the_run(lab, run):
  before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
  assert lab.evaluation(run, "--tokens", "0", "--batches", "1").code == 0
  assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_exchanged_tokenizer_is_refused_with_both_digests(lab, run, tmp_path):
  copy = pathlib.Path(shutil.copytree(run, tmp_path / "t"))
  tokenizer = json.loads((copy / "tokenizer.json").read_text())
  vocabulary = tokenizer["model"]["vocab"]
  vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
  (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
  with Checkpoints(copy / "checkpoints", keep=None) as checkpoints:
    trained_with = checkpoints.meta(24)["tokenizer_digest"]

  done = lab.evaluation(copy)
  assert done.code == 2, done.err
  assert "another tokenizer" in done.err
  # Sixty-four hexadecimal digits: a path of that length (there was one) is no digest.
  digests = set(re.findall(r"\b[0-9a-f]{64}\b", done.err))
  assert len(digests) == 2
  assert trained_with in digests
  assert done.out == ""


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--prompt", ""], "--prompt ''"),
    (["--step", "3"], "--step 3"),
    (["--batches", "0"], "--batches 0"),
    (["--temperature", "-1"], "--temperature -1"),
    (["--promt", "x"], "--prompt"),
  ],
)
def test_bad_words_leave_with_2(lab, run, words, said):
  done = lab.evaluation(run, *words)
  assert done.code == 2
  assert said in done.err + done.out
  assert "Traceback" not in done.err


def test_a_folder_that_is_no_run_is_refused(lab, tmp_path):
  done = lab.evaluation(tmp_path)
  assert done.code == 2
  assert f"{tmp_path}: no config.yaml" in done.err
