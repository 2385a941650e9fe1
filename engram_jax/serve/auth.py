"""Checks before a request is parsed: host name, API key, and the size and speed of its body."""

import asyncio
import secrets
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

Scope = dict[str, Any]


def error_body(status: int, message: str, *, code: str | None = None) -> dict[str, Any]:
  """An error in the OpenAI API's shape, with text that a client put into it made printable."""
  kind = {401: "authentication_error", 429: "rate_limit_error"}
  kind |= dict.fromkeys((500, 503), "server_error")
  message = message.encode("utf-8", "replace").decode()
  error = {"message": message, "type": kind.get(status, "invalid_request_error"), "param": None}
  return {"error": error | {"code": code}}


def error_response(
  status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
  """A response with `error_body`."""
  return JSONResponse(error_body(status, message, code=code), status, headers)


PUBLIC_PATHS = frozenset({"/", "/health"})  # answered without an API key


def has_key(authorization: bytes, api_key: str | None) -> bool:
  """Returns True if the header carries the key, or no key is needed."""
  return api_key is None or secrets.compare_digest(authorization, f"Bearer {api_key}".encode())


class Guard:
  """ASGI middleware that rejects requests.

  Args:
    api_key: needed for all but `PUBLIC_PATHS`.
    hosts: names under which the server may be called, any if None: on a loopback address it keeps
      web pages of other sites from calling it under a name of theirs.
    max_body: bytes.
    timeout: seconds until a body must have arrived.
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
    app = self._reject(scope)
    if app is None:
      try:
        body = await asyncio.wait_for(self._read_body(receive), self.timeout)
      except TimeoutError:
        app = error_response(408, "the request's body did not come in time")
      else:
        if body is None:
          app = error_response(413, f"the request's body is over {self.max_body:,} bytes")
        else:
          app, receive = self.app, _replay(body, receive)
    return await app(scope, receive, send)

  def _reject(self, scope: Scope) -> JSONResponse | None:
    """The response to a request for another host or without the API key; None if it may pass."""
    headers = dict(scope["headers"])
    host = headers.get(b"host", b"").decode("latin-1")
    name = host[: host.find("]") + 1] if host.startswith("[") else host.split(":")[0]
    if self.hosts is not None and name.lower() not in self.hosts:
      return error_response(403, f"this server does not answer for {name!r}")
    authorization = headers.get(b"authorization", b"")
    if scope["path"] not in PUBLIC_PATHS and not has_key(authorization, self.api_key):
      message = "an API key is needed: Authorization: Bearer KEY"
      return error_response(401, message, code="invalid_api_key")
    return None

  async def _read_body(self, receive: Any) -> bytes | None:
    """Reads the body; None if it is too long. A longer one is read for a while, or the client would
    still be sending and never see the answer."""
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
