"""The OpenAI API over HTTP, and a page to try the model on.

    GET /  GET /health  GET /v1/models  POST /v1/completions  POST /v1/chat/completions

Besides OpenAI's own fields a request takes `top_k`, `repetition_penalty` and `gates`; with
`"gates": true` each choice, or piece of a streamed one, also has

    "engram": {"tokens": [{"id": 17, "text": " the", "gates": [0.41]}]}

one number for each memory (the model's `engram.layers` says which blocks they are in): the mean of
its gate over the branches at that token. With `echo` the prompt's tokens have them too.
"""

import dataclasses
import functools
import importlib.resources
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from engram_jax.errors import ConfigError, EngramError
from engram_jax.serve.auth import Guard, error_response, has_key
from engram_jax.serve.engine import Engine
from engram_jax.serve.prompts import Words
from engram_jax.serve.request import EngineDown, Event, Job, Prompt, QueueFull
from engram_jax.serve.responses import Answer
from engram_jax.serve.schema import MAX_SCORES, Asked, ChatBody, CompletionBody
from engram_jax.serve.server import Gone, Listening

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


class UnknownModel(EngramError):
  """A request names another model than the one that is served."""


@dataclasses.dataclass(frozen=True)
class Service:
  """name: the model's. api_key: needed if given. hosts: see `Guard`."""

  engine: Engine
  words: Words
  name: str
  api_key: str | None = None
  hosts: frozenset[str] | None = LOOPBACK
  max_body: int = 4 << 20
  timeout: float = 30.0
  created: int = dataclasses.field(default_factory=lambda: int(time.time()))


def make_app(service: Service) -> FastAPI:
  """The engine must be running."""
  app = FastAPI(title="engram_jax", docs_url=None, redoc_url=None)  # those load scripts from afar
  app.add_middleware(
    Guard,
    api_key=service.api_key,
    hosts=service.hosts,
    max_body=service.max_body,
    timeout=service.timeout,
  )
  for kind, handler in _HANDLERS.items():
    app.add_exception_handler(kind, handler)
  prepare = functools.partial(run_in_threadpool, _prepare, service)

  @app.get("/", response_class=HTMLResponse)
  async def page() -> HTMLResponse:
    return HTMLResponse(_page(), headers={"Content-Security-Policy": _POLICY})

  @app.get("/health")
  async def health(request: Request) -> JSONResponse:
    status = service.engine.status()
    ok = status["status"] == "ok"
    if not has_key(request.headers.get("authorization", "").encode("latin-1"), service.api_key):
      del status["last_failure"]  # may name paths
      status["status"] = "ok" if ok else "down"
    return JSONResponse(status, 200 if ok else 503)

  @app.get("/v1/models")
  async def models() -> dict[str, Any]:
    return {"object": "list", "data": [_model(service)]}

  @app.get("/v1/models/{name:path}")
  async def model(name: str) -> dict[str, Any]:
    _check_model(service, name)
    return _model(service)

  @app.post("/v1/completions")
  async def completions(body: CompletionBody, request: Request) -> Response:
    return await _answered(service, await prepare(service.words.completion_jobs, body), request)

  @app.post("/v1/chat/completions")
  async def chat(body: ChatBody, request: Request) -> Response:
    return await _answered(service, await prepare(service.words.chat_jobs, body), request)

  return app


def _prepare(service: Service, make: Callable[..., list[Job]], body: Asked) -> Answer:
  """In a thread: tokenising a long text must not keep others waiting."""
  if body.model is not None:
    _check_model(service, body.model)
  jobs = make(body, service.engine.decoder.capacity)
  if len(jobs) > service.engine.queue:
    raise ConfigError(
      f"prompt: {len(jobs)} continuations in one request, but only {service.engine.queue} may wait"
    )
  for job in jobs[:: body.n]:
    service.engine.decoder.check([job.ids], job.max_new)
  answer = Answer(body, jobs, service.words, service.name)
  if answer.scores > MAX_SCORES:
    raise ConfigError(
      f"logprobs: up to {answer.scores:,} in one answer, but at most {MAX_SCORES:,}: send fewer "
      "prompts at a time, or ask for fewer"
    )
  return answer


