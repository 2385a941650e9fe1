"""Text behind a prompt is that of all tokens without the prompt's; a token's name is its own."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_makes import MAKES, make

from engram_jax.memory.token_text import (
  Detokenizer,
  TokenPieces,
  continuation,
  is_text,
  token_names,
  token_texts,
)

TEXTS = st.text(alphabet="the quick fox's, é日本😀\n\t ", max_size=40)
WORDS = st.lists(st.sampled_from(["the", "quick", "fox", "of", "lazy", "dog"]), max_size=9)


def ids_of(tokenizer, *names):
  return [tokenizer.token_to_id(name) for name in names]


def check_all_cuts(name, text):
  tokenizer = make(name)
  ids = tokenizer.encode(text, add_special_tokens=False).ids
  whole = tokenizer.decode(ids)
  for cut in range(len(ids) + 1):
    prompt, rest = ids[:cut], ids[cut:]
    held = len(Detokenizer(tokenizer, prompt).held)
    before = tokenizer.decode(prompt[: cut - held])
    assert before + continuation(tokenizer, prompt, rest) == whole


@settings(max_examples=30, deadline=None)
@given(text=TEXTS)
@pytest.mark.parametrize("name", MAKES)
def test_a_prompt_and_its_continuation_are_the_text_of_all(name, text):
  check_all_cuts(name, text)


@settings(max_examples=30, deadline=None)
@given(words=WORDS)
@pytest.mark.parametrize("name", MAKES)
def test_words_behind_a_prompt_keep_their_spaces(name, words):
  check_all_cuts(name, " ".join(words))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", MAKES)
def test_any_tokens_have_some_text_and_whole_characters_only(name, data):
  """Whatever a model draws: no failure, no text lost, none said that its bytes may still change."""
  tokenizer = make(name)
  count = tokenizer.get_vocab_size()
  ids = data.draw(st.lists(st.integers(0, count - 1) | st.integers(0, 260), max_size=30))
  cut = data.draw(st.integers(0, len(ids)))
  pieces = TokenPieces(tokenizer)
  stream = Detokenizer(tokenizer, ids[:cut])
  kept = list(stream.held)
  said = [stream.push(i) for i in ids[cut:]]
  own = b"".join(pieces[i] for i in [*kept, *ids[cut:]] if not pieces.is_special(i))
  expected = own.decode(errors="replace")
  text = "".join(said) + stream.close()
  if name.startswith("byte_level"):  # their text is the tokens' own, one after the other
    assert text == expected


def test_a_wrong_byte_takes_back_nothing_that_was_said():
  tokenizer = make("llama")
  for names, text in (
    (("<0x41>", "<0xF0>", "▁the"), "A\ufffd the"),
    (("<0x41>", "<0xF0>"), "A\ufffd"),
    (("<0xE6>", "<0x97>", "<0xA5>", "<0xFF>", "▁the"), "日\ufffd the"),
    (("▁the", "<0xE6>", "▁the"), "the\ufffd the"),
    (("<0x80>", "<0x80>", "▁quick"), "\ufffd\ufffd quick"),
  ):
    assert continuation(tokenizer, [], ids_of(tokenizer, *names)) == text
  stream = Detokenizer(tokenizer)
  said = [stream.push(i) for i in ids_of(tokenizer, "<0xF0>", "<0x9F>", "<0x98>", "<0x80>")]
  assert said == ["", "", "", "😀"]


def test_a_character_that_the_prompt_began_is_completed_behind_it():
  tokenizer = make("llama")
  begun, rest = ids_of(tokenizer, "▁the", "<0xE6>", "<0x97>"), ids_of(tokenizer, "<0xA5>", "▁the")
  assert continuation(tokenizer, begun, rest) == "日 the"
  assert continuation(tokenizer, begun, []) == "\ufffd\ufffd"


def test_what_looks_like_a_wrong_byte_and_is_none_stays_with_the_prompt():
  """U+FFFD itself, typed by someone."""
  for name in ("byte_level", "llama"):
    tokenizer = make(name)
    ids = tokenizer.encode("the \ufffd", add_special_tokens=False).ids
    more = tokenizer.encode("dog", add_special_tokens=False).ids
    assert "\ufffd" not in continuation(tokenizer, ids, more)


def test_special_tokens_in_between_have_no_text_and_take_no_space():
  for name in ("llama", "gemma", "t5"):
    tokenizer = make(name)
    end, the = ids_of(tokenizer, "</s>", "▁the")
    assert continuation(tokenizer, [the, end], [end, the]) == " the"
    assert continuation(tokenizer, [end], [the]) == tokenizer.decode([the])


def test_a_long_run_of_bytes_is_said_as_it_comes():
  tokenizer = make("llama")
  text = "ไทย" * 200
  ids = tokenizer.encode(text, add_special_tokens=False).ids
  assert continuation(tokenizer, ids[:300], ids[300:]) == tokenizer.decode(ids)[99:]


@pytest.mark.parametrize("name", MAKES)
def test_every_token_has_a_name_of_its_own(name):
  tokenizer = make(name)
  count = tokenizer.get_vocab_size() + 3  # ids that are none, too
  names = token_names(tokenizer, count)
  assert len(set(names)) == count
  assert all(names)
  pieces = TokenPieces(tokenizer)
  for i, said in enumerate(names):
    if not is_text(pieces[i]) and pieces[i]:
      assert said == "bytes:" + "".join(f"\\x{b:02x}" for b in pieces[i])


def test_names_of_sentencepiece_tell_words_from_their_ends_and_bytes_from_letters():
  tokenizer = make("llama")
  names = token_names(tokenizer, tokenizer.get_vocab_size())
  named = lambda *tokens: [names[i] for i in ids_of(tokenizer, *tokens)]
  assert named("▁the", "the", "▁", "a") == [" the", "the", " ", "a"]
  assert named("<0x61>", "<0xE6>", "<0x0A>") == ["bytes:\\x61", "bytes:\\xe6", "\n"]
  assert named("</s>", "<unk>") == ["</s>", "<unk>"]


def test_own_texts_of_several_makes():
  for name, tokens, texts in (
    ("wordpiece", ("quick", "##e", "[SEP]"), [" quick", "e", "[SEP]"]),
    ("t5", ("▁the", "e"), [" the", "e"]),
    ("suffixes", ("the</w>", "g"), ["the ", "g"]),
    ("words", ("fox",), [" fox"]),
    ("byte_level", ("th", "Ġquick", "Ã"), ["th", " quick", "\ufffd"]),
  ):
    tokenizer = make(name)
    assert token_texts(tokenizer, ids_of(tokenizer, *tokens)) == texts
