"""Saves of a run that goes on where one fails: a full disk may have room again by the next."""

import contextlib
from collections.abc import Callable, Generator

from engram_jax.core.checkpoint import Checkpoints
from engram_jax.errors import StorageError


class PeriodicSaves:
  """Starts saves and says which failed; gives up after some in a row."""

  def __init__(self, checkpoints: Checkpoints, limit: int, report: Callable[[str], None]):
    """Makes no save yet.

    Args:
      limit: so many failed saves in a row are a StorageError.
      report: is told of a failed one in a line.
    """
    self._checkpoints, self._limit, self._report = checkpoints, limit, report
    self._failed = 0  # in a row
    self._running: int | None = None  # the step whose save was started and has not been waited for

  def save(self, step: int, start: Callable[[], None]) -> None:
    """Waits for the save before, then runs `start`, which calls `Checkpoints.save` for this step.

    Raises StorageError where it is one failure too many.
    """
    self._settle()
    with self._counted(step):
      start()
      self._running = step

  def finish(self) -> None:
    """Waits for the last save; StorageError if the newest step that was to be saved is not."""
    self._settle(limit=1)
    if self._failed:
      raise StorageError("the last step could not be saved, as said above")

  def metrics(self) -> dict[str, float]:
    """The size and seconds of the save that ended last, once; nothing in other processes than 0."""
    saved = self._checkpoints.last_saved()
    if saved is None:
      return {}
    return {
      "checkpoint/step": saved.step,
      "checkpoint/seconds": saved.seconds,
      "checkpoint/bytes": saved.bytes,
    }

  def _settle(self, limit: int | None = None) -> None:
    if self._running is not None:
      step, self._running = self._running, None
      with self._counted(step, limit):
        self._checkpoints.wait()
        self._failed = 0

  @contextlib.contextmanager
  def _counted(self, step: int, limit: int | None = None) -> Generator[None]:
    try:
      yield
    except StorageError as error:
      self._failed += 1
      limit = limit or self._limit
      said = f"step {step} was not saved: {error}"
      if self._failed >= limit:
        raise StorageError(f"{said} ({self._failed} failed saves in a row)") from error
      self._report(f"{said}; training goes on, and the next save tries again")
