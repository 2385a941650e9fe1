"""What is asked of the engine, and what it answers: plain values, no jax, no web."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from engram_jax.errors import EngramError
from engram_jax.inference.sampling import Sampling


class QueueFull(EngramError):
  """As many requests wait as may; ask again later."""


class EngineDown(EngramError):
  """The engine has stopped, or failed while it worked on a request."""


@dataclasses.dataclass(frozen=True)
class Job:
  """One continuation.

  ids: the prompt. max_new: most tokens to add; 0 only reads the prompt. stop: strings that end
  the text. top: how many of the likeliest tokens to report beside each. score_prompt: report the
  prompt's own tokens first.
  """

  ids: tuple[int, ...]
  max_new: int
  sampling: Sampling
  stop: tuple[str, ...] = ()
  top: int = 0
  score_prompt: bool = False


class Token(NamedTuple):
  """text: what became certain with this token (a character may need several). logprob: of the
  model itself, at temperature 1 and without penalties; None for a prompt's first token. top:
  likeliest ids and theirs, best first. gates: one a memory, the mean over branches at the token's
  own position, where its n-grams end. start: characters of the prompt, or of the continuation,
  that come before it. The last token may be one that ends a text: it has none of its own."""

  id: int
  text: str
  logprob: float | None
  top: tuple[tuple[int, float], ...]
  gates: tuple[float, ...]
  start: int


class Prompt(NamedTuple):
  """The prompt has been read."""

  tokens: tuple[Token, ...]


class Done(NamedTuple):
  """text: what was held back. reason: "stop" for an end of text or a stop string, or "length"."""

  text: str
  reason: str


class Failed(NamedTuple):
  """The request ends here, through no fault of its own."""

  message: str


Event = Prompt | Token | Done | Failed


class Ticket:
  """A job in the engine. `listener` is called in the engine's thread, the last time with Done or
  Failed, unless the ticket was cancelled."""

  def __init__(self, job: Job, listener: Callable[[Event], None]):
    self.job, self.listener, self.cancelled = job, listener, False
