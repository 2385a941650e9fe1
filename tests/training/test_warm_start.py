"""A run starts from another's weights: the same model, or a memory added to one that had none."""

import json
import re

import numpy as np
import pytest

from engram_jax.config import load_config
from engram_jax.core import manifest
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.tables.saved_run import load_run

QUICK = ("--train.steps", 2, "--train.sample_tokens", 0, "--model.residual.branches", 1)
STILL = ("--train.optimizer.learning_rate", 1e-30, "--model.moe.bias_step", 0)  # nothing is learned


def saved(run, step):
  """{path: array} of parameters, biases and tables of a step."""
  with Checkpoints(run / "checkpoints", keep=None) as checkpoints:
    tree = manifest.read(checkpoints.folder(step))["tree"]
    parts = ("params/", "biases/", "tables/")
    return {p: checkpoints.open_array(step, p).read() for p in tree if p.startswith(parts)}


@pytest.fixture(scope="module")
def without(lab):
  """A run without a memory."""
  words = ("--run.name", "without", "--model.engram.layers", *QUICK)
  assert lab.training(lab.folder, *words).code == 0
  return lab.folder / "without"


@pytest.fixture(scope="module")
def still(lab, without):
  """A run with a memory that started from it and learned nothing."""
  done = lab.training(
    lab.folder, "--run.name", "still", "--train.init_from", without, *STILL, *QUICK
  )
  assert done.code == 0, done.err
  assert f"weights of {without}, step 2" in done.err
  return lab.folder / "still"


def test_a_memory_is_added_and_everything_else_stays(without, still):
  old, new = saved(without, 2), saved(still, 2)
  assert old.keys() < new.keys()
  for path, value in old.items():
    np.testing.assert_array_equal(new[path], value, path)
  added = new.keys() - old.keys()
  assert "tables/0" in added
  assert all("/engram/" in path or path == "tables/0" for path in added)


def test_without_a_config_the_model_and_tokenizer_of_the_run_are_taken(lab, without, monkeypatch):
  """The shipped default has another model, another text and another vocabulary."""
  data = load_config(without / "config.yaml").data
  text = ("--data.source", data.source, "--data.path", data.path, "--data.cache", data.cache)
  words = ("--run.root", lab.folder, "--run.name", "bare", "--train.init_from", without, *text)
  small = ("--train.steps", 1, "--train.batch_size", 2, "--data.sequence_length", 32)
  memory = ("--model.engram.layers", 1, "--model.engram.heads", 1, "--train.eval_batches", 1)
  done = lab.run(lab.train, *words, *small, *memory, "--train.sample_tokens", 0)
  assert done.code == 0, done.err
  assert f"weights of {without}, step 2" in done.err
  cfg, old = (load_config(lab.folder / name / "config.yaml") for name in ("bare", "without"))
  assert cfg.model.engram.layers == (1,)
  assert cfg.model.model_copy(update={"engram": old.model.engram}) == old.model
  other = lab.run(lab.train, *words, *small, "--config", "configs/tiny.yaml")
  assert other.code == 2


def test_the_same_model_goes_on_with_its_tables(lab, still):
  """The second run's first loss is the loss that the first run's weights have."""
  words = ("--run.name", "again", "--train.init_from", still, *STILL, *QUICK)
  assert lab.training(lab.folder, *words).code == 0
  old, new = saved(still, 2), saved(lab.folder / "again", 2)
  assert old.keys() == new.keys()
  for path, value in old.items():
    np.testing.assert_allclose(new[path], value, rtol=0, atol=1e-20, err_msg=path)  # it did learn
  losses = [
    [
      json.loads(line)["loss"]
      for line in (lab.folder / name / "metrics.jsonl").read_text().splitlines()
    ]
    for name in ("still", "again")
  ]
  assert losses[0] == losses[1]


@pytest.mark.parametrize("placement", ["host", "file"])
def test_the_sources_tables_may_lie_anywhere_and_be_rounded(lab, still, tmp_path, placement):
  """Values that do not move stay: only the table's dtype is another."""
  words = ("--run.name", "there", "--train.seed", 5, "--model.engram.placement", placement)
  assert lab.training(tmp_path, *words, *STILL, *QUICK).code == 0
  there = tmp_path / "there"
  words = ("--run.name", "here", "--train.init_from", there)
  words += ("--model.engram.table_dtype", "bfloat16")
  for _ in range(2):  # it can be resumed: its state has the dtypes that its config says
    done = lab.training(tmp_path, *words, *STILL, *QUICK)
    assert done.code == 0, done.err
  assert "is finished" in done.err
  old, new = saved(there, 2), saved(tmp_path / "here", 2)
  with load_run(there, 2, print) as run:
    rows = np.concatenate(list(run.rows(1)))
  np.testing.assert_array_equal(new["tables/0"][: len(rows)], rows.astype("bfloat16"))
  assert rows.any()
  for path, value in old.items():
    np.testing.assert_allclose(new[path], value, rtol=0, atol=1e-20, err_msg=path)


def test_rounding_is_said(lab, still, tmp_path):
  words = ("--train.init_from", still, "--model.engram.table_dtype", "bfloat16", *STILL, *QUICK)
  done = lab.training(tmp_path, *words)
  assert done.code == 0, done.err
  assert "tables of float32 become bfloat16" in done.err


def test_a_run_that_goes_on_reads_its_own_checkpoint(lab, without, tmp_path):
  """The source may be gone by then."""
  words = ("--run.name", "resumed", "--train.init_from", without, *STILL, *QUICK)
  assert lab.training(tmp_path, *words).code == 0
  moved = without.rename(without.with_name("gone"))
  try:
    done = lab.training(tmp_path, *words)
  finally:
    moved.rename(without)
  assert done.code == 0
  assert "is finished" in done.err


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (("--train.init_from", "nowhere"), "nowhere"),
    (("--model.width", 24), r"another model: .* there, .* here"),
    (("--model.vocab_size", 320), "tokenizer"),
    (("--model.layers", 3), "blocks/2/.* is nothing there"),
    (("--model.engram.heads", 3), "hash layout"),
    (("--model.engram.layers",), "would drop"),
    (("--model.engram.placement", "host"), "placement=device"),
  ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(lab, still, tmp_path, words, message):
  source = () if "--train.init_from" in words else ("--train.init_from", still)
  done = lab.training(tmp_path, *source, *words, *QUICK)
  assert done.code == 2, done.err
  assert re.search(message, done.err)
  assert list(tmp_path.iterdir()) == []
