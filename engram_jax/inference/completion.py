"""Prompts to text, streamed: encoding, continuing, decoding, and where each request ends."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import tokenizers

from engram_jax.errors import ConfigError
from engram_jax.inference.decoder import Decoder, continuations
from engram_jax.inference.sampling import Sampling
from engram_jax.inference.speculative import speculative_continuations
from engram_jax.inference.text import TextStream

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