async def _answered(service: Service, answer: Answer, request: Request) -> Response:
  listening = Listening(service.engine, answer.jobs, request.receive)
  response = None
  try:
    events = aiter(listening)
    if answer.body.stream:
      # Headers are sent with the first event: until then a failure can still be a status.
      first = await anext(events)
      response = _Stream(_lines(answer, first, events), listening.close)
      return response
    async for i, event in events:
      answer.add(i, event)
    return await run_in_threadpool(lambda: JSONResponse(answer.whole()))  # may be long
  except Gone:
    return Response(status_code=499)  # nobody reads it
  finally:
    if response is None:  # else the stream does it
      listening.close()


async def _lines(answer: Answer, first: Any, events: AsyncIterator) -> AsyncIterator[str]:
  """Server-sent events."""
  try:
    for chunk in answer.first():
      yield _line(chunk)
    if text := await _line_of(answer, *first):
      yield text
    async for i, event in events:
      if text := await _line_of(answer, i, event):
        yield text
    for chunk in answer.last():
      yield _line(chunk)
  except Gone:
    return
  except EngineDown as error:
    yield _line(json.loads(error_response(503, str(error), code="engine_down").body))
  yield "data: [DONE]\n\n"


async def _line_of(answer: Answer, i: int, event: Event) -> str | None:
  """That of an event; a prompt's own is made in a thread, as it may be long."""
  make = lambda: (chunk := answer.add(i, event)) and _line(chunk)
  return await run_in_threadpool(make) if isinstance(event, Prompt) else make()


def _line(value: dict[str, Any]) -> str:
  return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"


class _Stream(StreamingResponse):
  """Closes what it listens to however it ends."""

  def __init__(self, lines: AsyncIterator[str], close: Callable[[], None]):
    super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    self._close = close

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      self._close()


def _model(service: Service) -> dict[str, Any]:
  cfg = service.engine.decoder.model.cfg
  return {
    "id": service.name,
    "object": "model",
    "created": service.created,
    "owned_by": "engram_jax",
    "engram": {"layers": list(cfg.engram.layers), "capacity": service.engine.decoder.capacity},
  }


def _check_model(service: Service, name: str) -> None:
  if name != service.name:
    raise UnknownModel(f"there is no model {name[:200]!r} here, only {service.name!r}")


def _page() -> str:
  return importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")


_POLICY = (
  "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)


async def _invalid(_: Request, error: RequestValidationError) -> Response:
  first = error.errors()[0]
  where = ".".join(map(str, first["loc"][1:]))[:200] or "body"
  message = str(first["msg"]).removeprefix("Value error, ")[:500]
  if first["type"] == "extra_forbidden":
    message = "is not a field of this request"
  return error_response(400, f"{where}: {message}")


async def _http(_: Request, error: HTTPException) -> Response:
  return error_response(error.status_code, str(error.detail), headers=error.headers)


async def _unknown_model(_: Request, error: UnknownModel) -> Response:
  return error_response(404, str(error), code="model_not_found")


async def _bad(_: Request, error: ConfigError) -> Response:
  return error_response(400, str(error))


async def _full(_: Request, error: QueueFull) -> Response:
  return error_response(429, str(error), code="queue_full", headers={"Retry-After": "1"})


async def _down(_: Request, error: EngineDown) -> Response:
  return error_response(503, str(error), code="engine_down")


_HANDLERS = {
  RequestValidationError: _invalid,
  HTTPException: _http,
  UnknownModel: _unknown_model,
  ConfigError: _bad,
  QueueFull: _full,
  EngineDown: _down,
}
