"""Standard output and error as a program meets them: closed, full, or of another encoding.

Whatever is printed, by whichever command, appears with replacements where the terminal cannot show
it. Standard error is for people: what cannot be written there is dropped, and ends nothing.
Standard output is results: a reader that has gone (`| head`) ends the command quietly, any other
failure is a StorageError.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

from engram_jax.errors import StorageError


def prepare_streams() -> None:
  """Makes stdout and stderr take any text; call it once, before anything is printed or opened."""
  _fill_descriptors()
  for name in ("stdout", "stderr"):
    stream = getattr(sys, name)
    if stream is None:  # it was closed before this program began
      nowhere = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115 (for good)
      setattr(sys, name, nowhere)
      continue
    if isinstance(stream, _Stream):
      continue
    if hasattr(stream, "reconfigure"):
      # Surrogates, which stand for bytes of a file's name that are no UTF-8, are replaced too.
      stream.reconfigure(errors="backslashreplace")
    # A stream that was put in place of the real one (a test's, a notebook's) is its owner's.
    if stream is getattr(sys, f"__{name}__"):
      setattr(sys, name, _Stream(stream, _end_output if name == "stdout" else _drop_message))


def flush_streams() -> None:
  """Writes out what was printed, so that a failure is known before the program's exit code is.

  Raises SystemExit where nobody reads stdout any more, StorageError where it cannot be written.
  """
  for stream in (sys.stderr, sys.stdout):
    with contextlib.suppress(ValueError):  # closed
      stream.flush()


def silence(stream: Any) -> None:
  """Sends what is still to be written to a stream nowhere: Python flushes it once more at exit."""
  try:
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, stream.fileno())
    os.close(descriptor)
  except (OSError, ValueError, AttributeError):  # closed, or with no descriptor
    pass


def _fill_descriptors() -> None:
  """Opens those of 0, 1 and 2 that are closed: else the next file has the number of stderr."""
  while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
    pass
  os.close(descriptor)


class _Stream:
  """A stream whose failures a function handles; everything else is the stream's own."""

  def __init__(self, stream: Any, handle: Callable[[OSError], None]):
    self._stream, self._handle = stream, handle

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def __iter__(self) -> Any:
    return iter(self._stream)

  def write(self, text: str) -> int:
    """Writes a text."""
    try:
      return self._stream.write(text)
    except OSError as error:
      self._fail(error)
      return len(text)

  def writelines(self, lines: Any) -> None:
    """Writes several texts."""
    for line in lines:
      self.write(line)

  def flush(self) -> None:
    """Writes out what was kept back."""
    try:
      self._stream.flush()
    except OSError as error:
      self._fail(error)

  def _fail(self, error: OSError) -> None:
    silence(self._stream)
    self._handle(error)


def _end_output(error: OSError) -> None:
  """Ends the command: results that cannot be written are none."""
  if isinstance(error, BrokenPipeError):
    raise SystemExit(0)  # what rich, argparse and we ourselves print with would make of it varies
  raise StorageError(f"standard output cannot be written: {error.strerror}") from None


def _drop_message(error: OSError) -> None:
  """Goes on: nobody can be told."""
  del error
