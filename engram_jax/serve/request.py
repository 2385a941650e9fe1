"""Requests of the engine: their parameters, their events, their prefill and their decoding."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import tokenizers

from engram_jax.errors import EngramError
from engram_jax.inference.completion import TextStream
from engram_jax.inference.decoder import PromptChunks
from engram_jax.inference.sampling import Sampling
from engram_jax.inference.state import DecodeState
from engram_jax.serve.slots import Scores, Slots


class QueueFull(EngramError):
  """The queue holds as many requests as it may; ask again later."""


class RequestFailed(EngramError):
  """The engine works, but the answer to one request could not be made."""


class EngineDown(EngramError):
  """The engine has stopped, or failed while it worked on a request."""


@dataclasses.dataclass(frozen=True)
class Request:
  """One continuation.

  ids: the prompt. max_new: tokens to add at most; 0 only prefills the prompt. stop: strings that
  end the text. top: the number of likeliest tokens to report beside each. score_prompt: report the
  prompt's tokens first.
  """

  ids: tuple[int, ...]
  max_new: int
  sampling: Sampling
  stop: tuple[str, ...] = ()
  top: int = 0
  score_prompt: bool = False


class Token(NamedTuple):
  """One token of a prompt or a continuation.

  text: it became certain with this token (a character may need several). logprob: of the model
  itself, at temperature 1 and without penalties; None for a prompt's first token. top: likeliest
  ids and theirs, best first. gates: one a memory, the mean over branches at the token's own
  position, where its n-grams end. start: characters of the prompt, or of the continuation, before
  it. The last token may be one that ends a text: it has no text.
  """

  id: int
  text: str
  logprob: float | None
  top: tuple[tuple[int, float], ...]
  gates: tuple[float, ...]
  start: int


class PromptScored(NamedTuple):
  """The prompt has been prefilled, and its tokens scored."""

  tokens: tuple[Token, ...]


class Finished(NamedTuple):
  """The last event of a request. text: held back until now. reason: "stop" for an end of text or a
  stop string, or "length"."""

  text: str
  reason: str


class Failed(NamedTuple):
  """The last event of a request that failed. is_alone: the engine goes on with the others."""

  message: str
  is_alone: bool = False


Event = PromptScored | Token | Finished | Failed


class RequestHandle:
  """A request in the engine. `listener` is called in the engine's thread, the last time with
  Finished or Failed, unless the request was cancelled."""

  def __init__(self, request: Request, listener: Callable[[Event], None]):
    self.request, self.listener, self.cancelled = request, listener, False


class Prefill:
  """A request whose prompt is being prefilled, chunk by chunk."""

  def __init__(self, handle: RequestHandle):
    self.handle = handle
    self.state: DecodeState | None = None
    self.logits_BV: jax.Array | None = None
    self._chunks: PromptChunks | None = None
    self._next, self._rows_fn = 0, None
    self._scores: list[Scores] = []

  def run_chunk(self, slots: Slots) -> bool:
    """Prefills one more chunk; returns True if it was the last."""
    request, decoder = self.handle.request, slots.decoder
    if self.state is None or self._chunks is None:
      self.state = decoder.empty_state(1)
      self._chunks = decoder.make_chunks([request.ids], self.state, slots.chunk_sizes)
      self._rows_fn = decoder.prefetch(self._chunks, 0)
    i, rows_fn = self._next, self._rows_fn
    self._next, self._rows_fn = i + 1, decoder.prefetch(self._chunks, i + 1)
    self.logits_BV, self.state, scores = slots.prefill_chunk(
      self.state, self._chunks, i, rows_fn, score=request.score_prompt, top=request.top > 0
    )
    if scores is not None:
      self._scores.append(scores)
    return self._next == len(self._chunks)

  def tokens(self, tokenizer: tokenizers.Tokenizer) -> tuple[Token, ...]:
    """The prompt's tokens, scored: the token that follows token t - 1 is token t."""
    request, stream, tokens = self.handle.request, TextStream(tokenizer), []
    scores = jax.tree.map(lambda *parts: np.concatenate(parts).tolist(), *self._scores)
    for t, token in enumerate(request.ids):
      start = stream.decoded
      logprob, top = None, ()
      if t:
        logprob = scores.logprobs[t - 1]
        top = tuple(zip(scores.top_ids[t - 1], scores.top_logprobs[t - 1], strict=True))
      gates = tuple(gate_T[t] for gate_T in scores.gates)
      tokens.append(Token(token, stream.push(token), logprob, top[: request.top], gates, start))
    return tuple(tokens)


class Decoding:
  """A request that is being decoded in a slot. finished: its last event, None before that."""

  def __init__(self, handle: RequestHandle, tokenizer: tokenizers.Tokenizer):
    request = handle.request
    self.handle, self.stream = handle, TextStream(tokenizer, request.stop, request.ids)
    self.generated = 0
    self.finished: Finished | None = None

  def add(self, token: int, scores: Scores, slot: int, stop_ids: frozenset[int]) -> Token:
    """Adds the next token, scored in a slot; sets `finished` at the end."""
    start, text = self.stream.decoded, ""
    if token in stop_ids:  # scored like any other: evaluation harnesses count on a last token
      self.finished = Finished(self.stream.close(), "stop")
    else:
      text = self._push(token)
    logprob, top_ids, top_logprobs, gates = jax.tree.map(lambda x_B: x_B[slot].tolist(), scores)
    top = tuple(zip(top_ids, top_logprobs, strict=True))[: self.handle.request.top]
    return Token(token, text, logprob, top, gates, start)

  def _push(self, token: int) -> str:
    self.generated += 1
    text = self.stream.push(token)
    if self.stream.stopped:
      self.finished = Finished("", "stop")
    elif self.generated == self.handle.request.max_new:
      rest = self.stream.close()
      self.finished = Finished(rest, "stop" if self.stream.stopped else "length")
    return text
