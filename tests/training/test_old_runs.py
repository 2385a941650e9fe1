"""Runs that an older version trained are restored bit for bit, go on, are evaluated and serve."""

import contextlib
import hashlib
import json
import pathlib
import queue
import shutil

import jax
import pytest

from engram_jax.core import manifest
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.mesh import make_mesh
from engram_jax.core.run_directory import CHECKPOINTS, open_run
from engram_jax.data.pipeline import prepare
from engram_jax.inference.completion import encode_prompts
from engram_jax.inference.decoder import Decoder, generate_tokens
from engram_jax.inference.load import PlacementArgs, load_model
from engram_jax.inference.sampling import Sampling
from engram_jax.serve.engine import Engine
from engram_jax.serve.request import Finished, Request, Token
from engram_jax.training.state import make_setup, restore_state, save_state

ROOT = pathlib.Path(__file__).parents[2]
OLD = pathlib.Path("tests/golden/old_runs")  # their configs name the text by this path
EXPECTED = json.loads((ROOT / OLD / "expected.json").read_text())
STEP = 8


@pytest.fixture(params=EXPECTED)
def old(request, tmp_path, monkeypatch):
  """(name, a copy of the run)."""
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  run = tmp_path / request.param
  shutil.copytree(OLD / request.param, run)
  return request.param, run


def test_a_run_goes_on_with_the_losses_it_had(old, lab):
  name, run = old
  done = lab.run(lab.train, "--config", run / "config.yaml", "--run.root", run.parent)
  assert done.code == 0, done.err
  assert f"resumed {run} after step {STEP}" in done.err
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  losses = {str(line["step"]): line["loss"] for line in lines if line["step"] > STEP}
  expected = EXPECTED[name]["next_losses"]
  assert losses.keys() == expected.keys()
  for step, loss in expected.items():
    assert losses[step] == pytest.approx(loss, abs=1e-6), step


def test_a_state_comes_back_and_is_saved_again_bit_for_bit(old, tmp_path):
  name, run = old
  cfg = open_run(run)
  cfg = cfg.model_copy(update={"run": cfg.run.model_copy(update={"root": str(tmp_path)})})
  data = prepare(cfg, lambda _: None)
  setup = make_setup(cfg, data.vocabulary.layout, make_mesh({}, jax.devices()[:1]))
  with (
    setup.tables,
    Checkpoints(run / CHECKPOINTS, keep=None) as before,
    Checkpoints(tmp_path / "again", keep=1) as after,
  ):
    state = restore_state(before, STEP, setup)
    save_state(after, STEP, setup, state, before.meta(STEP))
    assert tree(before) == tree(after) == EXPECTED[name]["sha256"].keys()
    for path, sha256 in EXPECTED[name]["sha256"].items():
      assert hashlib.sha256(after.open_array(STEP, path).read().tobytes()).hexdigest() == sha256
    for file in sorted(before.folder(STEP).glob("rows/*")):
      assert file.read_bytes() == (after.folder(STEP) / "rows" / file.name).read_bytes()


def tree(checkpoints: Checkpoints) -> set[str]:
  return manifest.read(checkpoints.folder(STEP))["tree"].keys()


def test_a_run_evaluates_to_what_it_did(old, lab):
  name, run = old
  done = lab.evaluation(run, "--tokens", 0, "--json")
  assert done.code == 0, done.err
  result = json.loads(done.out)
  for memory, loss in EXPECTED[name]["evaluation"].items():
    assert result[memory]["loss"] == pytest.approx(loss, abs=1e-6)


def test_a_run_serves(old):
  _, run = old
  loaded = load_model(run, None, lambda _: None)
  with contextlib.ExitStack() as stack:
    source = loaded.open_row_source(stack, PlacementArgs(placement="host"))
    decoder = Decoder(loaded.weights, source, 32)
    (prompt,) = encode_prompts(loaded.tokenizer, ["The row"])
    expected = [int(t[0]) for t in generate_tokens(decoder, [prompt], [Sampling()], 4)]
    engine = stack.enter_context(Engine(decoder, loaded.tokenizer, slots=2))
    events: queue.SimpleQueue = queue.SimpleQueue()
    engine.submit([Request(tuple(prompt), 4, Sampling())], lambda _, event: events.put(event))
    tokens = []
    while isinstance(event := events.get(timeout=300), Token):
      tokens.append(event.id)
    assert isinstance(event, Finished)
    assert tokens == expected
