"""Streamed text is the decoded text: result characters, cut at the first stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_jax.data.tokenizer import train_bpe
from engram_jax.inference.completion import TextStream

TOKENIZER = train_bpe(iter(["the thesis of the théâtre: 日本語 🙂 and the end"] * 3), 290)
TEXTS = st.text(alphabet="the sié日🙂\n", min_size=1, max_size=30)


def stream_text(ids, stop=()):
  stream = TextStream(TOKENIZER, stop)
  pieces = [stream.push(i) for i in ids]
  return pieces, stream.close(), stream.stopped


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_pieces_add_up_to_the_text(text):
  pieces, rest, stopped = stream_text(TOKENIZER.encode(text).ids)
  assert "".join(pieces) + rest == text
  assert not stopped
  assert all("\ufffd" not in piece for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, stop=st.lists(st.text(alphabet="the sié日", min_size=1, max_size=4), max_size=3))
def test_nothing_past_the_first_stop_string_is_returned(text, stop):
  pieces, rest, stopped = stream_text(TOKENIZER.encode(text).ids, stop)
  result = "".join(pieces) + rest
  assert text.startswith(result)
  assert not any(s in result for s in stop)
  assert stopped == any(s in text for s in stop)
  if stopped:
    assert any(text[len(result) :].startswith(s) for s in stop)
  else:
    assert result == text


def test_the_end_of_a_stop_string_may_come_much_later():
  """Text that could become a stop string is held back, and returned if it does not."""
  ids = [TOKENIZER.encode(c).ids[0] for c in "the end then"]
  pieces, rest, stopped = stream_text(ids, ["then"])
  assert pieces == ["", "", "", "the ", "e", "n", "d", " ", "", "", "", ""]
  assert (rest, stopped) == ("", True)
  pieces, rest, stopped = stream_text(ids[:-1], ["then"])
  assert "".join(pieces) == "the end "
  assert (rest, stopped) == ("the", False)


def test_half_a_character_is_held_back_to_the_end():
  ids = TOKENIZER.encode("🙂").ids
  assert len(ids) > 1
  pieces, rest, _ = stream_text(ids[:-1])
  assert "".join(pieces) == ""
  assert rest == TOKENIZER.decode(ids[:-1])


def test_an_empty_stop_string_is_refused():
  with pytest.raises(ValueError, match="empty"):
    TextStream(TOKENIZER, [""])
