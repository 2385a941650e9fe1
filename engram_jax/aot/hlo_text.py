"""A compiled program's text as data: computations, their instructions, the arrays they make.

What XLA prints (`compiled.as_text()`, or the files of `xla_dump_to`) on CPU, GPU and TPU. After
partitioning, every shape in it is one device's share.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple


class Array(NamedTuple):
  """Element type as XLA spells it (bf16, s32, pred) and dimensions."""

  dtype: str
  dims: tuple[int, ...]

  @property
  def bytes(self) -> int:
    """Without a layout's padding; sub-byte elements packed."""
    return -(-math.prod(self.dims) * bits(self.dtype) // 8)


class Instruction(NamedTuple):
  name: str
  opcode: str
  arrays: tuple[Array, ...]
  """Its result, a tuple flattened."""
  operands: tuple[str, ...]
  """Names within the same computation."""
  literal: str
  """What stands between the parentheses: a constant's value, a parameter's number."""
  attributes: str
  """Everything after them."""

  def called(self, key: str) -> str:
    """The computation that an attribute names, such as `body`; "" without it."""
    found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
    return found[1] if found else ""

  def integers(self, key: str) -> tuple[int, ...]:
    """An attribute of the form key={1,2}; empty without it."""
    found = re.search(rf"\b{key}={{([\d,]*)}}", self.attributes)
    return tuple(int(n) for n in found[1].split(",") if n) if found else ()

  @property
  def op_name(self) -> str:
    """Where in the Python program it comes from: jit, named scopes and primitive."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""


class Computation(NamedTuple):
  name: str
  instructions: dict[str, Instruction]
  root: str
  parameters: tuple[str, ...]
  """Names, by number."""

  def operands(self, instruction: Instruction) -> list[Instruction]:
    return [self.instructions[name] for name in instruction.operands]


class Program(NamedTuple):
  computations: dict[str, Computation]
  entry: str

  def instructions(self) -> Iterator[tuple[Computation, Instruction]]:
    for computation in self.computations.values():
      for instruction in computation.instructions.values():
        yield computation, instruction


@functools.cache
def bits(dtype: str) -> int:
  """Of one element; 0 for what is no array (token, opaque)."""
  if dtype == "pred":
    return 8
  found = re.match(r"[a-z]+?(\d+)", dtype)
  return int(found[1]) if found else 0


@functools.lru_cache(maxsize=4)  # texts are long and asked about more than once
def parse(text: str) -> Program:
  """The program that XLA printed. ValueError for text that holds no entry computation."""
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
  """The arrays of a printed shape: bf16[8,128]{1,0:T(8,128)}, or a tuple of such."""
  found = re.findall(r"\b([a-z]\w*)\[((?:<=)?[\d,<=]*)\]", shape)
  return tuple(
    Array(dtype, tuple(int(n.removeprefix("<=")) for n in dims.split(",") if n))
    for dtype, dims in found
  )


def _computation(name: str, lines: list[str]) -> Computation:
  instructions, root, parameters = {}, "", {}
  for line in lines:
    if (made := _instruction(line)) is None:
      continue
    instructions[made.name] = made
    if line.lstrip().startswith("ROOT "):
      root = made.name
    if made.opcode == "parameter":
      parameters[int(made.literal)] = made.name
  return Computation(name, instructions, root, tuple(parameters[i] for i in sorted(parameters)))


def _instruction(line: str) -> Instruction | None:
  head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
  if head is None:
    return None
  start = head.end()
  end = _closed(line, start) if line[start] == "(" else line.index(" ", start)
  opcode = re.match(r"\s*([a-z][\w\-]*)(?=\()", line[end:])
  assert opcode is not None, line[:200]
  opened = end + opcode.end()
  closed = _closed(line, opened)
  literal = line[opened + 1 : closed - 1]
  known = opcode[1] not in ("constant", "parameter", "iota")
  operands = re.findall(r"%([\w.\-]+)", literal) if known else ()
  return Instruction(
    name=head[1],
    opcode=opcode[1],
    arrays=arrays_of(line[start:end]),
    operands=tuple(operands),
    literal=literal,
    attributes=line[closed:],
  )


def _closed(line: str, opened: int) -> int:
  """Just past the parenthesis that closes the one at `opened`."""
  depth = 0
  for found in re.compile(r"[()]").finditer(line, opened):
    depth += 1 if found[0] == "(" else -1
    if depth == 0:
      return found.end()
  raise ValueError(f"HLO line without its closing parenthesis: {line[:200]}")
