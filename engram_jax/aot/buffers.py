"""The TPU compiler's buffer assignment, read before the compiler makes machine code.

Once a program is optimised, scheduled and laid out in memory, its memory, communication and FLOPs
are settled. Machine code takes most of the time that remains: on two cores, half an hour for a
model of thirty layers. The compiler has no option to stop there, so it runs in a process of its
own, which is killed once the assignment is on the disk.
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
SCHEDULED = "*.after_optimizations_after_buffer_assignment.txt"  # written last
ALLOCATIONS = "*.after_optimizations-buffer-assignment.txt"


class BufferAssignment(NamedTuple):
  """The program, optimised and scheduled, and the bytes of one device by kind, named as in
  `memory_analysis()`; those of its code are not known yet."""

  text: str
  sizes: dict[str, int]


def compile_to_buffer_assignment(
  lower: Callable[..., jax.stages.Lowered], args: tuple, options: Mapping[str, Any]
) -> BufferAssignment:
  """Compiles `lower(*args)` as far as its buffer assignment, in another process: all must pickle.

  Raises what `lower` raises, and JaxRuntimeError where the compiler refuses the program.
  """
  context = multiprocessing.get_context("spawn")
  parent, child = context.Pipe()
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
    options = {**options, "xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    compiler = context.Process(target=_compile, args=(child, lower, args, options), daemon=True)
    compiler.start()
    child.close()
    try:
      _wait(parent, pathlib.Path(folder))
    finally:
      compiler.kill()
      compiler.join()
    return _read(pathlib.Path(folder))


def _compile(
  connection: Connection,
  lower: Callable[..., jax.stages.Lowered],
  args: tuple,
  options: dict[str, Any],
) -> None:
  try:
    lower(*args).compile(compiler_options=options)
    connection.send(None)
  except Exception as error:
    connection.send(error)


def _wait(connection: Connection, folder: pathlib.Path) -> None:
  """Returns once the assignment is written, or the compiler has ended before that was seen."""
  while not any(p.read_text().rstrip().endswith("\n}") for p in folder.glob(SCHEDULED)):
    if connection.poll(0.5):
      error = connection.recv()  # EOFError where the process died
      if error is not None:
        raise error
      return
  time.sleep(0.5)  # the file was seen complete; its neighbours were written before it


def _read(folder: pathlib.Path) -> BufferAssignment:
  text = "\n".join(path.read_text() for path in sorted(folder.glob(SCHEDULED)))
  return BufferAssignment(
    text, sizes("\n".join(p.read_text() for p in sorted(folder.glob(ALLOCATIONS))))
  )


def sizes(allocations: str) -> dict[str, int]:
  """Bytes in main memory by kind, from the compiler's list of allocations."""
  found = dict.fromkeys(("arguments", "temporaries", "output", "donated"), 0)
  for size, attributes in re.findall(r"^allocation \d+: size (\d+)(.*)$", allocations, re.M):
    color = re.search(r"\bcolor (\d+)", attributes)
    if (color[1] if color else HBM) != HBM or "thread-local" in attributes:
      continue
    is_argument, is_output = "parameter" in attributes, "maybe-live-out" in attributes
    found["arguments"] += int(size) * is_argument
    found["output"] += int(size) * is_output
    found["donated"] += int(size) * (is_argument and is_output)
    found["temporaries"] += int(size) * ("preallocated-temp" in attributes)
  return found
