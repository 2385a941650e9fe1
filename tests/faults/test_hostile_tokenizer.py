"""Hostile tokenizers: regexes that do not end, texts that grow, and panics are refused in time."""

import json
import os
import pathlib

import pytest
import tokenizers

from engram_jax.config import load_config
from engram_jax.data import tokenizer_probe
from engram_jax.data.corpus import HashedDocument, open_or_build
from engram_jax.data.tokenizer import end_of_text_id, load_or_train, train_bpe
from engram_jax.errors import ConfigError, DataError
from engram_jax.memory import vocabulary
from engram_jax.memory.vocabulary import read_tokenizer

GOOD = json.loads(train_bpe(iter(["some text, some words"]), 300).to_str())


def split(regex: str) -> dict:
  """A pre-tokenizer that cuts by a regex, before the byte level."""
  cuts = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
  return {"type": "Sequence", "pretokenizers": [cuts, GOOD["pre_tokenizer"]]}


def replace(pattern: dict, content: str) -> dict:
  return {"type": "Replace", "pattern": pattern, "content": content}


def twice(letter: str, times: int) -> list[dict]:
  return [replace({"String": letter}, 2 * letter)] * times


# Each: what differs from a good tokenizer.json, and what its refusal says.
HOSTILE = {
  "a slow regex": ({"pre_tokenizer": split("(a+)+$")}, "retry-limit"),
  "a slow regex of digits": ({"pre_tokenizer": split("([0-9]|[0-9][0-9])+x")}, "retry-limit"),
  "a slow regex of a rare letter": ({"pre_tokenizer": split("(ж+ж+)+y")}, "retry-limit"),
  "a slow replacement": ({"normalizer": replace({"Regex": "(a|aa)+b"}, "c")}, "retry-limit"),
  "a growing normalizer": (
    {"normalizer": {"type": "Sequence", "normalizers": twice("a", 40)}},
    "more than 1 s or",
  ),
  "a growing rare letter": (
    {"normalizer": {"type": "Sequence", "normalizers": twice("ж", 40)}},
    "more than 1 s or",
  ),
  "a little growing": (
    {"normalizer": {"type": "Sequence", "normalizers": twice("q", 7)}},
    "at most 32 of each",
  ),
  "a long replacement": (
    {"normalizer": replace({"String": "e"}, "e" * 10_000)},
    "at most 32 of each",
  ),
  "a growing decoder": (
    {"decoder": {"type": "Sequence", "decoders": twice("a", 40)}},
    "more than 1 s or",
  ),
  "nothing replaced": ({"normalizer": replace({"Regex": ""}, "aaaa")}, "index out of bounds"),
  "pieces of length 0": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "non-zero"),
  "a damaged map": (
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "precompiled_charsmap",
  ),
  "a regex that is none": ({"pre_tokenizer": split("(a")}, "not a tokenizer.json"),
  "a regex of many levels": ({"pre_tokenizer": split("(" * 9999 + ")" * 9999)}, "parse depth"),
  "no model": ({"model": None}, "not a tokenizer.json"),
  "a model of another kind": ({"model": {"type": "Markov"}}, "not a tokenizer.json"),
  "merges of what is not there": (
    {"model": GOOD["model"] | {"merges": [["x", "yyy"]]}},
    "not a tokenizer.json",
  ),
  "ids as texts": ({"model": GOOD["model"] | {"vocab": {"a": "0"}}}, "not a tokenizer.json"),
  "an id beyond all": (
    {"model": GOOD["model"] | {"vocab": {"a": 4_000_000_000}, "merges": []}},
    "has 4,000,000,001 ids",
  ),
}


@pytest.fixture(autouse=True)
def little_time(monkeypatch):
  monkeypatch.setattr(tokenizer_probe, "SECONDS", 1)


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
  return tmp_path / "tokenizer.json"


def load(path: pathlib.Path) -> tokenizers.Tokenizer:
  given = {"data.tokenizer": str(path), "data.cache": str(path.parent / "cache")}
  return load_or_train(load_config(None, given), "corpus", lambda: iter([]), lambda line: None)


def verdicts(path: pathlib.Path) -> list[pathlib.Path]:
  return list((path.parent / "cache" / "tokenizers").glob("*"))


