"""The OpenAI API over HTTP, and a page to try the model on.

    GET /  GET /health  GET /v1/models  POST /v1/completions  POST /v1/chat/completions

Besides OpenAI's own fields a request takes `top_k`, `repetition_penalty` and `gates`; with
`"gates": true` each choice, or piece of a streamed one, also has

    "engram": {"tokens": [{"id": 17, "token": " the", "text": " the", "gates": [0.41]}]}

one number for each memory (the model's `engram.layers` says which blocks they are in): the mean of
its gate over the branches at that token. `token` is its name, as in `logprobs`; `text` the part of
the text that became certain with it, as a character may need several. With `echo` the prompt's
tokens have them too.
"""

import dataclasses
import importlib.resources
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import fastapi
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from engram_jax.errors import ConfigError, EngramError
from engram_jax.serve.auth import Guard, error_body, error_response, has_key
from engram_jax.serve.engine import Engine
from engram_jax.serve.prompts import PromptEncoder
from engram_jax.serve.request import (
  EngineDown,
  Event,
  PromptScored,
  QueueFull,
  Request,
  RequestFailed,
)
from engram_jax.serve.responses import ResponseBuilder
from engram_jax.serve.schema import MAX_SCORES, ChatBody, CompletionBody
from engram_jax.serve.server import ClientDisconnected, EventStream

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


class UnknownModel(EngramError):
  """A request names another model than the one that is served."""


@dataclasses.dataclass(frozen=True)
class Service:
  """The served model and the limits of the server.

  name: of the model. api_key: needed if it is not None. hosts: see `Guard`. timeout: in seconds.
  """

  engine: Engine
  encoder: PromptEncoder
  name: str
  api_key: str | None = None
  hosts: frozenset[str] | None = LOOPBACK
  max_body: int = 4 << 20
  timeout: float = 30.0
  created: int = dataclasses.field(default_factory=lambda: int(time.time()))


def make_app(service: Service) -> FastAPI:
  """The application; its engine must be running."""
  # Its documentation pages would load scripts from other sites.
  app = FastAPI(
    title="engram_jax", docs_url=None, redoc_url=None, exception_handlers=_EXCEPTION_HANDLERS
  )
  app.add_middleware(
    Guard,
    api_key=service.api_key,
    hosts=service.hosts,
    max_body=service.max_body,
    timeout=service.timeout,
  )
  prepare = lambda make_requests, body: run_in_threadpool(_prepare, service, make_requests, body)

  @app.get("/", response_class=HTMLResponse)
  async def page() -> HTMLResponse:
    return HTMLResponse(_page(), headers={"Content-Security-Policy": _POLICY})

  @app.get("/health")
  async def health(request: fastapi.Request) -> JSONResponse:
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
  async def completions(body: CompletionBody, request: fastapi.Request) -> Response:
    builder = await prepare(service.encoder.completion_requests, body)
    return await _respond(service, builder, request)

  @app.post("/v1/chat/completions")
  async def chat(body: ChatBody, request: fastapi.Request) -> Response:
    builder = await prepare(service.encoder.chat_requests, body)
    return await _respond(service, builder, request)

  return app


def _prepare(
  service: Service,
  make_requests: Callable[[Any, int], list[Request]],
  body: CompletionBody | ChatBody,
) -> ResponseBuilder:
  """Tokenises and checks a body. Runs in a thread: a long text must not keep others waiting."""
  if body.model is not None:
    _check_model(service, body.model)
  engine = service.engine
  requests = make_requests(body, engine.decoder.capacity)
  if len(requests) > engine.queue:
    raise ConfigError(
      f"prompt: {len(requests)} continuations in one request, but only {engine.queue} may wait"
    )
  for request in requests[:: body.n]:
    engine.decoder.check_prompts([request.ids], request.max_new)
  builder = ResponseBuilder(body, requests, service.encoder, service.name)
  if builder.max_scores > MAX_SCORES:
    raise ConfigError(
      f"logprobs: up to {builder.max_scores:,} in one answer, but at most {MAX_SCORES:,}: send "
      "fewer prompts at a time, or ask for fewer"
    )
  return builder


