"""Leaving a process at once, where an orderly exit would wait or crash."""

import contextlib
import multiprocessing
import os
import sys


def leave_at_once(code: int) -> None:
  """Ends worker processes, which would outlive this one, flushes stdout and stderr, and exits."""
  for child in multiprocessing.active_children():
    with contextlib.suppress(OSError):  # it has ended by itself
      child.terminate()
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads it any more
      stream.flush()
  os._exit(code)
