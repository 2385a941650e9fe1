"""Parsed HLO text: the computations of a compiled program, their instructions and result arrays.

XLA prints it on CPU, GPU and TPU (`compiled.as_text()`, or the files of `xla_dump_to`). After
partitioning, every shape in it is that of one device.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple


class Array(NamedTuple):
  """An array: its element type as XLA spells it (bf16, s32, pred) and its dimensions."""

  dtype: str
  dims: tuple[int, ...]

  @property
  def bytes(self) -> int:
    """Its size without a layout's padding; sub-byte elements packed."""
    return -(-math.prod(self.dims) * bits(self.dtype) // 8)


class Instruction(NamedTuple):
  """One line of a computation."""

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  """Its result, a tuple flattened."""
  operands: tuple[str, ...]
  """Names within the same computation."""
  literal: str
  """Text between the parentheses: a constant's value, a parameter's number."""
  attributes: str
  """Everything after them."""

  def called(self, key: str) -> str:
    """Returns the computation that an attribute names, such as `body`; "" without it."""
    found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
    return found[1] if found else ""

  def integers(self, key: str) -> tuple[int, ...]:
    """Returns the numbers of an attribute key={1,2}; empty without it."""
    found = re.search(rf"\b{key}={{([\d,]*)}}", self.attributes)
    return tuple(int(n) for n in found[1].split(",") if n) if found else ()

  @property
  def op_name(self) -> str:
    """Its origin in the Python program: jit, named scopes and primitive."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""


class Computation(NamedTuple):
  """A named list of instructions, of which `root` is the result."""

  name: str
  instructions: dict[str, Instruction]
  root: str
  parameters: tuple[str, ...]
  """Names, by number."""

  def operands(self, instruction: Instruction) -> list[Instruction]:
    """Returns the instructions whose results an instruction takes."""
    return [self.instructions[name] for name in instruction.operands]


class Program(NamedTuple):
  """The computations of a program by name, and the name of the first to run."""

  computations: dict[str, Computation]
  entry: str

  def instructions(self) -> Iterator[tuple[Computation, Instruction]]:
    """Yields every instruction with its computation."""
    for computation in self.computations.values():
      for instruction in computation.instructions.values():
        yield computation, instruction


@functools.cache
def bits(dtype: str) -> int:
  """Returns the bits of one element; 0 for types that are no array (token, opaque)."""
  if dtype == "pred":
    return 8
  found = re.match(r"[a-z]+?(\d+)", dtype)
  return int(found[1]) if found else 0


@functools.lru_cache(maxsize=4)  # texts are long and asked about more than once
def parse(text: str) -> Program:
  """Parses a program that XLA printed; ValueError for text without an entry computation."""
  computations, entry = {}, ""
  name, lines = "", []
  for line in text.splitlines():
    if not name:
      if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
        name, lines = header[2], []
        entry = name if header[1] else entry
    elif re.fullmatch(r'\}(, execution_thread="[^"]*")?', line):
      computations[name] = _computation(name, lines)
      name = ""
    elif line.startswith("  "):
      lines.append(line)
    else:  # metadata of a kernel may hold line breaks
      lines[-1] += line
  if name or not entry:
    raise ValueError(f"no HLO: the text ends inside {name!r}" if name else "no HLO: no ENTRY in it")
  return Program(computations, entry)


def arrays_of(shape: str) -> tuple[Array, ...]:
  """Parses the arrays of a printed shape: bf16[8,128]{1,0:T(8,128)}, or a tuple of such."""
  found = re.findall(r"\b([a-z]\w*)\[((?:<=)?[\d,<=]*)\]", shape)
  return tuple(
    Array(dtype, tuple(int(n.removeprefix("<=")) for n in dims.split(",") if n))
    for dtype, dims in found
  )


def _computation(name: str, lines: list[str]) -> Computation:
  instructions, root, parameters = {}, "", {}
  for line in lines:
    if (instruction := _instruction(line)) is None:
      continue
    instructions[instruction.name] = instruction
    if line.lstrip().startswith("ROOT "):
      root = instruction.name
    if instruction.opcode == "parameter":
      parameters[int(instruction.literal)] = instruction.name
  return Computation(name, instructions, root, tuple(parameters[i] for i in sorted(parameters)))


def _instruction(line: str) -> Instruction | None:
  head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
  if head is None:
    return None
  start = head.end()
  end = _end_of_parenthesis(line, start) if line[start] == "(" else line.index(" ", start)
  opcode = re.match(r"\s*([a-z][\w\-]*)(?=\()", line[end:])
  assert opcode is not None, line[:200]
  opened = end + opcode.end()
  closed = _end_of_parenthesis(line, opened)
  literal = line[opened + 1 : closed - 1]
  has_operands = opcode[1] not in ("constant", "parameter", "iota")
  operands = re.findall(r"%([\w.\-]+)", literal) if has_operands else ()
  return Instruction(
    name=head[1],
    opcode=opcode[1],
    arrays=arrays_of(line[start:end]),
    operands=tuple(operands),
    literal=literal,
    attributes=line[closed:],
  )


def _end_of_parenthesis(line: str, opened: int) -> int:
  """Returns the index just past the parenthesis that closes the one at `opened`."""
  depth = 0
  for found in re.compile(r"[()]").finditer(line, opened):
    depth += 1 if found[0] == "(" else -1
    if depth == 0:
      return found.end()
  raise ValueError(f"HLO line without its closing parenthesis: {line[:200]}")
