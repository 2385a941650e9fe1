"""`analyze gates`: the gates of a forward pass, as numbers, a page and a picture."""

import json

import numpy as np
import pytest

from engram_jax.commands.analyze import main, text_gates
from engram_jax.errors import ConfigError
from engram_jax.inference.load import load_model

TEXT = "def heappush(heap, item):"


@pytest.fixture
def run(trained):
  return trained


def test_gates_are_written_as_json_a_page_and_a_picture(run, tmp_path, capsys):
  files = {"--html": tmp_path / "gates.html", "--png": tmp_path / "gates.png"}
  argv = ["gates", "--run", str(run), "--text", TEXT, "--json"]
  assert main([*argv, *(str(x) for pair in files.items() for x in pair)]) == 0
  result = json.loads(capsys.readouterr().out)
  assert "".join(result["tokens"]) == TEXT
  gates = np.array(result["gates"]["1"])
  assert gates.shape == (len(result["tokens"]),)
  assert ((gates > 0) & (gates < 1)).all()
  assert files["--html"].read_text().count("<span ") == gates.size
  assert files["--png"].read_bytes().startswith(b"\x89PNG")


def test_gates_follow_from_the_text_before_a_token(run):
  model = load_model(run, None, print)
  long, short = (text_gates(model, text)["gates"][1] for text in (TEXT, TEXT[:12]))
  common = min(len(long), len(short)) - 1  # the last token may be another
  np.testing.assert_allclose(long[:common], short[:common], atol=1e-6)


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--text", ""], "has no tokens"),
    (["--text", "x", "--layer", "0"], r"--layer 0 has no memory: give one of \[1\]"),
    (["--text", "x", "--png", "nowhere/x.png"], "there is no folder"),
  ],
)
def test_mistakes_are_one_line(run, argv, message):
  with pytest.raises(ConfigError, match=message):
    main(["gates", "--run", str(run), *argv])


def test_an_unknown_kind_leaves_with_2(capsys):
  assert main(["gate"]) == 2
  assert "there are: gates" in capsys.readouterr().err
