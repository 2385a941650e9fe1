"""Asking a run to stop: SIGTERM (a scheduler's) and SIGINT (Ctrl-C) become a flag the loop reads.

with StopRequest() as stop:
  for step in range(steps):
    ...
    if stop.requested:
      save, and leave with EXIT_STOPPED

Python runs its handlers in the main thread between two bytecodes, so while XLA compiles, which may
take minutes, none runs, and signals that come meanwhile become one. The interpreter's C handler
however writes a byte for each signal at once (`signal.set_wakeup_fd`): a thread reads them, answers
in words, and ends the process where it must not wait.
"""

import signal
import socket
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

from engram_jax.core.leave import leave_at_once
from engram_jax.errors import EXIT_STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 1.0  # for temporary files to be removed, where nothing has to be saved


class StopRequest:
  """A context in which the first SIGTERM or SIGINT sets `requested`, and a second ends the process.

  The first is answered within a second by a line on stderr, whatever the process is doing. Where
  there is nothing to save yet, it ends the process with EXIT_STOPPED within two seconds. A second
  one ends it as soon, with 128 + its number, without saving.

  Enter it in the main thread (ValueError elsewhere), after `jax.distributed.initialize`, whose
  preemption service installs its own SIGTERM handler; without that call neither JAX nor Orbax
  handles a signal. Handlers are put back on leaving.

  Attributes:
    signal_name: of the first signal that came, "SIGTERM" or "SIGINT"; None while none has.
    has_work: whether a stop has something to save; set it once there is.
  """

  def __init__(
    self,
    has_work: bool = True,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    end: Callable[[int], None] = leave_at_once,
  ) -> None:
    """Makes the context.

    Args:
      has_work: see the class.
      say: is told in a line what a signal does, in a thread of its own.
      end: leaves the process with a code at once, in that thread.
    """
    self.signal_name: str | None = None
    self.has_work = has_work
    self._say, self._end = say, end
    self._before: dict[signal.Signals, Any] = {}
    self._is_ending = False
    self._timer: threading.Timer | None = None

  @property
  def requested(self) -> bool:
    """Says whether a signal has come."""
    return self.signal_name is not None

  def __enter__(self) -> "StopRequest":
    for number in SIGNALS:
      self._before[number] = signal.signal(number, self._handle)
    self._reader, self._writer = socket.socketpair()
    self._writer.setblocking(False)
    self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
    self._thread = threading.Thread(target=self._answer, name="signals", daemon=True)
    self._thread.start()
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    signal.set_wakeup_fd(self._wakeup)
    for number, handler in self._before.items():
      # None: a handler that C code had installed, which Python cannot put back.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    self._before.clear()
    self._writer.close()  # ends the thread, once it has read what came before
    self._thread.join()
    self._reader.close()
    if self._timer is not None:
      self._timer.cancel()
    if self._is_ending and kind is SystemExit:
      # XLA lets the main thread go while it compiles, and its threads do not survive the end of
      # the interpreter: a segmentation fault.
      self._end(EXIT_STOPPED)

  def _handle(self, number: int, _: types.FrameType | None) -> None:
    """Runs in the main thread, perhaps long after the signal."""
    if self.signal_name is None:
      self.signal_name = signal.Signals(number).name
    if not self.has_work and not self._is_ending:
      self._is_ending = True
      raise SystemExit(EXIT_STOPPED)  # files that are half made are removed on its way

  def _answer(self) -> None:
    """Runs in the thread, at once."""
    count = 0
    while received := self._reader.recv(64):
      for number in received:
        if number in SIGNALS:
          count += 1
          self._answer_one(signal.Signals(number), count)

  def _answer_one(self, number: signal.Signals, count: int) -> None:
    if count > 1:
      self._say(f"{number.name}: a second signal, ending at once")
      self._end(128 + number)
      return
    self.signal_name = number.name
    if self.has_work:
      self._say(f"{number.name}: stopping once this step is done and saved; again to end at once")
      return
    self._say(f"{number.name}: stopping; there is nothing to save yet")
    # The main thread leaves by itself, unless it compiles.
    self._timer = threading.Timer(GRACE_SECONDS, self._end, (EXIT_STOPPED,))
    self._timer.daemon = True
    self._timer.start()
