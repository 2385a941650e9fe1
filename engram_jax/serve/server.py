"""The HTTP server: uvicorn, the event stream of an HTTP request, and the warm-up of an engine."""

import asyncio
import itertools
import queue
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import uvicorn

from engram_jax.errors import EngramError
from engram_jax.inference.sampling import Sampling
from engram_jax.serve.engine import Engine
from engram_jax.serve.request import EngineDown, Event, Failed, Finished, Request, RequestFailed
from engram_jax.serve.slots import MAX_TOP

MAX_CONNECTIONS = 1024  # at once
# Longer than clients keep idle connections, so that none is closed while a request is on its way.
KEEP_ALIVE_SECONDS = 75
SHUTDOWN_SECONDS = 20  # for running requests to end after a signal


class Server(uvicorn.Server):
  """uvicorn with this project's limits. on_start: called with the address, http://host:port/, when
  the server listens."""

  def __init__(self, app: Any, host: str, port: int, on_start: Callable[[str], None]):
    config = uvicorn.Config(
      app,
      host=host,
      port=port,
      log_level="warning",
      lifespan="off",
      ws="none",
      limit_concurrency=MAX_CONNECTIONS,
      timeout_keep_alive=KEEP_ALIVE_SECONDS,
      timeout_graceful_shutdown=SHUTDOWN_SECONDS,
      server_header=False,
    )
    super().__init__(config)
    self._on_start = on_start

  async def startup(self, sockets: Any = None) -> None:
    """Starts uvicorn, after which the port is known."""
    await super().startup(sockets)
    if self.started:
      host, port = self.servers[0].sockets[0].getsockname()[:2]
      self._on_start(f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/")


class ClientDisconnected(Exception):
  """The client has closed the connection."""


class EventStream:
  """The events of an HTTP request's engine requests, each with its index, until all are finished.

  `close` must be called; it cancels those that are not finished. The constructor raises like
  `Engine.submit`; iterating raises EngineDown, RequestFailed, and ClientDisconnected.
  """

  def __init__(self, engine: Engine, requests: Sequence[Request], receive: Any):
    loop = asyncio.get_running_loop()
    self._events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()

    def put(i: int, event: Event) -> None:
      loop.call_soon_threadsafe(self._events.put_nowait, (i, event))

    self._engine, self._unfinished = engine, len(requests)
    self._handles = engine.submit(requests, put)
    self._watch = asyncio.ensure_future(self._wait_for_disconnect(receive))

  async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
    while self._unfinished:
      message = await self._events.get()
      if message is None:
        raise ClientDisconnected
      i, event = message
      if isinstance(event, Failed):
        raise (RequestFailed if event.is_alone else EngineDown)(event.message)
      self._unfinished -= isinstance(event, Finished)
      yield i, event

  def close(self) -> None:
    """Frees the slots by the engine's next iteration."""
    self._watch.cancel()
    if self._unfinished:
      self._engine.cancel(self._handles)

  async def _wait_for_disconnect(self, receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
      pass
    self._events.put_nowait(None)


def warm_up(engine: Engine) -> None:
  """Runs a request of each kind through a running engine, which compiles every shape.

  Raises EngramError if one fails: a server that cannot answer should not start.
  """
  capacity, chunk = engine.decoder.capacity, engine.decoder.chunk
  events: queue.SimpleQueue = queue.SimpleQueue()
  lengths, kinds = {1, min(chunk, capacity - 1)}, ((0, False), (0, True), (MAX_TOP, True))
  for length, (top, score_prompt) in itertools.product(lengths, kinds):
    request = Request((0,) * length, 1, Sampling(), top=top, score_prompt=score_prompt)
    engine.submit([request], lambda _, event: events.put(event))
    while not isinstance(event := events.get(), Finished):
      if isinstance(event, Failed):
        raise EngramError(f"the model cannot be run: {event.message}")
