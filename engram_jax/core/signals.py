"""Asking a run to stop: SIGTERM (a scheduler's) and SIGINT (Ctrl-C) become a flag the loop reads.

with StopRequest() as stop:
  for step in range(steps):
    ...
    if stop.requested:
      save, and leave with EXIT_STOPPED
"""

import signal
import types
from typing import Any


class StopRequest:
  """A context in which SIGTERM and the first SIGINT set `requested` instead of ending the process.

  A second SIGINT raises KeyboardInterrupt, for whoever does not want to wait for the save.

  Python runs handlers in the main thread, between two bytecodes: use it there (ValueError
  elsewhere), and expect the flag after the XLA program that is running, not during it. Enter it
  after `jax.distributed.initialize`, whose preemption service installs its own SIGTERM handler;
  without that call neither JAX nor Orbax handles a signal. Handlers are put back on leaving.

  Attributes:
    signal_name: of the first signal that came, "SIGTERM" or "SIGINT"; None while none has.
  """

  def __init__(self) -> None:
    self.signal_name: str | None = None
    self._interrupts = 0
    self._before: dict[signal.Signals, Any] = {}

  @property
  def requested(self) -> bool:
    """Says whether a signal has come."""
    return self.signal_name is not None

  def __enter__(self) -> "StopRequest":
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._before.items():
      # None: a handler that C code had installed, which Python cannot put back.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    self._before.clear()

  def _handle(self, number: int, _: types.FrameType | None) -> None:
    self._interrupts += number == signal.SIGINT
    if self._interrupts > 1:
      raise KeyboardInterrupt
    if self.signal_name is None:
      self.signal_name = signal.Signals(number).name
