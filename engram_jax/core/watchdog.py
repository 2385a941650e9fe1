"""A watch over the other processes of a run: where one is lost, this one ends, and says which.

JAX's own watch ends the survivors too, by SIGABRT, with a page of C++ text and no exception. A
callback in its place would be called with an absl::Status, which Python cannot take (std::bad_cast,
jax 0.10). This watch is quicker, and uses nothing but the key-value store of JAX's coordination
service, which lives in process 0:

- each process writes a number there every `tick` seconds, from a thread;
- process 0 counts rounds in which a number stood still. Rounds, not seconds: a machine that was
  suspended has lost nobody. After 0.8 of the heartbeat it writes a verdict, which all read;
- no answer for as long is the loss of process 0, and so is an abort of JAX's at which the service
  does not answer: JAX aborts within milliseconds of the death of process 0 (`_catch_abort`).

Then a survivor writes the stacks of its threads, prints one line, and leaves with code 6 by
`os._exit`: its main thread is inside a collective that will never end, and an orderly exit would
wait for the lost process. Where the collective fails instead, as on CPUs, `settle` holds the error
back until it is known whether a process was lost.

An error of one process alone is a verdict too: the others cannot know otherwise.

Without jax, so that the command line can import it.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import json
import os
import pathlib
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from engram_jax.core.leave import leave_at_once
from engram_jax.errors import LostProcessError

_KEYS = "engram_jax/watch"
_MAX_TICK = 2.0  # seconds
_PATIENCE = 0.8  # of the heartbeat, so that all is over within it
_GRACE = 5.0  # seconds for others to end by themselves, where all had the same error
_WRITE_SECONDS = 2.0  # for the stacks: the file system may be what was lost
_ANSWER_SECONDS = 2.0  # for a request while an abort waits
# What a collective raises: a runtime error, or another type with a status in front.
_RUNTIME_ERRORS = ("JaxRuntimeError", "XlaRuntimeError")
_STATUS = re.compile(r"[A-Z_]{5,}: ")

_watch: "_Watch | None" = None
_folder = pathlib.Path()  # of the run, once it is known


def start(
  client: Any, process: int, processes: int, heartbeat: float, shutdown: Callable[[], None]
) -> None:
  """Starts to watch, until the end of this program.

  Args:
    client: of JAX's coordination service, connected.
    process: this one's number.
    processes: how many there are.
    heartbeat: seconds within which a process that no longer answers is lost.
    shutdown: leaves the others in good order, and returns when all do.
  """
  global _watch
  _watch = _Watch(client, process, processes, heartbeat)
  atexit.register(_watch.close, shutdown)


def keep_stacks_in(folder: str | os.PathLike) -> None:
  """Names the folder of the file that a survivor writes its stacks to; the current one before."""
  global _folder
  _folder = pathlib.Path(folder)


def settle(error: BaseException) -> None:
  """Returns where an error is this process's own; where it is another's loss, ends with code 6.

  It waits for as long as it takes to know, which is nothing for an error that no collective raised.
  """
  if _watch is not None:
    _watch.settle(error)


def leave(code: int, message: str) -> None:
  """Ends this process at once with a code and lets the others know, or does nothing where alone."""
  if _watch is not None:
    _watch.leave(code, message)


class _Watch:
  def __init__(self, client: Any, process: int, processes: int, heartbeat: float):
    self._client, self._process, self._processes = client, process, processes
    self._tick = min(_MAX_TICK, heartbeat / 10)
    self._rounds = round(_PATIENCE * heartbeat / self._tick)
    self._seconds = self._rounds * self._tick
    self._beats: dict[int, str] = {}
    self._still = dict.fromkeys(range(1, processes), 0)  # rounds that a number stood still
    self._failed_rounds = 0
    self._error: BaseException | None = None
    self._verdict: dict[str, Any] | None = None
    self._answered, self._decided = threading.Event(), threading.Event()
    self._leaving, self._closing, self._closed = (threading.Event() for _ in range(3))
    self._ending = threading.Lock()
    self._threads = [threading.Thread(target=self._run, name="heartbeat", daemon=True)]
    if process:
      _catch_abort(self._lose_service)
      silence = threading.Thread(target=self._wait_for_answers, name="silence", daemon=True)
      self._threads.append(silence)
    for thread in self._threads:
      thread.start()

  # --- in threads of their own -----------------------------------------------------------------

  def _run(self) -> None:
    """Writes this process's number and reads the verdict, round by round."""
    count = 0
    while not self._closed.wait(self._tick):
      count += 1
      try:
        self._set(f"beats/{self._process}", str(count), allow_overwrite=True)
        if self._process == 0 and self._verdict is None and (verdict := self._judge()):
          self._publish(verdict)
        verdicts = self._all("verdict")
      except Exception:  # the service has gone: with process 0, or because all are leaving
        if self._closing.is_set() or self._process == 0:
          return
        self._lose_service()
        continue  # it answers after all
      self._answered.set()
      if verdicts and self._verdict is None:
        self._obey(json.loads(verdicts[0]))

  def _judge(self) -> dict[str, Any] | None:
    """The verdict of this round in process 0, if there is one."""
    beats, failed = self._all("beats"), self._all("failed")
    for process in self._still:
      moved = beats.get(process) != self._beats.get(process)
      self._still[process] = 0 if moved else self._still[process] + 1
    self._beats = beats
    if lost := [process for process, rounds in self._still.items() if rounds >= self._rounds]:
      return {"lost": lost, "why": f"no sign of it for {self._seconds:g} s"}
    if len(failed) == self._processes:
      return {"failed": list(failed), "why": ""}  # each knows by itself
    self._failed_rounds += bool(failed)
    if self._failed_rounds > self._rounds + 1:  # by now a loss behind it would have shown
      return {"failed": list(failed), "why": next(iter(failed.values()))}
    return None

  def _wait_for_answers(self) -> None:
    """Ends this process where process 0 is there and silent: stopped, or its host unplugged."""
    silent = 0
    while not self._closed.wait(self._tick):
      silent = 0 if self._answered.is_set() or self._decided.is_set() else silent + 1
      self._answered.clear()
      if silent >= self._rounds:
        self._end({"lost": [0], "why": f"no answer from it for {self._seconds:g} s"})

  def _lose_service(self) -> None:
    """Ends this process, unless the service of process 0 answers."""
    if _bounded(lambda: self._all("verdict"), _ANSWER_SECONDS) is None:
      self._end({"lost": [0], "why": "its connection closed"})

  def _obey(self, verdict: dict[str, Any]) -> None:
    self._verdict = verdict
    self._decided.set()
    if "failed" in verdict and (
      self._process in verdict["failed"] or self._leaving.wait(_GRACE)  # of the same error
    ):
      return
    self._end(verdict)

  # --- in the main thread ----------------------------------------------------------------------

  def settle(self, error: BaseException) -> None:
    message = _first_line(error)
    own: dict[str, Any] = {"failed": [self._process], "why": message}
    if any(_is_runtime_error(cause) for cause in _chain(error)):
      self._error = error
      with contextlib.suppress(Exception):  # the service has gone: the other thread sees that too
        self._set(f"failed/{self._process}", message)
      self._decided.wait(2 * self._seconds + _GRACE)
      verdict = self._verdict or own
      if self._process not in verdict.get("failed", ()):
        self._end(verdict)
    self._publish(own)  # now: what is left to do here may wait for the others

  def leave(self, code: int, message: str) -> None:
    self._leaving.set()
    self._publish({"failed": [self._process], "why": message})
    self._farewell([])
    leave_at_once(code)

  def close(self, shutdown: Callable[[], None]) -> None:
    if error := getattr(sys, "last_value", None):  # a traceback: nobody waits for the others
      self.leave(1, _first_line(error))
    self._closing.set()
    shutdown()
    self._closed.set()
    for thread in self._threads:
      thread.join(_MAX_TICK)

  # --- the end ---------------------------------------------------------------------------------

  def _end(self, verdict: dict[str, Any]) -> None:
    self._ending.acquire()  # for good: another thread that comes here waits for the exit
    lost = verdict.get("lost", [])
    stacks = _bounded(self._write_stacks, _WRITE_SECONDS) or "could not be written"
    error = LostProcessError(self._message(verdict, stacks))
    with contextlib.suppress(Exception):  # nobody listens any more
      print(f"error: {error}", file=sys.stderr, flush=True)
    if 0 not in lost:
      self._farewell(lost)
    leave_at_once(error.exit_code)

  def _message(self, verdict: dict[str, Any], stacks: str) -> str:
    lost = "lost" in verdict
    numbers = verdict["lost" if lost else "failed"]
    one = len(numbers) == 1
    names = f"{'process' if one else 'processes'} {', '.join(map(str, numbers))}"
    verb = ("was lost" if one else "were lost") if lost else "ended with an error"
    return (
      f"{names} of {self._processes} {verb} ({verdict['why']}), so process {self._process} ends; "
      f"the stacks of its threads: {stacks}; the same command resumes from the newest checkpoint"
    )

  def _write_stacks(self) -> str:
    """Writes what each thread is doing; returns the file's path, or why there is none."""
    path = _folder / f"lost_process_{self._process}.txt"
    try:
      with open(path, "w") as file:
        if self._error is not None:
          traceback.print_exception(self._error, file=file)
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
      return f"cannot be written: {error}"
    return str(path)

  def _farewell(self, lost: list[int]) -> None:
    """Says that this process leaves; the service ends with process 0, which so goes last."""

    def wait() -> None:
      self._set(f"left/{self._process}", "left")
      staying = set(range(self._processes)) - set(lost)
      while self._process == 0 and staying - set(self._all("left")):
        self._closed.wait(0.1)

    _bounded(wait, _GRACE + 2 * _MAX_TICK)

  # --- the store -------------------------------------------------------------------------------

  def _publish(self, verdict: dict[str, Any]) -> None:
    with contextlib.suppress(Exception):  # there is one already, or no service
      self._set("verdict/0", json.dumps(verdict))

  def _set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
    self._client.key_value_set(f"{_KEYS}/{key}", value, allow_overwrite)

  def _all(self, folder: str) -> dict[int, str]:
    """The values of one folder by process."""
    entries = self._client.key_value_dir_get(f"{_KEYS}/{folder}")
    return {int(key.rsplit("/", 1)[1]): value for key, value in entries}


_handlers = []  # what C calls must not be collected


def _catch_abort(before: Callable[[], None]) -> None:
  """Calls a function when this process aborts, in the thread that does; then the abort goes on.

  Python's own handlers would run after it. The thread that receives the answers of the service is
  the one that aborts, so none comes to another thread meanwhile.
  """
  libc = ctypes.CDLL(None)
  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: before())
  _handlers.append(handler)
  libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, type(handler)), ctypes.c_void_p
  dumps_stacks = faulthandler.is_enabled()  # then it has a handler, which must come first
  faulthandler.disable()
  libc.signal(signal.SIGABRT, handler)
  if dumps_stacks:
    faulthandler.enable()


def _bounded(function: Callable[[], Any], seconds: float) -> Any:
  """A function's result, or None where it fails or takes longer."""
  results = []

  def run() -> None:
    with contextlib.suppress(Exception):
      results.append(function())

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join(seconds)
  return results[0] if results else None


def _is_runtime_error(error: BaseException) -> bool:
  return type(error).__name__ in _RUNTIME_ERRORS or bool(_STATUS.match(str(error)))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
  return f"{type(error).__name__}: {error}".splitlines()[0][:200]
