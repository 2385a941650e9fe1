"""uvicorn, as it is run here."""

from collections.abc import Callable
from typing import Any

import uvicorn

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
