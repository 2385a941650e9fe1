"""The bytes of a text's tokens are the text's, or it is said that they are not."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_makes import MAKES, make

from engram_jax.data.byte_counts import check_bytes, compare_bytes
from engram_jax.data.corpus import deduplicate
from engram_jax.data.files import Document
from engram_jax.data.tokenizer import end_of_text_id, token_bytes
from engram_jax.errors import ConfigError, DataError

ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
LOSSLESS = [n for n in MAKES if n.startswith("byte_level")] + ["llama", "gemma"]
WITH_PREFIX = ["byte_level_prefix", "llama", "t5", "t5_first", "wordpiece", "words"]
COUNTS = {name: token_bytes(make(name)) for name in MAKES}


def ids_of(name, text):
  return make(name).encode(text, add_special_tokens=False).ids


def counted(name, text):
  return int(COUNTS[name][ids_of(name, text)].sum())


@settings(max_examples=60, deadline=None)
@given(text=ANY)
@pytest.mark.parametrize("name", LOSSLESS)
def test_any_text_has_the_bytes_of_its_tokens(name, text):
  text = text.replace("▁", "")  # SentencePiece's own sign is a space to it
  ids = ids_of(name, text)
  made = int(COUNTS[name][ids].sum())
  assert made - len(text.encode()) in ((0, 1) if name in WITH_PREFIX else (0,))
  assert compare_bytes(make(name), COUNTS[name], [text], [ids]) is None


@pytest.mark.parametrize("name", sorted(set(MAKES) - {"suffixes"}))
def test_words_that_a_tokenizer_knows_have_their_bytes(name):
  for text in ("the quick fox", "the lazy fox", "fox"):
    ids = ids_of(name, text)
    extra = 1 if name in (*WITH_PREFIX, "no_space_piece") else 0
    assert int(COUNTS[name][ids].sum()) == len(text.encode()) + extra
    assert compare_bytes(make(name), COUNTS[name], [text], [ids]) is None


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("wordpiece", "the  quick\nfox"),
    ("wordpiece", "(the) quick-fox"),
    ("wordpiece", "日本"),
    ("t5", "the Ω"),
    ("words", "the unheard word"),
    ("suffixes", "the  fox"),
    ("no_space_piece", "the ÖÁ"),
  ],
)
def test_what_a_tokenizer_loses_is_noticed(name, text):
  ids = ids_of(name, text)
  why = compare_bytes(make(name), COUNTS[name], ["the fox", text], [ids_of(name, "the fox"), ids])
  assert why.startswith(f"2 texts have {len(text.encode()) + 7} bytes, but")


def test_makes_without_a_decoder_are_counted_as_they_read():
  sentence = "the quick fox"
  for change in ("byte_level", "t5", "gemma"):
    tokenizer = tokenizers.Tokenizer.from_str(make(change).to_str())
    config = json.loads(tokenizer.to_str()) | {"decoder": None}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(config))
    ids = tokenizer.encode(sentence, add_special_tokens=False).ids
    assert compare_bytes(tokenizer, token_bytes(tokenizer), [sentence], [ids]) is None


def test_special_tokens_have_no_bytes_and_added_ones_their_own():
  tokenizer = tokenizers.Tokenizer.from_str(make("llama").to_str())
  tokenizer.add_tokens(["übrig"])
  counts = token_bytes(tokenizer)
  assert counts[
    [tokenizer.token_to_id(t) for t in ("<s>", "übrig", "▁the", "<0xE6>")]
  ].tolist() == [
    0,
    6,
    4,
    1,
  ]


def documents(*texts):
  return lambda: deduplicate(Document("s", text) for text in texts)


def test_the_verdict_is_kept_with_the_corpus(tmp_path):
  tokenizer, counts = make("wordpiece"), COUNTS["wordpiece"]
  read = documents(*(f"the quick {word} fox" for word in ("lazy", "dog", "of", "the-")))
  first = check_bytes(tmp_path, tokenizer, counts, read, 0.99)
  assert "bytes, but" in first

  def unreadable():
    raise DataError("no more")

  assert check_bytes(tmp_path, tokenizer, counts, unreadable, 0.99) == first
  (kept,) = tmp_path.iterdir()
  kept.write_text("{")
  assert check_bytes(tmp_path, tokenizer, counts, unreadable, 0.99).endswith("no more")
  good = documents("the quick fox", "the lazy dog")
  assert check_bytes(tmp_path, tokenizer, counts, good, 0.99) is None


def test_where_no_text_is_validation_text_others_are_compared(tmp_path):
  read = documents("(the) quick-fox")
  assert check_bytes(tmp_path, make("wordpiece"), COUNTS["wordpiece"], read, 1e-9) is not None


def test_the_end_of_text_may_be_named():
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<fin>": 1}, "a"))
  with pytest.raises(ConfigError, match=r"name one .* in data\.end_of_text: it has no special"):
    end_of_text_id(tokenizer)
  tokenizer.add_special_tokens(["<fin>", "<begin>"])
  with pytest.raises(ConfigError, match=r"its special tokens are '<fin>', '<begin>'"):
    end_of_text_id(tokenizer)
  assert end_of_text_id(tokenizer, "<fin>") == 1
  assert end_of_text_id(tokenizer, "a") == 0
  with pytest.raises(ConfigError, match=r"data\.end_of_text='<end>' is no token"):
    end_of_text_id(tokenizer, "<end>")
  both = make("llama")
  assert end_of_text_id(both) == both.token_to_id("</s>")
  assert end_of_text_id(both, "<s>") == both.token_to_id("<s>")


def test_counts_are_of_every_id():
  for name in MAKES:
    assert COUNTS[name].dtype == np.int32
    assert len(COUNTS[name]) == make(name).get_vocab_size()
