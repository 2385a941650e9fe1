"""Continuous batching: requests come and go while the others go on.

One thread owns the device. An iteration of its loop prefills at most one chunk of a waiting prompt,
so that no prompt holds the others up for longer, and then decodes one token of every running
request. The tokens of a request do not depend on the other requests (tests hold them equal to those
of `generate_tokens`).
"""

import collections
import logging
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import numpy as np
import tokenizers

from engram_jax.inference.decoder import Decoder
from engram_jax.inference.sampling import require_finite
from engram_jax.memory.compress import check_ids
from engram_jax.serve.request import (
  Decoding,
  EngineDown,
  Event,
  Failed,
  Finished,
  Prefill,
  PromptScored,
  QueueFull,
  Request,
  RequestHandle,
  Token,
)
from engram_jax.serve.slots import Scores, Slots

log = logging.getLogger(__name__)
T = TypeVar("T")


class Engine:
  """A queue of requests and the thread that runs them. A context manager: the thread runs inside.

  Args:
    slots: requests that run at once.
    queue: requests that may wait.
    stop_ids: tokens that end a text and are no part of it; ValueError for one that is no id.
  """

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
    vocabulary = len(decoder.model.compressor.table)
    self._stop_ids = frozenset(check_ids(list(stop_ids), vocabulary, "stop id").tolist())
    self._slots = Slots(decoder, slots)
    self._running: list[Decoding | None] = [None] * slots
    self._prefill: Prefill | None = None
    self._waiting: collections.deque[RequestHandle] = collections.deque()
    self._work = threading.Condition()
    self._closed: str | None = None
    self._failures: int = 0
    self._failed_requests: int = 0
    self._last_failure: str | None = None
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

  def __enter__(self) -> "Engine":
    self._thread.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def submit(
    self, requests: Sequence[Request], listener: Callable[[int, Event], None]
  ) -> tuple[RequestHandle, ...]:
    """Puts all requests into the queue, or none. listener: is called with the index of a request
    and its event.

    Raises ConfigError for a prompt that is unsound or too long, QueueFull, EngineDown.
    """
    for request in requests:
      self.decoder.check_prompts([request.ids], request.max_new)
    handles = tuple(
      RequestHandle(request, lambda event, i=i: listener(i, event))
      for i, request in enumerate(requests)
    )
    with self._work:
      if self._closed:
        raise EngineDown(self._closed)
      if len(self._waiting) + len(handles) > self.queue:
        raise QueueFull(
          f"{len(self._waiting)} requests wait and {self.queue} may: ask again in a while"
        )
      self._waiting.extend(handles)
      self._work.notify()
    return handles

  def cancel(self, handles: Collection[RequestHandle]) -> None:
    """Frees the slots and queue entries of requests by the next iteration; no event comes after."""
    with self._work:
      for handle in handles:
        handle.cancelled = True
      self._waiting = collections.deque(h for h in self._waiting if not h.cancelled)
      self._work.notify()

  def close(self, reason: str = "the server is stopping") -> None:
    """Ends the thread after its iteration; requests that are not finished fail with `reason`."""
    with self._work:
      self._closed = self._closed or reason
      self._work.notify()
    if self._thread.is_alive():
      self._thread.join()
    self._fail_all(self._closed)

  def status(self) -> dict[str, Any]:
    """The engine's load and health as JSON values, for people and load balancers."""
    with self._work:
      return {
        "status": self._closed or "ok",
        "slots": self._slots.count,
        "busy": sum(r is not None for r in self._running) + (self._prefill is not None),
        "waiting": len(self._waiting),
        "queue": self.queue,
        "capacity": self.decoder.capacity,
        "failures": self._failures,
        "failed_requests": self._failed_requests,
        "last_failure": self._last_failure,
      }

  def _run(self) -> None:
    while self._wait_for_work():
      try:
        self._iterate()
      except Exception as error:
        self._recover(error)

  def _wait_for_work(self) -> bool:
    """Returns True when there is something to do, False when the engine was closed."""
    with self._work:
      while not (self._closed or self._waiting or self._prefill or any(self._running)):
        self._work.wait()
      return not self._closed

  def _iterate(self) -> None:
    self._drop_cancelled()
    prefill = self._prefill or self._begin_prefill()
    if prefill:
      self._run_chunk(prefill)
    if any(self._running):
      self._decode_step()

  def _drop_cancelled(self) -> None:
    self._running = [r if r and not r.handle.cancelled else None for r in self._running]
    if self._prefill and self._prefill.handle.cancelled:
      self._prefill = None

  def _begin_prefill(self) -> Prefill | None:
    with self._work:
      if not self._waiting:
        return None
      if self._waiting[0].request.max_new and None not in self._running:
        return None
      # Set under the lock, so that a request is always somewhere: waiting, in prefill or running.
      self._prefill = Prefill(self._waiting.popleft())
      return self._prefill

  def _run_chunk(self, prefill: Prefill) -> None:
    if not prefill.run_chunk(self._slots):
      return
    handle, request = prefill.handle, prefill.handle.request
    if request.score_prompt:
      self._emit(handle, lambda: PromptScored(prefill.tokens(self.tokenizer)))
    if request.max_new:
      self._begin_decoding(prefill)
    else:
      self._emit(handle, lambda: Finished("", "length"))
    self._prefill = None

  def _begin_decoding(self, prefill: Prefill) -> None:
    handle, request = prefill.handle, prefill.handle.request
    decoding = self._attempt(handle, lambda: Decoding(handle, self.tokenizer))
    if decoding is None:
      return
    assert prefill.state is not None
    assert prefill.logits_BV is not None
    slot = self._running.index(None)
    self._slots.insert(slot, prefill.state, prefill.logits_BV, request.ids, request.sampling)
    self._running[slot] = decoding

  def _decode_step(self) -> None:
    running = {slot: r for slot, r in enumerate(self._running) if r}
    busy_B = np.array([r is not None for r in self._running])
    token_B, scores = self._slots.step(busy_B, any(r.handle.request.top for r in running.values()))
    for slot, decoding in running.items():
      self._emit(decoding.handle, lambda d=decoding, s=slot: self._add(d, s, token_B, scores))
      if decoding.finished is not None:
        self._emit(decoding.handle, lambda d=decoding: d.finished)
      if decoding.finished is not None or decoding.handle.cancelled:
        self._running[slot] = None

  def _add(self, decoding: Decoding, slot: int, token_B: np.ndarray, scores: Scores) -> Token:
    return decoding.add(int(require_finite(token_B[slot])), scores, slot, self._stop_ids)

  def _emit(self, handle: RequestHandle, make: Callable[[], Event | None]) -> None:
    """Makes an event and gives it to the listener."""

    def give() -> None:
      event = make()
      if event is not None:
        handle.listener(event)

    self._attempt(handle, give)

  def _attempt(self, handle: RequestHandle, make: Callable[[], T]) -> T | None:
    """The result of `make`; None for a cancelled request. If it fails, that request ends alone."""
    if handle.cancelled:
      return None
    try:
      return make()
    except Exception as error:
      log.exception("a request's answer could not be made or delivered")
      with self._work:
        self._failed_requests, self._last_failure = self._failed_requests + 1, _describe(error)
      self._fail(handle, f"the answer could not be made: {_describe(error)}", is_alone=True)
      handle.cancelled = True
      return None

  def _recover(self, error: Exception) -> None:
    """Fails the requests that were running; the ones that wait are served with a fresh state."""
    log.error("the engine failed", exc_info=error)
    self._failures, self._last_failure = self._failures + 1, _describe(error)
    try:
      self._fail_active(f"the engine failed while it worked on this request: {_describe(error)}")
      self._slots = Slots(self.decoder, self._slots.count)
    except Exception as second:
      log.exception("the engine cannot go on")
      self._closed = f"the engine failed and cannot go on: {_describe(second)}"
      self._fail_all(self._closed)

  def _fail_active(self, message: str) -> None:
    handles = [r.handle for r in (*self._running, self._prefill) if r]
    self._running, self._prefill = [None] * self._slots.count, None
    for handle in handles:
      self._fail(handle, message)

  def _fail_all(self, message: str) -> None:
    self._fail_active(message)
    with self._work:
      waiting, self._waiting = self._waiting, collections.deque()
    for handle in waiting:
      self._fail(handle, message)

  def _fail(self, handle: RequestHandle, message: str, *, is_alone: bool = False) -> None:
    try:
      if not handle.cancelled:
        handle.listener(Failed(message, is_alone))
    except Exception:
      log.exception("nobody could be told that a request failed")


def _describe(error: Exception) -> str:
  return f"{type(error).__name__}: {error}"
