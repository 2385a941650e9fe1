"""eval.py --score: each token's log-probability is that of one full forward pass over the text."""

import io
import json
import math
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import yaml
from conftest import TINY
from tokenizers.processors import TemplateProcessing

from engram_jax.config import build
from engram_jax.core.mesh import make_mesh
from engram_jax.memory.compress import TokenCompressor
from engram_jax.memory.hash_layout import HashLayout
from engram_jax.memory.vocabulary import Vocabulary
from engram_jax.tables.saved_run import load_run
from engram_jax.training import score
from engram_jax.training.score import encode_text, make_score_step, score_text, score_tokens
from engram_jax.training.state import init_state, make_setup, restore_state

TEXT = "def naïve(x):\n  # <|endoftext|> is text here, and so is 日本\r\n  return x\n"
LONG = 2 * score.PIECE + 7


def plain_logprobs(setup, state, vocabulary, tokens):
  """float32 [T - 1]: one call of the LM on exactly these tokens, as one document."""
  tokens_BT = np.array([tokens])
  layers = setup.tables.layers
  ids = dict(zip(layers, vocabulary.row_ids(tokens_BT), strict=True))
  rows = tuple(state.tables.tables[n][ids[n]] for n in layers)

  @jax.jit
  def run(params, biases, rows):
    model = setup.model(params, biases)
    hidden_BTD, _ = model(tokens_BT, rows)
    return jax.nn.log_softmax(model.logits(hidden_BTD)[0])

  logprobs_TV = np.asarray(run(state.params, state.biases, rows))
  return logprobs_TV[np.arange(len(tokens) - 1), tokens[1:]]


def assert_close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def parts(trained):
  return load_parts(trained)


def load_parts(run, mesh=None):
  """(setup, state, vocabulary) of the shared run."""
  with load_run(run, None, print) as saved:
    setup = make_setup(saved.config, saved.vocabulary.layout, mesh)
    return setup, restore_state(saved.checkpoints, saved.step, setup), saved.vocabulary


@pytest.fixture(scope="module")
def tokens(trained):
  """More tokens than two pieces hold, of text that repeats n-grams."""
  tokenizer = tokenizers.Tokenizer.from_file(str(trained / "tokenizer.json"))
  text = pathlib.Path(io.__file__).read_text()
  return encode_text(tokenizer, text)[:LONG]


@pytest.fixture(scope="module")
def expected(parts, tokens):
  return plain_logprobs(*parts, tokens)


@pytest.fixture(scope="module")
def step(parts):
  return make_score_step(parts[0])


@pytest.mark.parametrize(
  "length", [2, 3, 32, 33, 34, 64, 65, 66, score.PIECE + 1, score.PIECE + 2, LONG]
)
def test_any_prefix_scores_as_one_full_forward_pass(parts, step, tokens, expected, length):
  """Both that the pieces are exact, and that no token's score depends on what follows."""
  assert len(tokens) == LONG
  got = score_tokens(step, *parts, tokens[:length])
  assert got.shape == (length - 1,)
  assert (got <= 0).all()
  assert_close(got, expected[: length - 1])


def test_the_text_that_follows_does_not_count(parts, step, tokens):
  other = [*tokens[:50], *reversed(tokens[:400])]
  assert_close(score_tokens(step, *parts, other)[:49], score_tokens(step, *parts, tokens[:50]))


@pytest.mark.parametrize("mesh", [None, {"fsdp": 1}], ids=["no mesh", "one device"])
def test_lengths_share_programs_and_pieces_do_too(trained, tokens, mesh):
  parts = load_parts(trained, mesh and make_mesh(mesh, jax.devices()[:1]))
  step = make_score_step(parts[0])
  for length in (LONG, LONG - 3, 2 * score.PIECE + 2):  # three pieces each
    score_tokens(step, *parts, tokens[:length])
  assert step._cache_size() == 1


