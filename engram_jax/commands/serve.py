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
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

from engram_jax.cli import log
from engram_jax.config.bounded import read_bounded
from engram_jax.core.signals import StopRequest
from engram_jax.errors import ConfigError
from engram_jax.inference.decoder import Decoder
from engram_jax.inference.load import (
  MAX_CONTEXT,
  LoadedModel,
  PlacementArgs,
  check_device_memory,
  load_model,
)

API_KEY = "ENGRAM_API_KEY"
MAX_TEMPLATE_BYTES = 16 << 20  # of a chat template, or of a tokenizer_config.json
SPECIAL_TOKEN_FIELDS = [
  f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
]


@dataclasses.dataclass(frozen=True)
class ServeArgs:
  """Options of `serve`."""

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


def main(argv: Sequence[str]) -> int:
  """Serves a run until a signal comes."""
  args = tyro.cli(ServeArgs, prog="python -m engram_jax serve", args=argv, description=__doc__)
  key = args.api_key if args.api_key is not None else os.environ.get(API_KEY)
  check(args, key)
  model = load_model(args.run, args.step, log)
  check_device_memory(
    model, args.slots, args.capacity, f"--slots {args.slots} --capacity {args.capacity}"
  )
  template, names = read_template(args.run, args.chat_template)
  with contextlib.ExitStack() as stack:
    row_source = model.open_row_source(stack, args.rows, log)
    decoder = Decoder(
      model.weights, row_source, args.capacity, chunk=min(args.chunk, args.capacity)
    )
    return _serve(args, key, model, decoder, template, names)


def check(args: ServeArgs, key: str | None) -> None:
  """Raises ConfigError for values that are out of range or unsafe, before anything is read."""
  missing = [n for n in ("fastapi", "uvicorn", "jinja2") if importlib.util.find_spec(n) is None]
  if missing:
    raise ConfigError(f"serve needs {', '.join(missing)}: pip install 'engram_jax[serve]'")
  for name, low, high in (
    ("port", 0, 65535),
    ("slots", 1, 4096),
    ("queue", 1, 1 << 20),
    ("capacity", 2, MAX_CONTEXT),
    ("chunk", 1, 1 << 16),
  ):
    if not low <= getattr(args, name) <= high:
      raise ConfigError(f"--{name} {getattr(args, name)} must be from {low} to {high}")
  if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
    raise ConfigError("--api_key must be printable ASCII, not empty, without spaces around it")
  if key is None and not is_loopback(args.host):
    raise ConfigError(
      f"--host {args.host} lets other machines in: give --api_key KEY (or {API_KEY}=KEY), or keep "
      "127.0.0.1"
    )
  args.rows.check()


def is_loopback(host: str) -> bool:
  """Returns True if only this machine can reach the address."""
  try:
    return ipaddress.ip_address(host.strip("[]")).is_loopback
  except ValueError:
    return host == "localhost"


def read_template(
  run: pathlib.Path, path: pathlib.Path | None = None
) -> tuple[str | None, Mapping[str, str]]:
  """The chat template of a run, None if it has none, and the special tokens it may name.

  They are stored as in published models: in tokenizer_config.json, the template also in
  chat_template.jinja; path: a template elsewhere. Raises ConfigError for files of another kind.
  """
  config_path = run / "tokenizer_config.json"
  config: Any = {}
  if config_path.exists():
    try:
      config = json.loads(read_bounded(config_path, MAX_TEMPLATE_BYTES).decode())
    except (ValueError, OSError, RecursionError) as error:
      raise ConfigError(f"{config_path}: {error}") from None
  if not isinstance(config, dict):
    raise ConfigError(f"{config_path}: must be an object, not {type(config).__name__}")
  tokens = {k: _token_text(v) for k, v in config.items() if k in SPECIAL_TOKEN_FIELDS}
  names = {k: v for k, v in tokens.items() if isinstance(v, str)}
  file = path or run / "chat_template.jinja"
  if path or file.exists():
    try:
      return read_bounded(file, MAX_TEMPLATE_BYTES).decode(), names
    except (ValueError, OSError) as error:
      raise ConfigError(f"chat template {file}: {error}") from None
  template = _default_template(config.get("chat_template"))
  if not isinstance(template, str | None):
    raise ConfigError(
      f"{config_path}: chat_template must be a string, not {type(template).__name__}"
    )
  return template, names


def _default_template(template: Any) -> Any:
  """The template called "default", of several that have names."""
  if not (isinstance(template, list) and all(isinstance(t, dict) for t in template)):
    return template
  return next((t.get("template") for t in template if t.get("name") == "default"), None)


def _token_text(token: Any) -> Any:
  return token.get("content") if isinstance(token, dict) else token


def _serve(
  args: ServeArgs,
  key: str | None,
  model: LoadedModel,
  decoder: Decoder,
  template: str | None,
  names: Mapping[str, str],
) -> int:
  # Here, not above: the other commands do without the extra.
  from engram_jax.serve.api import LOOPBACK, Service, make_app
  from engram_jax.serve.engine import Engine
  from engram_jax.serve.prompts import PromptEncoder
  from engram_jax.serve.server import Server, warm_up

  encoder = PromptEncoder(model.tokenizer, template, names)
  end = model.tokenizer.token_to_id(names.get("eos_token", ""))
  stop_ids = {model.end_id} | ({end} if end is not None else set())
  engine = Engine(decoder, model.tokenizer, slots=args.slots, queue=args.queue, stop_ids=stop_ids)
  with StopRequest() as stop, engine:
    log(f"compiling for {args.slots} requests of {args.capacity} tokens ...")
    warm_up(engine)
    hosts = LOOPBACK | {args.host.lower()} if key is None else None
    name = args.run.resolve().name
    app = make_app(Service(engine, encoder, name, key, hosts))
    on_start = lambda address: log(f"serving {name}, step {model.step}: {address}")
    server = Server(app, args.host.strip("[]"), args.port, on_start)
    if not stop.requested:
      _run(server, args)
  log("stopped")
  return 0


def _run(server: Any, args: ServeArgs) -> None:
  """Runs the server until a signal."""
  try:
    server.run()
  except SystemExit:  # uvicorn has logged why
    raise ConfigError(f"cannot listen on --host {args.host} --port {args.port}") from None
