"""`python -m engram_jax serve --run DIR`: a trained run behind the OpenAI API, and a page for it.

    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"prompt": "The capital of France is", "max_tokens": 32}'

Needs the extra: pip install 'engram_jax[serve]'. SIGTERM and Ctrl-C let running requests end.
"""

import contextlib
import dataclasses
import importlib.util
import ipaddress
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

from engram_jax.core.signals import StopRequest
from engram_jax.errors import ConfigError
from engram_jax.inference.decoder import Decoder
from engram_jax.inference.load import (
  LONGEST_CONTEXT,
  LoadedModel,
  PlacementArgs,
  check_room,
  load_model,
)

API_KEY = "ENGRAM_API_KEY"


@dataclasses.dataclass(frozen=True)
class Args:
  run: pathlib.Path
  """Folder of a run that train.py wrote; its name is the model's."""
  host: str = "127.0.0.1"
  """Address to listen on. Any but a loopback one needs an API key."""
  port: int = 8000
  """0 takes a free one."""
  api_key: str | None = None
  """What clients must send as `Authorization: Bearer KEY`; better in the environment, as
  ENGRAM_API_KEY, where other users of the machine do not see it."""
  slots: int = 8
  """Requests that run at once."""
  queue: int = 256
  """Requests that may wait; further ones get 429."""
  capacity: int = 1024
  """Tokens a request can hold, prompt and continuation."""
  chunk: int = 128
  """Tokens of a prompt that are read between two tokens of the running requests."""
  rows: tyro.conf.OmitArgPrefixes[PlacementArgs] = dataclasses.field(
    default_factory=lambda: PlacementArgs(deadline=30.0)
  )
  chat_template: pathlib.Path | None = None
  """A Jinja file; if left out, chat_template.jinja or the chat_template of tokenizer_config.json in
  the run's folder, and without these lines of `role: text`."""
  step: int | None = None
  """Checkpoint to use; the newest one that is sound if left out."""


def main(args: Sequence[str]) -> int:
  """Serves a run until a signal comes."""
  own = tyro.cli(Args, prog="python -m engram_jax serve", args=args, description=__doc__)
  key = own.api_key if own.api_key is not None else os.environ.get(API_KEY)
  check(own, key)
  log = lambda text: print(text, file=sys.stderr, flush=True)
  opened = load_model(own.run, own.step, log)
  check_room(opened, own.slots, own.capacity, f"--slots {own.slots} --capacity {own.capacity}")
  template, names = read_template(own.run, own.chat_template)
  with contextlib.ExitStack() as stack:
    source = opened.source(stack, own.rows)
    decoder = Decoder(opened.weights, source, own.capacity, chunk=min(own.chunk, own.capacity))
    return _serve(own, key, opened, decoder, template, names, log)


def check(own: Args, key: str | None) -> None:
  """ConfigError before anything is read."""
  missing = [n for n in ("fastapi", "uvicorn", "jinja2") if importlib.util.find_spec(n) is None]
  if missing:
    raise ConfigError(f"serve needs {', '.join(missing)}: pip install 'engram_jax[serve]'")
  for name, low, high in (
    ("port", 0, 65535),
    ("slots", 1, 4096),
    ("queue", 1, 1 << 20),
    ("capacity", 2, LONGEST_CONTEXT),
    ("chunk", 1, 1 << 16),
  ):
    if not low <= getattr(own, name) <= high:
      raise ConfigError(f"--{name} {getattr(own, name)} must be from {low} to {high}")
  if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
    raise ConfigError("--api_key must be printable ASCII, not empty, without spaces around it")
  if key is None and not is_loopback(own.host):
    raise ConfigError(
      f"--host {own.host} lets other machines in: give --api_key KEY (or {API_KEY}=KEY), or keep "
      "127.0.0.1"
    )
  own.rows.check()


def is_loopback(host: str) -> bool:
  """Whether only this machine can reach the address."""
  try:
    return ipaddress.ip_address(host.strip("[]")).is_loopback
  except ValueError:
    return host == "localhost"


def read_template(
  run: pathlib.Path, given: pathlib.Path | None = None
) -> tuple[str | None, Mapping[str, str]]:
  """The chat template of a run, None if it has none, and the special tokens it may name.

  They come as published models have them: in tokenizer_config.json, the template also in
  chat_template.jinja. ConfigError for files that are not that.
  """
  path = run / "tokenizer_config.json"
  config: Any = {}
  if path.exists():
    try:
      config = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
      raise ConfigError(f"{path}: {error}") from None
  if not isinstance(config, dict):
    raise ConfigError(f"{path}: must be an object, not {type(config).__name__}")
  tokens = {k: _content(v) for k, v in config.items() if k in ("bos_token", "eos_token")}
  names = {k: v for k, v in tokens.items() if isinstance(v, str)}
  file = given or run / "chat_template.jinja"
  if given or file.exists():
    try:
      return file.read_text("utf-8"), names
    except (ValueError, OSError) as error:
      raise ConfigError(f"chat template {file}: {error}") from None
  template = _default(config.get("chat_template"))
  if not isinstance(template, str | None):
    raise ConfigError(f"{path}: chat_template must be a string, not {type(template).__name__}")
  return template, names


def _default(template: Any) -> Any:
  """Of several, which have names, the one called so."""
  if not (isinstance(template, list) and all(isinstance(t, dict) for t in template)):
    return template
  return next((t.get("template") for t in template if t.get("name") == "default"), None)


def _content(token: Any) -> Any:
  return token.get("content") if isinstance(token, dict) else token


def _serve(
  own: Args,
  key: str | None,
  opened: LoadedModel,
  decoder: Decoder,
  template: str | None,
  names: Mapping[str, str],
  log: Any,
) -> int:
  # Here, not above: the other commands do without the extra.
  from engram_jax.serve.api import LOOPBACK, Service, make_app
  from engram_jax.serve.engine import Engine
  from engram_jax.serve.prompts import Words
  from engram_jax.serve.server import Server, warm

  words = Words(opened.tokenizer, template, names)
  end = opened.tokenizer.token_to_id(names.get("eos_token", ""))
  stop_ids = {opened.end_id} | ({end} if end is not None else set())
  engine = Engine(decoder, opened.tokenizer, slots=own.slots, queue=own.queue, stop_ids=stop_ids)
  with StopRequest() as stop, engine:
    log(f"compiling for {own.slots} requests of {own.capacity} tokens ...")
    warm(engine)
    hosts = LOOPBACK | {own.host.lower()} if key is None else None
    name = own.run.resolve().name
    app = make_app(Service(engine, words, name, key, hosts))
    opened_at = lambda address: log(f"serving {name}, step {opened.step}: {address}")
    server = Server(app, own.host.strip("[]"), own.port, opened_at)
    if not stop.requested:
      _run(server, own)
  log("stopped")
  return 0


def _run(server: Any, own: Args) -> None:
  """Until a signal."""
  try:
    server.run()
  except SystemExit:  # uvicorn has logged why
    raise ConfigError(f"cannot listen on --host {own.host} --port {own.port}") from None