@pytest.mark.parametrize(
  "model",
  [
    {"engram": {"layers": []}},
    {"engram": {"layers": [0, 1], "max_ngram": 4}},
    {"engram": {"conv_kernel": 0, "gate": "sigmoid", "bias": True}},
    {"residual": {"branches": 1}, "tie_embeddings": True, "moe": {"routed_experts": 0}},
    {"attention": {"query_latent": 8}, "moe": {"dispatch": "blocked"}},
  ],
  ids=["no memory", "two memories", "no convolution", "plain residual", "query latent"],
)
def test_every_kind_of_model_is_scored_exactly(model, monkeypatch):
  monkeypatch.setattr(score, "PIECE", 32)
  sections = {
    name: TINY["model"].get(name, {}) | fields
    for name, fields in model.items()
    if isinstance(fields, dict)
  }
  data = TINY["data"] | {"path": "unread"}
  cfg = build(TINY | {"data": data, "model": TINY["model"] | model | sections}, where="test")
  compressor = TokenCompressor.identity(cfg.model.vocab_size)
  layout = HashLayout.of(cfg.model.engram, compressor)
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  setup = make_setup(cfg, layout)
  state = init_state(setup)
  keys = iter(jax.random.split(jax.random.key(1), 1000))
  noisy = lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape)
  state = state._replace(
    params=jax.tree.map(noisy, state.params), biases=jax.tree.map(noisy, state.biases)
  )
  tokens = np.random.default_rng(0).integers(3, 30, 150).tolist()
  parts = setup, state, Vocabulary(tokenizer, compressor, layout)
  got = score_tokens(make_score_step(setup), *parts, tokens)
  assert_close(got, plain_logprobs(*parts, tokens))


def test_ids_that_are_none_are_refused(parts, step):
  for tokens in ([1], [1, 300], [1, -1], [[1, 2]]):
    with pytest.raises(ValueError, match="token id"):
      score_tokens(step, *parts, tokens)


def test_a_model_that_diverged_is_said_so(parts, step, tokens):
  setup, state, vocabulary = parts
  state = state._replace(params=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.params))
  with pytest.raises(score.NonFiniteError, match="token 1 is not finite"):
    score_tokens(step, setup, state, vocabulary, tokens[:20])


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "text.txt"
  path.write_bytes(TEXT.encode())
  return path


def scored(lab, run, *words):
  done = lab.evaluation(run, "--json", "--score", *words)
  assert done.code == 0, done.err
  assert done.out.count("\n") == 1
  return json.loads(done.out)


def test_json_holds_the_tokens_of_training_and_their_scores(lab, trained, parts, file):
  result = scored(lab, trained, file)
  assert (result["run"], result["step"]) == (str(trained), 24)
  tokenizer = tokenizers.Tokenizer.from_file(str(trained / "tokenizer.json"))
  tokenizer.encode_special_tokens = True
  assert result["tokens"] == tokenizer.encode(TEXT, add_special_tokens=False).ids
  assert not {0, 1, 2} & set(result["tokens"])  # special tokens, of which the text spells one
  assert tokenizer.decode(result["tokens"]) == TEXT  # with its line ends
  assert_close(result["logprobs"], plain_logprobs(*parts, result["tokens"]))
  assert result["loss"] == pytest.approx(-np.mean(result["logprobs"]))
  first = len(tokenizer.decode(result["tokens"][:1]).encode())
  bits = -sum(result["logprobs"]) / math.log(2)
  assert result["bits_per_byte"] == pytest.approx(bits / (len(TEXT.encode()) - first))


def test_the_table_for_people_has_a_line_a_token(lab, trained, file):
  result = scored(lab, trained, file)
  done = lab.evaluation(trained, "--score", file)
  assert done.code == 0, done.err
  lines = done.out.splitlines()
  assert len(lines) == len(result["tokens"]) + 3
  assert f"{result['logprobs'][0]:.4f}" in lines[3]
  assert f"loss {result['loss']:.4f} nats" in lines[-1]


def test_standard_input_and_a_step_are_taken(lab, trained, file, monkeypatch):
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
  result = scored(lab, trained, "-")
  assert result["tokens"] == scored(lab, trained, file)["tokens"]
  assert scored(lab, trained, file, "--step", "16")["step"] == 16


@pytest.mark.parametrize("placement", ["host", "file"])
def test_rows_off_the_device_give_the_same_numbers(lab, trained, file, tmp_path, placement):
  copy = pathlib.Path(shutil.copytree(trained, tmp_path / "t"))
  cfg = yaml.safe_load((copy / "config.yaml").read_text())
  cfg["model"]["engram"]["placement"] = placement
  cfg["run"]["root"] = str(tmp_path)
  (copy / "config.yaml").write_text(yaml.safe_dump(cfg))
  here, there = scored(lab, trained, file), scored(lab, copy, file)
  assert there | {"run": str(trained)} == here


