"""What is refused before anything looks at it: strangers, bodies that are too long or too slow."""

import asyncio
import secrets
from typing import Any

from fastapi.responses import JSONResponse

Scope = dict[str, Any]


def error_response(
  status: int, message: str, *, code: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
  """The OpenAI API's error, with whatever a client put into the message made printable."""
  kind = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}
  message = message.encode("utf-8", "replace").decode()
  error = {"message": message, "type": kind.get(status, "invalid_request_error"), "param": None}
  return JSONResponse({"error": error | {"code": code}}, status, headers)


OPEN = frozenset({"/", "/health"})  # paths that say nothing a stranger must not know


def has_key(authorization: bytes, api_key: str | None) -> bool:
  """Whether the header carries the key; always where there is none to carry."""
  return api_key is None or secrets.compare_digest(authorization, f"Bearer {api_key}".encode())


class Guard:
  """ASGI middleware.

  api_key: needed for all but `OPEN`. hosts: names under which the server may be called, any if
  None: on a loopback address it keeps web pages of other sites from calling it under a name of
  theirs. max_body: bytes. timeout: seconds until a body must have come.
  """

  def __init__(
    self,
    app: Any,
    api_key: str | None,
    hosts: frozenset[str] | None,
    max_body: int,
    timeout: float,
  ):
    self.app, self.api_key, self.hosts = app, api_key, hosts
    self.max_body, self.timeout = max_body, timeout

  async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
      return await self.app(scope, receive, send)
    response = self._stranger(scope)
    if response is None:
      try:
        body = await asyncio.wait_for(self._body(receive), self.timeout)
      except TimeoutError:
        body, response = None, error_response(408, "the request's body did not come in time")
      if body is None and response is None:
        response = error_response(413, f"the request's body is over {self.max_body:,} bytes")
    if response is not None:
      return await response(scope, receive, send)
    return await self.app(scope, _replay(body, receive), send)

  def _stranger(self, scope: Scope) -> JSONResponse | None:
    headers = dict(scope["headers"])
    host = headers.get(b"host", b"").decode("latin-1")
    name = host[: host.find("]") + 1] if host.startswith("[") else host.split(":")[0]
    if self.hosts is not None and name.lower() not in self.hosts:
      return error_response(403, f"this server does not answer for {name!r}")
    if scope["path"] not in OPEN and not has_key(headers.get(b"authorization", b""), self.api_key):
      message = "an API key is needed: Authorization: Bearer KEY"
      return error_response(401, message, code="invalid_api_key")
    return None

  async def _body(self, receive: Any) -> bytes | None:
    """None if it is too long. That is read a while longer, or the client would still be sending
    and never see the answer."""
    parts, size = [], 0
    while size <= 8 * self.max_body:
      message = await receive()
      part = message.get("body", b"")
      size += len(part)
      if size <= self.max_body:
        parts.append(part)
      else:
        parts.clear()
      if not message.get("more_body"):
        break
    return b"".join(parts) if size <= self.max_body else None


def _replay(body: bytes, receive: Any) -> Any:
  messages = [{"type": "http.request", "body": body, "more_body": False}]

  async def replayed() -> dict[str, Any]:
    return messages.pop() if messages else await receive()

  return replayed
