"""The small model of small_model.py behind an engine, with a tokenizer of its 60 ids."""

import asyncio
import contextlib
import functools
import json
import queue
import threading
import time
from collections.abc import Generator
from typing import Any

import httpx
import tokenizers
from small_model import V, make_small_model

from engram_jax.inference.decoder import Decoder
from engram_jax.inference.row_sources import DeviceRowSource
from engram_jax.inference.sampling import Sampling
from engram_jax.serve.api import Service, make_app
from engram_jax.serve.engine import Engine
from engram_jax.serve.request import Event, Failed, Finished, PromptScored, Request, Token
from engram_jax.serve.server import Server

END = "<|endoftext|>"
# Byte-level: Ġ is a space, Ċ a newline, Ã and © the two bytes of é.
LETTERS = [END, *"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ċ", "Ã", "©", *"0123456789", *":.,?!-'()<>|_"]
LETTERS += [*"ABCDEF"]
CAPACITY, CHUNK, SLOTS, QUEUE = 32, 8, 3, 16


def small_tokenizer() -> tokenizers.Tokenizer:
  assert len(LETTERS) == V
  model = tokenizers.models.BPE({letter: i for i, letter in enumerate(LETTERS)}, [])
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.add_special_tokens([END])
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  return tokenizer


@functools.cache  # each compiles its own stages
def small_decoder() -> Decoder:
  model = make_small_model()
  w = model.weights
  assert w.layout is not None
  row_source = DeviceRowSource(w.layout, w.compressor.table, model.tables)
  return Decoder(w, row_source, CAPACITY, chunk=CHUNK)


def small_engine(decoder: Decoder | None = None, **options: Any) -> Engine:
  options = {"slots": SLOTS, "queue": QUEUE} | options
  return Engine(decoder or small_decoder(), small_tokenizer(), **options)


def make_request(
  ids: list[int], max_new: int = 8, sampling: Sampling | None = None, **options: Any
) -> Request:
  return Request(tuple(ids), max_new, sampling or Sampling(), **options)


class EventLog:
  """The events of one or several requests, by index."""

  def __init__(self, engine: Engine, requests: list[Request]):
    self._queue: queue.SimpleQueue = queue.SimpleQueue()
    self.events: list[list[Event]] = [[] for _ in requests]
    self.handles = engine.submit(requests, lambda i, event: self._queue.put((i, event)))

  def wait(self) -> "EventLog":
    """Waits until all have ended."""
    while not all(e and isinstance(e[-1], Finished | Failed) for e in self.events):
      self.next()
    return self

  def next(self) -> Event:
    i, event = self._queue.get(timeout=300)
    self.events[i].append(event)
    return event

  def tokens(self, i: int = 0) -> list[Token]:
    return [e for e in self.events[i] if isinstance(e, Token)]

  def ids(self, i: int = 0) -> list[int]:
    return [t.id for t in self.tokens(i)]

  def text(self, i: int = 0) -> str:
    return "".join(e.text for e in self.events[i] if isinstance(e, Token | Finished))

  def prompt(self, i: int = 0) -> tuple[Token, ...]:
    return next(e.tokens for e in self.events[i] if isinstance(e, PromptScored))


class Client:
  """An HTTP client that calls the application without a network."""

  def __init__(self, service: Service):
    self.app = make_app(service)

  def request(self, method, path, **options):
    async def run():
      transport = httpx.ASGITransport(self.app)  # raises what the application raises
      async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        return await client.request(method, path, **options)

    return asyncio.run(run())

  def get(self, path, **options):
    return self.request("GET", path, **options)

  def post(self, path, body, **options):
    return self.request("POST", path, json=body, **options)

  def complete(self, prompt="the capital", **body):
    response = self.post("/v1/completions", {"prompt": prompt, "temperature": 0} | body)
    assert response.status_code == 200, response.text
    return stream_chunks(response) if body.get("stream") else response.json()

  def chat(self, *turns, **body):
    messages = [{"role": role, "content": text} for role, text in turns]
    response = self.post("/v1/chat/completions", {"messages": messages, "temperature": 0} | body)
    assert response.status_code == 200, response.text
    return stream_chunks(response) if body.get("stream") else response.json()


def stream_chunks(response):
  """The objects of a stream, which must end as specified."""
  assert response.headers["content-type"].startswith("text/event-stream")
  *parts, done, rest = response.text.split("\n\n")
  assert (done, rest) == ("data: [DONE]", "")
  return [json.loads(part.removeprefix("data: ")) for part in parts]


@contextlib.contextmanager
def serving(service: Service) -> Generator[str]:
  """A real server on a free port of this machine, and its address."""
  addresses: queue.SimpleQueue[str] = queue.SimpleQueue()
  server = Server(make_app(service), "127.0.0.1", 0, addresses.put)
  thread = threading.Thread(target=server.run)
  thread.start()
  try:
    yield addresses.get(timeout=60).rstrip("/")
  finally:
    server.should_exit = True
    thread.join()


def settle(engine: Engine) -> None:
  """Waits, for at most a minute, until nothing runs or waits."""
  for _ in range(6000):
    status = engine.status()
    if not status["busy"] and not status["waiting"]:
      return
    time.sleep(0.01)
  raise AssertionError(f"still at work: {status}")
