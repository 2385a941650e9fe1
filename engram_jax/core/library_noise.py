"""Keeps Orbax's own account of a failed save off the screen; ours is one line.

Where a save fails, Orbax and TensorStore write hundreds of tracebacks: one for each array that was
being written, some of them when they are collected at the end of the process, and one for each that
finds the event loop closed. The error itself is raised where it is waited for.
"""

import functools
import logging
import sys
import traceback
import warnings

_FROM = "orbax"  # in the name of what failed, or of the file that says so

_NEVER_AWAITED = "async_serialize"  # Orbax's writes that were to follow the one that failed


@functools.cache  # once in a process, and for good: the last messages come when it ends
def quiet_failed_saves() -> None:
  """From now on Orbax's tracebacks of failed saves are not shown."""
  for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(_is_not_from_orbax)
  warnings.filterwarnings("ignore", f"coroutine '{_NEVER_AWAITED}", RuntimeWarning)
  before = sys.unraisablehook

  def hook(unraisable: "sys.UnraisableHookArgs") -> None:
    # TensorStore calls back into the loop that Orbax has closed after the first error.
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
      before(unraisable)

  sys.unraisablehook = hook


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
  if record.levelno < logging.ERROR:
    return True
  frames = traceback.extract_tb(record.exc_info[2]) if record.exc_info else ()
  files = (record.pathname, *(frame.filename for frame in frames))
  return not any(_FROM in text for text in (*files, record.getMessage()))