async def _respond(
  service: Service, builder: ResponseBuilder, request: fastapi.Request
) -> Response:
  stream = EventStream(service.engine, builder.requests, request.receive)
  response = None
  try:
    events = aiter(stream)
    if builder.body.stream:
      # Headers are sent with the first event: until then a failure can still be a status.
      first = await anext(events)
      response = _EventStreamResponse(_sse_lines(builder, first, events), stream.close)
      return response
    async for i, event in events:
      builder.add(i, event)
    return await run_in_threadpool(lambda: JSONResponse(builder.response()))  # may be long
  except ClientDisconnected:
    return Response(status_code=499)  # the client is no longer there
  finally:
    if response is None:  # else the response closes it
      stream.close()


async def _sse_lines(
  builder: ResponseBuilder, first: tuple[int, Event], events: AsyncIterator[tuple[int, Event]]
) -> AsyncIterator[str]:
  """Yields the lines of a stream of server-sent events."""
  try:
    for chunk in builder.first_chunks():
      yield _sse_line(chunk)
    if line := await _event_line(builder, *first):
      yield line
    async for i, event in events:
      if line := await _event_line(builder, i, event):
        yield line
    for chunk in builder.last_chunks():
      yield _sse_line(chunk)
  except ClientDisconnected:
    return
  except EngineDown as error:
    yield _sse_line(error_body(503, str(error), code="engine_down"))
  except RequestFailed as error:
    yield _sse_line(error_body(500, str(error), code="request_failed"))
  yield "data: [DONE]\n\n"


async def _event_line(builder: ResponseBuilder, i: int, event: Event) -> str | None:
  """The line of an event; that of a prompt is made in a thread, as it may be long."""

  def make() -> str | None:
    chunk = builder.add(i, event)
    return None if chunk is None else _sse_line(chunk)

  return await run_in_threadpool(make) if isinstance(event, PromptScored) else make()


def _sse_line(value: dict[str, Any]) -> str:
  return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"


class _EventStreamResponse(StreamingResponse):
  """A response that closes its event stream however it ends."""

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
  return importlib.resources.files("engram_jax.serve").joinpath("page.html").read_text("utf-8")


_POLICY = (
  "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)


async def _invalid(_: fastapi.Request, error: RequestValidationError) -> Response:
  first = error.errors()[0]
  field = ".".join(map(str, first["loc"][1:]))[:200] or "body"
  message = str(first["msg"]).removeprefix("Value error, ")[:500]
  if first["type"] == "extra_forbidden":
    message = "is not a field of this request"
  return error_response(400, f"{field}: {message}")


async def _http(_: fastapi.Request, error: HTTPException) -> Response:
  return error_response(error.status_code, str(error.detail), headers=error.headers)


async def _unknown_model(_: fastapi.Request, error: UnknownModel) -> Response:
  return error_response(404, str(error), code="model_not_found")


async def _bad(_: fastapi.Request, error: ConfigError) -> Response:
  return error_response(400, str(error))


async def _full(_: fastapi.Request, error: QueueFull) -> Response:
  return error_response(429, str(error), code="queue_full", headers={"Retry-After": "1"})


async def _down(_: fastapi.Request, error: EngineDown) -> Response:
  return error_response(503, str(error), code="engine_down")


async def _failed(_: fastapi.Request, error: RequestFailed) -> Response:
  return error_response(500, str(error), code="request_failed")


_EXCEPTION_HANDLERS: dict[int | type[Exception], Callable[..., Coroutine[Any, Any, Response]]] = {
  RequestValidationError: _invalid,
  HTTPException: _http,
  UnknownModel: _unknown_model,
  ConfigError: _bad,
  QueueFull: _full,
  EngineDown: _down,
  RequestFailed: _failed,
}
