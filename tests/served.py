"""The small model of speaker.py behind an engine, with a tokenizer of its 60 ids."""

import asyncio
import contextlib
import functools
import json
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import tokenizers
from speaker import V, make_speaker

from engram_jax.inference.decoder import Decoder
from engram_jax.inference.row_sources import DeviceRows
from engram_jax.inference.sampling import Sampling
from engram_jax.serve.api import Service, make_app
from engram_jax.serve.engine import Engine
from engram_jax.serve.request import Done, Event, Failed, Job, Prompt, Token
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
  speaker = make_speaker()
  w = speaker.weights
  source = DeviceRows(w.layout, w.compressor.table, speaker.tables)
  return Decoder(w, source, CAPACITY, chunk=CHUNK)


def small_engine(decoder: Decoder | None = None, **options: Any) -> Engine:
  options = {"slots": SLOTS, "queue": QUEUE} | options
  return Engine(decoder or small_decoder(), small_tokenizer(), **options)


def job(ids: list[int], max_new: int = 8, sampling: Sampling | None = None, **options: Any) -> Job:
  return Job(tuple(ids), max_new, sampling or Sampling(), **options)


class Heard:
  """What one or several jobs were told, by index."""

  def __init__(self, engine: Engine, jobs: list[Job]):
    self._queue: queue.SimpleQueue = queue.SimpleQueue()
    self.events: list[list[Event]] = [[] for _ in jobs]
    self.tickets = engine.submit(jobs, lambda i, event: self._queue.put((i, event)))

  def wait(self) -> "Heard":
    """Until all have ended."""
    while not all(e and isinstance(e[-1], Done | Failed) for e in self.events):
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
    return "".join(e.text for e in self.events[i] if isinstance(e, Token | Done))

  def prompt(self, i: int = 0) -> tuple[Token, ...]:
    return next(e.tokens for e in self.events[i] if isinstance(e, Prompt))


class Client:
  """Calls the application without a network in between."""

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
    answer = self.post("/v1/completions", {"prompt": prompt, "temperature": 0} | body)
    assert answer.status_code == 200, answer.text
    return events(answer) if body.get("stream") else answer.json()

  def chat(self, *said, **body):
    messages = [{"role": role, "content": text} for role, text in said]
    answer = self.post("/v1/chat/completions", {"messages": messages, "temperature": 0} | body)
    assert answer.status_code == 200, answer.text
    return events(answer) if body.get("stream") else answer.json()


def events(answer):
  """The objects of a stream, which ends as it should."""
  assert answer.headers["content-type"].startswith("text/event-stream")
  *parts, done, rest = answer.text.split("\n\n")
  assert (done, rest) == ("data: [DONE]", "")
  return [json.loads(part.removeprefix("data: ")) for part in parts]


@contextlib.contextmanager
def serving(service: Service) -> Iterator[str]:
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
