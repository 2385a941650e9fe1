"""Text out of tokens as they come: whole characters only, and nothing past a stop string."""

from collections.abc import Sequence

import tokenizers
from tokenizers.decoders import DecodeStream


class TextStream:
  """The text of one request.

  What `push` returns is final: a character whose bytes are not all there, and an end that may be
  the beginning of a stop string, are held back until it is clear what they are. All that was
  returned, with what `close` returns, is the decoded text up to the first stop string.
  """

  def __init__(self, tokenizer: tokenizers.Tokenizer, stop: Sequence[str] = ()):
    """stop: strings that end the text and are not part of it; empty ones are not allowed."""
    if "" in stop:
      raise ValueError("a stop string must not be empty")
    self._tokenizer, self._stop = tokenizer, tuple(stop)
    self._decoder, self._ids = DecodeStream(skip_special_tokens=True), []
    self.decoded = 0  # characters of all tokens so far, held back or not
    self._held = ""
    self.stopped = False

  def push(self, token: int) -> str:
    """The text that is certain with this token; "" once a stop string has come."""
    if self.stopped:
      return ""
    self._ids.append(token)
    piece = self._decoder.step(self._tokenizer, token) or ""
    self.decoded += len(piece)
    return self._release(piece)

  def close(self) -> str:
    """What was held back, at the end of the tokens."""
    if self.stopped:
      return ""
    rest = self._release(self._tokenizer.decode(self._ids)[self.decoded :])
    if not self.stopped:
      rest, self._held = rest + self._held, ""
    return rest

  def _release(self, piece: str) -> str:
    text = self._held + piece
    found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
    if found:
      self.stopped, self._held = True, ""
      return text[: min(found)]
    keep = max((_overlap(text, stop) for stop in self._stop), default=0)
    self._held = text[len(text) - keep :]
    return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
  """Length of the longest end of `text` that `stop` begins with."""
  longest = min(len(text), len(stop) - 1)
  return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
