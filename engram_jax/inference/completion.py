"""Text of generated tokens: complete characters only, and nothing past a stop string."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import tokenizers

from engram_jax.errors import ConfigError
from engram_jax.inference.decoder import Decoder, generate_tokens
from engram_jax.inference.sampling import Sampling
from engram_jax.inference.speculative import generate_tokens_speculatively
from engram_jax.memory.token_text import Detokenizer
from engram_jax.memory.vocabulary import encode_texts


class TextStream:
  """The text of one request, decoded token by token behind its prompt.

  The text that `push` returns is final: a character whose bytes are incomplete, and an end that may
  be the beginning of a stop string, are held back until they are decided. The texts returned, with
  that of `close`, are the text of `Detokenizer` up to the first stop string.
  """

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    stop: Sequence[str] = (),
    prompt: Sequence[int] = (),
  ):
    """stop: strings that end the text and are not part of it; empty ones are not allowed. prompt:
    ids that the tokens continue."""
    if "" in stop:
      raise ValueError("a stop string must not be empty")
    self._decoder, self._stop = Detokenizer(tokenizer, prompt), tuple(stop)
    self.decoded = 0  # characters of all tokens so far, held back for a stop string or not
    self._held_back = ""
    self.stopped = False

  def push(self, token: int) -> str:
    """Returns the text that is certain with this token; "" after a stop string."""
    if self.stopped:
      return ""
    text = self._decoder.push(token)
    self.decoded += len(text)
    return self._release(text)

  def close(self) -> str:
    """Returns the text held back, at the end of the tokens."""
    if self.stopped:
      return ""
    rest = self._release(self._decoder.close())
    if not self.stopped:
      rest, self._held_back = rest + self._held_back, ""
    return rest

  def _release(self, text: str) -> str:
    text = self._held_back + text
    matches = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
    if matches:
      self.stopped, self._held_back = True, ""
      return text[: min(matches)]
    held_back = max((_overlap(text, stop) for stop in self._stop), default=0)
    self._held_back = text[len(text) - held_back :]
    return text[: len(text) - held_back]


def _overlap(text: str, stop: str) -> int:
  """Length of the longest end of `text` that `stop` begins with."""
  longest = min(len(text), len(stop) - 1)
  return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)


FinishReason = Literal["length", "stop", "end_of_text"]


@dataclasses.dataclass
class Completion:
  """The text generated so far after one prompt. finish is None until it ends."""

  prompt: str
  prompt_tokens: int
  text: str = ""
  tokens: int = 0
  finish: FinishReason | None = None


def stream_completions(
  decoder: Decoder,
  tokenizer: tokenizers.Tokenizer,
  prompts: Sequence[str],
  samplings: Sequence[Sampling],
  max_new: int,
  *,
  stop: Sequence[str] = (),
  end_id: int | None = None,
  draft_tokens: int = 0,
) -> Iterator[tuple[list[Completion], list[str]]]:
  """Yields, after every step, all completions so far and the text that this step added to each.

  Args:
    samplings: one a prompt.
    max_new: tokens at most.
    stop: strings that end a text; not part of it.
    end_id: a token that does the same.
    draft_tokens: tokens drafted at each step and verified, if so many are still to come; the texts
      are the same with any.

  Raises ConfigError for an empty prompt or one that does not fit in the decoder.
  """
  encoded = encode_prompts(tokenizer, prompts)
  decoder.check_prompts(encoded, max_new)
  if max_new < 1:
    raise ConfigError(f"tokens={max_new} must be at least 1")
  completions = [Completion(p, len(ids)) for p, ids in zip(prompts, encoded, strict=True)]
  streams = [TextStream(tokenizer, stop, ids) for ids in encoded]
  for step in _token_steps(decoder, encoded, samplings, max_new, draft_tokens):
    added = []
    for completion, stream, tokens in zip(completions, streams, step, strict=True):
      added.append("".join(_extend(completion, stream, tokens, end_id, max_new)))
      completion.text += added[-1]
    yield completions, added
    if all(completion.finish for completion in completions):
      return


def encode_prompts(tokenizer: tokenizers.Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
  """Token ids of each prompt, tokenised as for training: with nothing put around it.

  Raises ConfigError where the tokenizer fails on one.
  """
  return encode_texts(tokenizer, prompts, "prompt")


def _extend(
  completion: Completion, stream: TextStream, tokens: list[int], end_id: int | None, max_new: int
) -> Iterator[str]:
  """Yields the text of `tokens` up to the completion's end, and counts them in it."""
  for token in tokens:
    if completion.finish:
      return
    if token == end_id:
      completion.finish = "end_of_text"
      yield stream.close()
      return
    completion.tokens += 1
    yield stream.push(token)
    if stream.stopped:
      completion.finish = "stop"
    elif completion.tokens == max_new:
      yield stream.close()
      completion.finish = "stop" if stream.stopped else "length"


def _token_steps(
  decoder: Decoder,
  encoded: Sequence[Sequence[int]],
  samplings: Sequence[Sampling],
  max_new: int,
  draft_tokens: int,
) -> Iterator[list[list[int]]]:
  """Yields the new tokens of each request, step by step."""
  draft_tokens = min(draft_tokens, max_new - 1)
  if draft_tokens:
    yield from generate_tokens_speculatively(
      decoder, encoded, samplings, max_new, draft_tokens=draft_tokens
    )
  else:
    for tokens_B in generate_tokens(decoder, encoded, samplings, max_new):
      yield np.asarray(tokens_B)[:, None].tolist()
