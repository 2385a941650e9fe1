"""Text out of tokens as they come: whole characters only, and nothing past a stop string."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import tokenizers
from tokenizers.decoders import DecodeStream

from engram_jax.errors import ConfigError
from engram_jax.inference.decoder import Decoder, continuations
from engram_jax.inference.sampling import Sampling
from engram_jax.inference.speculative import speculative_continuations


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


Reason = Literal["length", "stop", "end_of_text"]


@dataclasses.dataclass
class Completion:
  """What was said so far after one prompt. finish is None until it ends."""

  prompt: str
  prompt_tokens: int
  text: str = ""
  tokens: int = 0
  finish: Reason | None = None


def complete(
  decoder: Decoder,
  tokenizer: tokenizers.Tokenizer,
  prompts: Sequence[str],
  samplings: Sequence[Sampling],
  max_new: int,
  *,
  stop: Sequence[str] = (),
  end_id: int | None = None,
  guesses: int = 0,
) -> Iterator[tuple[list[Completion], list[str]]]:
  """After every step, all completions so far and the text that this step added to each.

  Args:
    samplings: one a prompt. max_new: tokens at most.
    stop: strings that end a text; not part of it. end_id: a token that does the same.
    guesses: tokens guessed ahead at each step and checked, if so many are still to come; the texts
      are the same with any.

  Raises ConfigError for an empty prompt or one that does not fit in the decoder.
  """
  encoded = encode(tokenizer, prompts)
  decoder.check(encoded, max_new)
  done = [Completion(p, len(ids)) for p, ids in zip(prompts, encoded, strict=True)]
  streams = [TextStream(tokenizer, stop) for _ in prompts]
  for step in _steps(decoder, encoded, samplings, max_new, guesses):
    added = []
    for one, stream, tokens in zip(done, streams, step, strict=True):
      added.append("".join(_take(one, stream, tokens, end_id, max_new)))
      one.text += added[-1]
    yield done, added
    if all(one.finish for one in done):
      return


def encode(tokenizer: tokenizers.Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
  """Token ids of each prompt, as text was tokenised for training: with nothing put around it."""
  batch = tokenizer.encode_batch(list(prompts), add_special_tokens=False)
  return [encoding.ids for encoding in batch]


def _take(
  one: Completion, stream: TextStream, tokens: list[int], end_id: int | None, max_new: int
) -> Iterator[str]:
  for token in tokens:
    if one.finish:
      return
    if token == end_id:
      one.finish = "end_of_text"
      yield stream.close()
      return
    one.tokens += 1
    yield stream.push(token)
    if stream.stopped:
      one.finish = "stop"
    elif one.tokens == max_new:
      yield stream.close()
      one.finish = "stop" if stream.stopped else "length"


def _steps(decoder, encoded, samplings, max_new: int, guesses: int) -> Iterator[list[list[int]]]:
  if max_new < 1:
    raise ConfigError(f"tokens={max_new} must be at least 1")
  if guesses := min(guesses, max_new - 1):
    yield from speculative_continuations(decoder, encoded, samplings, max_new, guesses=guesses)
    return
  for tokens_B in continuations(decoder, encoded, samplings, max_new):
    yield np.asarray(tokens_B)[:, None].tolist()
