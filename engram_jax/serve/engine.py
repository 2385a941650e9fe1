"""Continuous batching: requests come and go while the others go on.

One thread owns the device. A turn of its loop reads at most one piece of a waiting prompt, so that
no prompt holds the others up for longer, and then takes every running request one token further.
What a request gets does not depend on what else runs (tests hold it equal to `continuations`).
"""

import collections
import logging
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import tokenizers

from engram_jax.inference.completion import TextStream
from engram_jax.inference.decoder import Decoder
from engram_jax.inference.sampling import require_finite
from engram_jax.serve.request import (
  Done,
  EngineDown,
  Event,
  Failed,
  Job,
  Prompt,
  QueueFull,
  Ticket,
  Token,
)
from engram_jax.serve.slots import Scores, Slots, Step

log = logging.getLogger(__name__)


class Engine:
  """slots: requests that run at once. queue: requests that may wait. stop_ids: tokens that end a
  text and are no part of it. A context manager: the thread runs inside."""

  def __init__(
    self,
    decoder: Decoder,
    tokenizer: tokenizers.Tokenizer,
    *,
    slots: int = 8,
    queue: int = 256,
    stop_ids: Collection[int] = (),
  ):
    self.decoder, self.tokenizer, self.queue = decoder, tokenizer, queue
    self._stop_ids = frozenset(stop_ids)
    self._slots = Slots(decoder, slots)
    self._running: list[_Running | None] = [None] * slots
    self._reading: _Reading | None = None
    self._waiting: collections.deque[Ticket] = collections.deque()
    self._work = threading.Condition()
    self._closed: str | None = None
    self._failures, self._last_failure = 0, None
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

  def __enter__(self) -> "Engine":
    self._thread.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def submit(
    self, jobs: Sequence[Job], listener: Callable[[int, Event], None]
  ) -> tuple[Ticket, ...]:
    """All of them into the queue, or none. listener: is told each job's events, with its index.

    Raises ConfigError for a prompt that is unsound or too long, QueueFull, EngineDown.
    """
    for job in jobs:
      self.decoder.check([job.ids], job.max_new)
    tickets = tuple(
      Ticket(job, lambda event, i=i: listener(i, event)) for i, job in enumerate(jobs)
    )
    with self._work:
      if self._closed:
        raise EngineDown(self._closed)
      if len(self._waiting) + len(tickets) > self.queue:
        raise QueueFull(
          f"{len(self._waiting)} requests wait and {self.queue} may: ask again in a while"
        )
      self._waiting.extend(tickets)
      self._work.notify()
    return tickets

  def cancel(self, tickets: Collection[Ticket]) -> None:
    """Their slots and places in the queue are free by the next turn; no event comes after it."""
    with self._work:
      for ticket in tickets:
        ticket.cancelled = True
      self._waiting = collections.deque(t for t in self._waiting if not t.cancelled)
      self._work.notify()

  def close(self, reason: str = "the server is stopping") -> None:
    """Ends the thread after its turn; whatever is not finished fails, and says why."""
    with self._work:
      self._closed = self._closed or reason
      self._work.notify()
    if self._thread.is_alive():
      self._thread.join()
    self._fail_all(self._closed)

  def status(self) -> dict[str, Any]:
    """For people and load balancers: JSON-able."""
    with self._work:
      return {
        "status": self._closed or "ok",
        "slots": self._slots.count,
        "busy": sum(r is not None for r in self._running) + (self._reading is not None),
        "waiting": len(self._waiting),
        "queue": self.queue,
        "capacity": self.decoder.capacity,
        "failures": self._failures,
        "last_failure": self._last_failure,
      }

  def _run(self) -> None:
    while self._wait():
      try:
        self._turn()
      except Exception as error:
        self._recover(error)

  def _wait(self) -> bool:
    """Until there is something to do; whether to do it."""
    with self._work:
      while not (self._closed or self._waiting or self._reading or any(self._running)):
        self._work.wait()
      return not self._closed

  def _turn(self) -> None:
    self._drop_cancelled()
    self._reading = self._reading or self._next()
    if self._reading:
      self._read()
    if any(self._running):
      self._step()

  def _drop_cancelled(self) -> None:
    self._running = [r if r and not r.ticket.cancelled else None for r in self._running]
    if self._reading and self._reading.ticket.cancelled:
      self._reading = None

  def _next(self) -> "_Reading | None":
    with self._work:
      if not self._waiting:
        return None
      if self._waiting[0].job.max_new and None not in self._running:
        return None
      ticket = self._waiting.popleft()
      # Set under the lock, so that a request is always somewhere: waiting, reading or running.
      self._reading = _Reading(ticket)
      return self._reading

  def _read(self) -> None:
    reading = self._reading
    if not reading.piece(self._slots):
      return
    ticket, job = reading.ticket, reading.ticket.job
    if job.score_prompt:
      self._tell(ticket, lambda: Prompt(reading.tokens(self.tokenizer)))
    if job.max_new:
      slot = self._running.index(None)
      self._slots.put(slot, reading.state, reading.logits_BV, job.ids, job.sampling)
      self._running[slot] = _Running(ticket, TextStream(self.tokenizer, job.stop))
    else:
      self._tell(ticket, lambda: Done("", "length"))
    self._reading = None

  def _step(self) -> None:
    busy_B = np.array([r is not None for r in self._running])
    step = self._slots.step(busy_B, any(r.ticket.job.top for r in self._running if r))
    for slot in np.flatnonzero(busy_B):
      running = self._running[slot]
      self._tell(running.ticket, lambda r=running, s=slot: r.add(step, s, self._stop_ids))
      if running.done is not None:
        self._tell(running.ticket, lambda r=running: r.done)
      if running.done is not None or running.ticket.cancelled:
        self._running[slot] = None

  def _tell(self, ticket: Ticket, make: Callable[[], Event | None]) -> None:
    """Where an answer cannot be made (its text decoded) or delivered, that request ends alone."""
    if ticket.cancelled:
      return
    try:
      event = make()
      if event is not None:
        ticket.listener(event)
    except Exception as error:
      log.exception("a request's answer could not be made or delivered")
      self._fail(ticket, f"the answer could not be made: {_said(error)}")
      ticket.cancelled = True

  def _recover(self, error: Exception) -> None:
    """Those it was working on fail; the ones that wait are served with a fresh state."""
    log.error("the engine failed", exc_info=error)
    self._failures, self._last_failure = self._failures + 1, _said(error)
    try:
      self._fail_working(f"the engine failed while it worked on this request: {_said(error)}")
      self._slots = Slots(self.decoder, self._slots.count)
    except Exception as again:
      log.exception("the engine cannot go on")
      self._closed = f"the engine failed and cannot go on: {_said(again)}"
      self._fail_all(self._closed)

  def _fail_working(self, message: str) -> None:
    working = [r.ticket for r in (*self._running, self._reading) if r]
    self._running, self._reading = [None] * self._slots.count, None
    for ticket in working:
      self._fail(ticket, message)

  def _fail_all(self, message: str) -> None:
    self._fail_working(message)
    with self._work:
      waiting, self._waiting = self._waiting, collections.deque()
    for ticket in waiting:
      self._fail(ticket, message)

  def _fail(self, ticket: Ticket, message: str) -> None:
    try:
      if not ticket.cancelled:
        ticket.listener(Failed(message))
    except Exception:
      log.exception("nobody could be told that a request failed")


