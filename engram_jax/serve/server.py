"""uvicorn, as it is run here."""

import asyncio
import itertools
import queue
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import uvicorn

from engram_jax.errors import EngramError
from engram_jax.inference.sampling import Sampling
from engram_jax.serve.engine import Engine
from engram_jax.serve.request import Done, EngineDown, Event, Failed, Job
from engram_jax.serve.slots import TOP

CONNECTIONS = 1024  # at once
# Longer than clients keep idle connections, so that none is closed while a request is on its way.
KEEP_ALIVE = 75
GRACE = 20  # seconds for running requests to end after a signal


class Server(uvicorn.Server):
  """`opened` is told the address, http://host:port/, once it can be called."""

  def __init__(self, app: Any, host: str, port: int, opened: Callable[[str], None]):
    config = uvicorn.Config(
      app,
      host=host,
      port=port,
      log_level="warning",
      lifespan="off",
      ws="none",
      limit_concurrency=CONNECTIONS,
      timeout_keep_alive=KEEP_ALIVE,
      timeout_graceful_shutdown=GRACE,
      server_header=False,
    )
    super().__init__(config)
    self._opened = opened

  async def startup(self, sockets: Any = None) -> None:
    """uvicorn's own, after which the port is known."""
    await super().startup(sockets)
    if self.started:
      host, port = self.servers[0].sockets[0].getsockname()[:2]
      self._opened(f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/")


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


def warm(engine: Engine) -> None:
  """Runs a request of each kind through a running engine: every shape is then compiled.

  Raises EngramError if one fails: a server that cannot answer should not start.
  """
  capacity, chunk = engine.decoder.capacity, engine.decoder.chunk
  events: queue.SimpleQueue = queue.SimpleQueue()
  lengths, scored = {1, min(chunk, capacity - 1)}, ((0, False), (0, True), (TOP, True))
  for length, (top, score) in itertools.product(lengths, scored):
    job = Job((0,) * length, 1, Sampling(), top=top, score_prompt=score)
    engine.submit([job], lambda _, event: events.put(event))
    while not isinstance(event := events.get(), Done):
      if isinstance(event, Failed):
        raise EngramError(f"the model cannot be run: {event.message}")
