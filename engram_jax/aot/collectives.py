"""Collectives of a compiled program and the arrays that it makes, read from its text.

Contracts about a mesh ("the table never travels", "no gradient is as large as the table") are
checked on the program that the compiler made, not on the one that was written.
"""

import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from engram_jax.aot.hlo_loops import executions
from engram_jax.aot.hlo_text import Array, Computation, Instruction, parse

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
# Instructions that name an array again, or pass it on, without making one.
PLUMBING = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")


class Collective(NamedTuple):
  """One collective instruction and how often a run of the program executes it."""

  kind: str
  """As XLA names it, asynchronous or not: one of KINDS."""
  shapes: tuple[Array, ...]
  """The arrays counted in `bytes`, of one device: results of an all-gather, else operands."""
  bytes: int
  """Size of `shapes`: an upper bound of the bytes that one device sends or receives in one
  execution, since its own part of an all-gather or all-to-all stays, and the interconnect's
  algorithm decides how often an all-reduce passes a byte on."""
  count: int
  """Executions: the product of the trip counts around it."""
  is_exact: bool
  """False if an enclosing loop's trip count depends on data (counted once), or in a branch that
  may not be taken (counted as taken)."""
  op_name: str
  """Its origin in the Python program."""


def collectives(text: str) -> list[Collective]:
  """Returns the collectives of a compiled program, in the order printed; an async pair is one."""
  program = parse(text)
  times = executions(program)
  found = []
  for computation, instruction in program.instructions():
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS or computation.name not in times:
      continue
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"  # the TPU compiler's form: an all-reduce fused with taking a slice
    shapes = _moved(computation, instruction, kind)
    size = sum(array.bytes for array in shapes)
    found.append(Collective(kind, shapes, size, *times[computation.name], instruction.op_name))
  return found


def arrays(text: str) -> set[Array]:
  """Returns every array that is (part of) the result of an instruction, fused or not."""
  return {array for _, instruction in parse(text).instructions() for array in instruction.arrays}


def has_array_with_rows(text: str, rows: int) -> bool:
  """Says whether any array, fused or not, has a dimension of this size."""
  return any(rows in array.dims for array in arrays(text))


def makers(text: str, rows: int) -> list[Instruction]:
  """Instructions that make an array with a dimension of this size, fused ones included.

  Parameters, tuples and loops that only carry such an array do not count. A table updated in place
  leaves a scatter (or the fusion around it); a gradient of its size leaves a broadcast of zeros.
  """
  return [
    instruction
    for _, instruction in parse(text).instructions()
    if instruction.opcode not in PLUMBING
    and any(rows in array.dims for array in instruction.arrays)
  ]


def compile_with_text(
  lowered: jax.stages.Lowered, options: Mapping[str, Any] | None = None
) -> tuple[jax.stages.Compiled, str]:
  """Returns the compiled program and its text, for a TPU as well; `options` are the compiler's.

  On TPU `compiled.as_text()` cannot print a program that hands gathers or scatters to the
  SparseCores (XLA refuses its own async-update instructions), so the compiler writes the text.
  """
  with tempfile.TemporaryDirectory() as folder:
    dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    compiled = lowered.compile(compiler_options={**dump, **(options or {})})
    written = sorted(pathlib.Path(folder).glob("*.after_codegen.txt"))
    if not written:  # only the TPU compiler writes it
      return compiled, compiled.as_text() or ""
    return compiled, "\n".join(path.read_text() for path in written)


def _moved(computation: Computation, instruction: Instruction, kind: str) -> tuple[Array, ...]:
  operands = tuple(a for made in computation.operands(instruction) for a in made.arrays)
  if kind != "all-gather":
    return operands
  if instruction.opcode == kind:
    return instruction.arrays
  return instruction.arrays[len(operands) : 2 * len(operands)]  # -start: (operands, results)