def _said(error: Exception) -> str:
  return f"{type(error).__name__}: {error}"


class _Reading:
  """A prompt that is being read, piece by piece."""

  def __init__(self, ticket: Ticket):
    self.ticket, self.state, self.logits_BV = ticket, None, None
    self._at, self._scores, self._rows = 0, [], None

  def piece(self, slots: Slots) -> bool:
    """One more; whether it was the last."""
    job, size = self.ticket.job, slots.sizes[-1]
    if self.state is None:
      self.state, self._rows = slots.decoder.empty(1), slots.ahead(job.ids, 0)
    start, stop = self._at, min(self._at + size, len(job.ids))
    piece, rows = job.ids[start:stop], self._rows
    self._rows = slots.ahead(job.ids, stop)
    following = (*job.ids[start + 1 : stop + 1], 0)[: len(piece)] if job.score_prompt else None
    self.logits_BV, self.state, scores = slots.read(self.state, piece, rows, following, job.top > 0)
    if scores:
      self._scores.append(_first(scores, stop - start))
    self._at = stop
    return stop == len(job.ids)

  def tokens(self, tokenizer: tokenizers.Tokenizer) -> tuple[Token, ...]:
    """The prompt's own, scored: what follows token t - 1 is token t."""
    job, stream = self.ticket.job, TextStream(tokenizer)
    gates = [np.concatenate(g).tolist() for g in zip(*(s.gates for s in self._scores), strict=True)]
    logprobs, ids, best = (np.concatenate([s[i] for s in self._scores]).tolist() for i in range(3))
    tokens = []
    for t, token in enumerate(job.ids):
      start = stream.decoded
      top = tuple(zip(ids[t - 1], best[t - 1], strict=True))[: job.top] if t else ()
      logprob = logprobs[t - 1] if t else None
      gate = tuple(g[t] for g in gates)
      tokens.append(Token(token, stream.push(token), logprob, top, gate, start))
    return tuple(tokens)


def _first(scores: Scores, count: int) -> Scores:
  return Scores(*(x[:count] for x in scores[:3]), tuple(g[:count] for g in scores.gates))


class _Running:
  """A request in a slot."""

  def __init__(self, ticket: Ticket, stream: TextStream):
    self.ticket, self.stream, self.made, self.done = ticket, stream, 0, None

  def add(self, step: Step, slot: int, stop_ids: frozenset[int]) -> Token:
    """The slot's token of this step. Sets `done` at the end."""
    token, start, text = int(require_finite(step.token_B[slot])), self.stream.decoded, ""
    if token in stop_ids:  # scored like any other: evaluation harnesses count on a last token
      self.done = Done(self.stream.close(), "stop")
    else:
      text = self._push(token)
    best = zip(step.top_BK[slot].tolist(), step.top_logprob_BK[slot].tolist(), strict=True)
    gates = tuple(float(g[slot]) for g in step.gates)
    top = tuple(best)[: self.ticket.job.top]
    return Token(token, text, float(step.logprob_B[slot]), top, gates, start)

  def _push(self, token: int) -> str:
    self.made += 1
    text = self.stream.push(token)
    if self.stream.stopped:
      self.done = Done("", "stop")
    elif self.made == self.ticket.job.max_new:
      rest = self.stream.close()
      self.done = Done(rest, "stop" if self.stream.stopped else "length")
    return text
