"""What the TPU's compiler decides before it makes machine code, read while it is still at work.

Once a program is optimised, scheduled and laid out in memory, what it holds, sends and computes is
settled. Machine code takes most of the time that remains: on two cores, half an hour for a model of
thirty layers. The compiler cannot be told to stop, so it runs in a process of its own, writes down
what it decides, and is ended there.
"""

import multiprocessing
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax

HBM = "0"  # the compiler's number for a TPU's main memory; others are on the chip
LAST = "*.after_optimizations_after_buffer_assignment.txt"  # of the files that a layout writes
LAYOUT = "*.after_optimizations-buffer-assignment.txt"


class LaidOut(NamedTuple):
  """text: the program, optimised and scheduled. sizes: bytes of one device by kind, named as in
  `memory_analysis()`; the program's own are not known yet."""

  text: str
  sizes: dict[str, int]


def compile_to_buffer_assignment(
  lower: Callable[..., jax.stages.Lowered], args: tuple, options: Mapping[str, Any]
) -> LaidOut:
  """The layout of `lower(*args)`, which runs in the other process: all must pickle.

  Raises what `lower` raises, and JaxRuntimeError where the compiler refuses the program.
  """
  context = multiprocessing.get_context("spawn")
  ours, theirs = context.Pipe()
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
    options = {**options, "xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    compiler = context.Process(target=_compile, args=(theirs, lower, args, options), daemon=True)
    compiler.start()
    theirs.close()
    try:
      _wait(ours, pathlib.Path(folder))
    finally:
      compiler.kill()
      compiler.join()
    return _read(pathlib.Path(folder))


def _compile(
  told: Connection, lower: Callable[..., jax.stages.Lowered], args: tuple, options: dict[str, Any]
) -> None:
  try:
    lower(*args).compile(compiler_options=options)
    told.send(None)
  except Exception as error:
    told.send(error)


def _wait(told: Connection, folder: pathlib.Path) -> None:
  """Until the layout is written, or the compiler is through before that was seen."""
  while not any(p.read_text().rstrip().endswith("\n}") for p in folder.glob(LAST)):
    if told.poll(0.5):
      error = told.recv()  # EOFError where the process died without a word
      if error is not None:
        raise error
      return
  time.sleep(0.5)  # the file was seen complete; its neighbours were written before it


def _read(folder: pathlib.Path) -> LaidOut:
  text = "\n".join(path.read_text() for path in sorted(folder.glob(LAST)))
  return LaidOut(text, sizes("\n".join(p.read_text() for p in sorted(folder.glob(LAYOUT)))))


def sizes(layout: str) -> dict[str, int]:
  """Bytes in main memory, from what the compiler writes of its allocations."""
  found = dict.fromkeys(("arguments", "temporaries", "output", "donated"), 0)
  for size, attributes in re.findall(r"^allocation \d+: size (\d+)(.*)$", layout, re.M):
    color = re.search(r"\bcolor (\d+)", attributes)
    if (color[1] if color else HBM) != HBM or "thread-local" in attributes:
      continue
    given, returned = "parameter" in attributes, "maybe-live-out" in attributes
    found["arguments"] += int(size) * given
    found["output"] += int(size) * returned
    found["donated"] += int(size) * (given and returned)
    found["temporaries"] += int(size) * ("preallocated-temp" in attributes)
  return found