@pytest.mark.parametrize(("changes", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_tokenizer_is_refused(path, changes, words):
  path.write_text(json.dumps(GOOD | changes))
  with pytest.raises(ConfigError) as caught:
    load(path)
  message = str(caught.value)
  assert message.startswith("data.tokenizer='")
  assert words in message
  assert len(message.splitlines()) == 1
  assert len(message) < 700
  assert not verdicts(path) or "ids" in words  # only what passed is kept


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"\0" * 99,
    b"[]",
    b"5",
    b'"tokenizer"',
    b"{" * 100_000,
    b"[" * 100_000 + b"]" * 100_000,
    b'{"version": NaN}',
    b"\xff\xfe{\0}\0",
    json.dumps(GOOD).encode()[:-100],
    json.dumps(GOOD).encode("utf-16"),
  ],
  ids=lambda content: str(content[:8]),
)
def test_what_is_no_tokenizer_is_refused(path, content):
  path.write_bytes(content)
  for read in (load, read_tokenizer):
    with pytest.raises(ConfigError, match="not a tokenizer"):
      read(path)


def test_what_is_no_small_file_is_refused(path, monkeypatch):
  os.mkfifo(path)
  with pytest.raises(ConfigError, match="is a pipe, not a file"):
    load(path)
  path.unlink()
  path.symlink_to("/dev/zero")
  with pytest.raises(ConfigError, match="is a device, not a file"):
    load(path)
  with pytest.raises(ConfigError, match="is a folder, not a file"):
    load(path.parent)
  path.unlink()
  monkeypatch.setattr(vocabulary, "MAX_TOKENIZER_BYTES", 1000)
  path.write_text(json.dumps(GOOD))
  with pytest.raises(ConfigError, match="bytes: at most 1,000"):
    load(path)


def test_a_good_one_is_tried_once(path, monkeypatch):
  path.write_text(json.dumps(GOOD))
  tried = []
  apart = tokenizer_probe._try_apart
  monkeypatch.setattr(tokenizer_probe, "_try_apart", lambda text: tried.append(1) or apart(text))
  assert load(path).get_vocab_size() == load(path).get_vocab_size()
  assert len(tried) == 1
  assert len(verdicts(path)) == 1
  path.write_text(json.dumps(GOOD | {"normalizer": {"type": "NFC"}}))
  load(path)
  assert len(tried) == 2


def test_ordinary_rules_pass(path):
  """GPT-4's regex, SentencePiece's spaces, and a vocabulary that lacks most characters."""
  regex = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
  )
  spaces = {"normalizer": replace({"String": " "}, "▁"), "decoder": replace({"String": "▁"}, " ")}
  few = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "</s>": 2}, "unk_token": "<unk>"}
  known = {"type": "NFKC"}
  for changes in ({"pre_tokenizer": split(regex)}, spaces, {"model": few}, {"normalizer": known}):
    path.write_text(json.dumps(GOOD | {"added_tokens": []} | changes))
    load(path)


def test_a_panic_in_loading_is_a_refusal(path, monkeypatch):
  class PanicException(BaseException):
    pass

  def panic(text: str) -> None:
    raise PanicException("index out of bounds" + "!" * 9999)

  path.write_text(json.dumps(GOOD))
  monkeypatch.setattr(vocabulary.tokenizers, "Tokenizer", type("", (), {"from_str": panic}))
  with pytest.raises(ConfigError, match="json: index out of bounds") as caught:
    read_tokenizer(path)
  assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
  "changes",
  [
    {"model": {"type": "WordLevel", "vocab": {"</s>": 0}, "unk_token": "<unk>"}},
    {"pre_tokenizer": split("(a|b|ab)+c")},
  ],
)
def test_a_text_that_the_tokenizer_fails_on_is_an_error_of_the_data(tmp_path, changes):
  config = GOOD | {"added_tokens": []} | changes
  tokenizer = tokenizers.Tokenizer.from_str(json.dumps(config))
  tokenizer.add_special_tokens(["</s>"])
  documents = [HashedDocument(i << 62, "x", "ab" * 50) for i in range(4)]
  cfg = load_config(None, {"data.validation_fraction": 0.5}).data
  with pytest.raises(DataError, match="the tokenizer fails on a text"):
    open_or_build(
      tmp_path / "corpus", documents, tokenizer, end_of_text_id(tokenizer), cfg, lambda line: None
    )
  assert not list(tmp_path.iterdir())