def test_a_run_is_scored_without_its_corpus(lab, trained, file, tmp_path):
  copy = pathlib.Path(shutil.copytree(trained, tmp_path / "t"))
  cfg = yaml.safe_load((copy / "config.yaml").read_text())
  cfg["data"] |= {"path": str(tmp_path / "gone"), "cache": str(tmp_path / "cache")}
  (copy / "config.yaml").write_text(yaml.safe_dump(cfg))
  assert scored(lab, copy, file)["logprobs"] == scored(lab, trained, file)["logprobs"]
  assert not (tmp_path / "cache").exists()


def test_special_tokens_are_added_and_scored_if_asked(lab, trained, parts, file, monkeypatch):
  """The run's own tokenizer puts nothing around a text; one that does is put in its place."""
  plain = scored(lab, trained, file)
  assert scored(lab, trained, file, "--special") == plain
  original = score.encode_text

  def encode(tokenizer, text, *, special):
    tokenizer.post_processor = TemplateProcessing(
      single="<|bos|> $A <|endoftext|>", special_tokens=[("<|bos|>", 1), ("<|endoftext|>", 0)]
    )
    return original(tokenizer, text, special=special)

  monkeypatch.setattr(score, "encode_text", encode)
  assert scored(lab, trained, file) == plain
  special = scored(lab, trained, file, "--special")
  assert special["tokens"] == [1, *plain["tokens"], 0]
  assert_close(special["logprobs"], plain_logprobs(*parts, special["tokens"]))


def test_the_tokenizer_given_keeps_its_settings(parts):
  tokenizer = tokenizers.Tokenizer.from_str(parts[2].tokenizer.to_str())
  tokenizer.enable_truncation(3)
  assert len(encode_text(tokenizer, TEXT)) > 3
  assert len(tokenizer.encode(TEXT).ids) == 3


@pytest.mark.parametrize(
  ("content", "words", "said"),
  [
    (None, [], "No such file"),
    ("folder", [], "is a folder, not a file"),
    (b"abc\xff", [], "not UTF-8 at byte 3 (0xff)"),
    (b"", [], "is empty"),
    (b"d", [], "has 1 token: at least two"),
    (b"def", ["--prompt", "x"], "--prompt has no meaning with --score"),
    (b"def", ["--batches", "2"], "--batches has no meaning with --score"),
    (b"def", ["--tokens", "2"], "--tokens has no meaning with --score"),
    (b"def", ["--seed", "2"], "--seed has no meaning with --score"),
    (b"def", ["--step", "3"], "--step 3"),
  ],
)
def test_bad_input_leaves_with_2_before_anything_is_compiled(
  lab, trained, tmp_path, monkeypatch, content, words, said
):
  monkeypatch.setattr(score, "make_setup", lambda *_: pytest.fail("too late"))
  path = tmp_path / "text.txt"
  if content == "folder":
    path.mkdir()
  elif content is not None:
    path.write_bytes(content)
  done = lab.evaluation(trained, "--score", path, *words)
  assert (done.code, done.out) == (2, "")
  assert said in done.err
  assert "Traceback" not in done.err


def test_a_text_that_is_too_large_is_refused(lab, trained, file, monkeypatch):
  monkeypatch.setattr(score, "MAX_TEXT_BYTES", 10)
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
  for name, said in ((file, "at most 10"), ("-", "more than 10 bytes")):
    done = lab.evaluation(trained, "--score", name)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_special_without_a_text_is_refused(lab, trained):
  done = lab.evaluation(trained, "--special")
  assert (done.code, done.out) == (2, "")
  assert "--special is for --score FILE" in done.err


def test_scoring_writes_nothing_into_the_run(lab, trained, file):
  before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
  scored(lab, trained, file)
  assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_the_function_gives_what_the_command_prints(lab, trained, file):
  scores = score_text(trained, None, TEXT, print)
  assert scores.logprobs == scored(lab, trained, file)["logprobs"]
  assert len(scores.texts) == len(scores.tokens)
