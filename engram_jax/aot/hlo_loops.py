"""How often each computation of a compiled program runs: loops' trip counts, multiplied inwards.

XLA states some trip counts (`known_trip_count`); the TPU compiler drops them, so they are read from
the loop: where its counter starts, what the body adds, what the condition compares it with.
"""

import re
from typing import NamedTuple

from engram_jax.aot.hlo_text import Computation, Instruction, Program

SAME_VALUE = ("copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "broadcast")
SWAPPED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE", "EQ": "EQ"}


class Times(NamedTuple):
  """Runs of a computation in one run of the program.

  `known` is False inside a loop whose trips depend on data (counted once) and inside a branch that
  need not be taken (counted as taken).
  """

  count: int
  known: bool


class _Value(NamedTuple):
  """`element` of the loop's tuple plus `offset`; a constant where `element` is None."""

  element: int | None
  offset: int


def executions(program: Program) -> dict[str, Times]:
  """Of every computation that runs by itself or inside a fusion, call, branch, loop or async pair.

  Not of those applied to elements (the sum inside a reduction).
  """
  edges = {name: list(_calls(program, name)) for name in program.computations}
  total = {program.entry: Times(1, True)}
  for caller in _callers_first(edges, program.entry):
    count, known = total[caller]
    for callee, (trips, sure) in edges[caller]:
      before = total.get(callee, Times(0, True))
      total[callee] = Times(before.count + count * trips, before.known and known and sure)
  return total


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
  """Of a `while`; None where it depends on data or is written in a way not understood here."""
  if stated := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
    return int(stated[1])
  condition = program.computations[loop.called("condition")]
  test = _comparison(program, condition, condition.root, None)
  if test is None:
    return None
  left, right, direction = test
  if left.element is None:
    left, right, direction = right, left, SWAPPED[direction]
  if left.element is None:
    return None
  start = _initial(program, computation, loop, left.element)
  step = _change(program, loop, left.element)
  limit = right.offset if right.element is None else _constant(program, computation, loop, right)
  if start is None or not step or limit is None:
    return None
  return _trips(start + left.offset, limit, step, direction)


def _trips(start: int, limit: int, step: int, direction: str) -> int | None:
  if step < 0:
    start, limit, step, direction = -start, -limit, -step, SWAPPED[direction]
  distance = limit - start
  if direction == "NE" and distance >= 0 and distance % step == 0:
    return distance // step
  if direction not in ("LT", "LE"):
    return None
  return max(0, -(-(distance + (direction == "LE")) // step))


def _calls(program: Program, name: str) -> list[tuple[str, Times]]:
  computation = program.computations[name]
  found = []
  for instruction in computation.instructions.values():
    if instruction.opcode == "while":
      trips = trip_count(program, computation, instruction)
      times = Times(1 if trips is None else trips, trips is not None)
      found += [(instruction.called("body"), times), (instruction.called("condition"), times)]
    elif instruction.opcode == "conditional":
      found += [(branch, Times(1, False)) for branch in _branches(instruction)]
    elif instruction.opcode in ("fusion", "call", "async-start", "custom-call"):
      keys = ("calls", "to_apply", "called_computations")
      found += [(to, Times(1, True)) for key in keys if (to := _callee(instruction, key))]
  return [(callee, times) for callee, times in found if callee in program.computations]


def _callee(instruction: Instruction, key: str) -> str:
  found = re.search(rf"\b{key}=\{{?%?([\w.\-]+)", instruction.attributes)
  return found[1] if found else ""


def _branches(instruction: Instruction) -> list[str]:
  listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
  if listed:
    return re.findall(r"[\w.\-]+", listed[1])
  return [instruction.called(f"{side}_computation") for side in ("true", "false")]


def _callers_first(edges: dict[str, list[tuple[str, Times]]], entry: str) -> list[str]:
  done: dict[str, None] = {}

  def visit(name: str) -> None:
    for callee, _ in edges[name]:
      if callee not in done:
        visit(callee)
    done[name] = None

  visit(entry)
  return list(reversed(done))


def _initial(
  program: Program, computation: Computation, loop: Instruction, element: int
) -> int | None:
  made = computation.instructions[loop.operands[0]]
  if made.opcode != "tuple":
    return None
  value = _value(program, computation, made.operands[element], None)
  return value.offset if value and value.element is None else None


def _change(program: Program, loop: Instruction, element: int) -> int | None:
  """What one trip adds to an element of the loop's tuple."""
  body = program.computations[loop.called("body")]
  root = body.instructions[body.root]
  if root.opcode != "tuple":
    return None
  value = _value(program, body, root.operands[element], None)
  return value.offset if value and value.element == element else None


def _constant(
  program: Program, computation: Computation, loop: Instruction, value: _Value
) -> int | None:
  """The value of an element that no trip changes."""
  if _change(program, loop, value.element) != 0:
    return None
  start = _initial(program, computation, loop, value.element)
  return None if start is None else start + value.offset


def _comparison(
  program: Program, computation: Computation, name: str, given: dict[str, _Value] | None
) -> tuple[_Value, _Value, str] | None:
  made = computation.instructions[name]
  if made.opcode in SAME_VALUE:
    return _comparison(program, computation, made.operands[0], given)
  if made.opcode in ("fusion", "call"):
    inner, arguments = _enter(program, computation, made, given)
    return _comparison(program, inner, inner.root, arguments)
  if made.opcode != "compare":
    return None
  left, right = (_value(program, computation, operand, given) for operand in made.operands)
  direction = re.search(r"direction=(\w+)", made.attributes)
  return (left, right, direction[1]) if left and right and direction else None


def _value(
  program: Program, computation: Computation, name: str, given: dict[str, _Value] | None
) -> _Value | None:
  """A scalar as a constant, or as an element of the loop's tuple (parameter 0) plus a constant.

  given: what a fused computation's parameters are; None in a loop's own computation.
  """
  made = computation.instructions[name]
  inner = lambda operand: _value(program, computation, operand, given)
  if made.opcode == "constant":
    return _Value(None, int(made.literal)) if re.fullmatch(r"-?\d+", made.literal) else None
  if made.opcode in SAME_VALUE:
    return inner(made.operands[0])
  if made.opcode == "parameter":
    return given.get(name) if given else None
  if made.opcode == "get-tuple-element":
    return _element(program, computation, made, given)
  if made.opcode in ("add", "subtract"):
    left, right = (inner(operand) for operand in made.operands)
    return _sum(left, right, 1 if made.opcode == "add" else -1)
  if made.opcode in ("fusion", "call"):
    into, arguments = _enter(program, computation, made, given)
    return _value(program, into, into.root, arguments)
  return None


def _element(
  program: Program, computation: Computation, made: Instruction, given: dict[str, _Value] | None
) -> _Value | None:
  source = computation.instructions[made.operands[0]]
  index = int(re.search(r"index=(\d+)", made.attributes)[1])
  if source.opcode == "parameter" and given is None:
    return _Value(index, 0)
  if source.opcode == "tuple":
    return _value(program, computation, source.operands[index], given)
  if source.opcode == "fusion":
    into, arguments = _enter(program, computation, source, given)
    root = into.instructions[into.root]
    return _value(program, into, root.operands[index], arguments) if root.operands else None
  return None


def _enter(
  program: Program, computation: Computation, made: Instruction, given: dict[str, _Value] | None
) -> tuple[Computation, dict[str, _Value]]:
  into = program.computations[_callee(made, "calls") or _callee(made, "to_apply")]
  values = (_value(program, computation, operand, given) for operand in made.operands)
  return into, dict(zip(into.parameters, values, strict=False))


def _sum(left: _Value | None, right: _Value | None, sign: int) -> _Value | None:
  if left is None or right is None:
    return None
  if right.element is None:
    return _Value(left.element, left.offset + sign * right.offset)
  if left.element is None and sign > 0:
    return _Value(right.element, left.offset + right.offset)
  return None
