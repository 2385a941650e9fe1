"""A finished run goes on with more steps and its moments; moved text is known by its digest."""

import json
import shutil

import pytest

from engram_jax.config import load_config
from engram_jax.core.checkpoint import Checkpoints

FIRST = ("--train.steps", 4, "--train.checkpoint_every", 2, "--train.schedule.kind", "constant")


@pytest.fixture(scope="module")
def four(lab, tmp_path_factory):
  """A run of four steps, to be copied."""
  root = tmp_path_factory.mktemp("four")
  done = lab.training(root, *FIRST)
  assert done.code == 0, done.err
  return root / "t"


def lines(run):
  return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_more_steps_go_on_as_if_they_had_been_asked_for_at_first(lab, four, tmp_path):
  run = shutil.copytree(four, tmp_path / "t")
  more = ("--train.steps", 8, *FIRST[2:])
  refused = lab.training(tmp_path, *more)
  assert refused.code == 2
  assert "train.steps: 4 there, 8 now" in refused.err
  assert "--run.extend True goes on" in refused.err

  done = lab.training(tmp_path, *more, "--run.extend", True)
  assert done.code == 0, done.err
  assert "from step 5 on train.steps is 8, 4 before" in done.err
  whole = lab.training(tmp_path / "whole", *more)
  assert whole.code == 0, whole.err
  losses = lambda run: [line["loss"] for line in lines(run)]
  assert losses(run) == losses(tmp_path / "whole" / "t")  # the moments were not lost
  assert [line.get("config_changed_after_step") for line in lines(run)] == [None] * 4 + [4] * 4
  assert load_config(run / "config.yaml").train.steps == 8
  assert json.loads((run / "config.changes.jsonl").read_text())["changes"] == {
    "train.steps": {"before": 4, "now": 8}
  }
  fewer = lab.training(tmp_path, "--train.steps", 6, *FIRST[2:], "--run.extend", True)
  assert fewer.code == 2
  assert "has made 8 steps already" in fewer.err
  again = lab.training(tmp_path, *more)
  assert again.code == 0
  assert "is finished" in again.err


def test_a_lower_rate_holds_from_the_newest_checkpoint_on(lab, four, tmp_path):
  run = shutil.copytree(four, tmp_path / "t")
  rate = load_config(lab.config).train.optimizer.learning_rate / 10
  words = ("--train.optimizer.learning_rate", rate, "--run.extend", True)
  done = lab.training(tmp_path, "--train.steps", 6, *FIRST[2:], *words)
  assert done.code == 0, done.err
  assert [line["learning_rate"] for line in lines(run)][-2:] == pytest.approx([rate, rate])
  with Checkpoints(run / "checkpoints", keep=None) as checkpoints:
    assert checkpoints.newest_valid(print) == 6


def test_text_that_has_moved_is_known_by_its_digest(lab, four, tmp_path):
  run = shutil.copytree(four, tmp_path / "t")
  old = load_config(run / "config.yaml").data.path
  moved = shutil.copytree(old, tmp_path / "elsewhere")
  on = ("--train.steps", 6, *FIRST[2:], "--run.extend", True, "--data.path")
  for path in (moved, old):  # there and back
    done = lab.training(tmp_path, *on, path)
    assert done.code == 0, done.err
  evaluated = lab.evaluation(run, "--tokens", 0, "--json")
  elsewhere = lab.evaluation(run, "--tokens", 0, "--json", "--data_path", moved)
  assert elsewhere.code == 0, elsewhere.err
  assert json.loads(elsewhere.out) == json.loads(evaluated.out)

  first = next(path for path in sorted(moved.rglob("*")) if path.is_file())
  first.write_text(first.read_text() + "another end\n" * 200)
  other = lab.training(tmp_path, "--train.steps", 8, *on[2:], moved)
  assert other.code == 2
  assert "was trained with another t" in other.err  # tokenizer or training text
  refused = lab.evaluation(run, "--data_path", moved)
  assert refused.code == 2
  assert "another training text" in refused.err
  assert load_config(run / "config.yaml").train.steps == 6
