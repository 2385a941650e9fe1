"""From the engine's thread to a request's coroutine, and back when the client has gone."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from engram_jax.inference.server.engine import Engine
from engram_jax.inference.server.job import Done, EngineDown, Event, Failed, Job


class Gone(Exception):
  """The client has closed the connection."""


class Listening:
  """The events of a request's jobs, each with its index, until all are done.

  `close` cancels what is not; it must be called. Raises from the constructor what
  `Engine.submit` raises; while iterated, EngineDown, and Gone once the client is.
  """

  def __init__(self, engine: Engine, jobs: Sequence[Job], receive: Any):
    loop = asyncio.get_running_loop()
    self._events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
    put = self._events.put_nowait
    say = lambda i, event: loop.call_soon_threadsafe(put, (i, event))
    self._engine, self._open = engine, len(jobs)
    self._tickets = engine.submit(jobs, say)
    self._watch = asyncio.ensure_future(self._until_gone(receive))

  async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
    while self._open:
      message = await self._events.get()
      if message is None:
        raise Gone
      i, event = message
      if isinstance(event, Failed):
        raise EngineDown(event.message)
      self._open -= isinstance(event, Done)
      yield i, event

  def close(self) -> None:
    """The slots are free by the engine's next turn."""
    self._watch.cancel()
    if self._open:
      self._engine.cancel(self._tickets)

  async def _until_gone(self, receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
      pass
    self._events.put_nowait(None)
