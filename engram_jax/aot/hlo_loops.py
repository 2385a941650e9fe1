"""Executions of each computation of a compiled program: trip counts of loops, multiplied inwards.

XLA states some trip counts (`known_trip_count`); the TPU compiler drops them, so they are read from
the loop: the start of its counter, the step that the body adds, and the limit in its condition.
"""

import re
from typing import NamedTuple

from engram_jax.aot.hlo_text import Computation, Instruction, Program

SAME_VALUE = ("copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "broadcast")
SWAPPED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE", "EQ": "EQ"}


class Executions(NamedTuple):
  """Executions of a computation in one run of the program.

  `is_exact` is False inside a loop whose trips depend on data (counted once) and inside a branch
  that need not be taken (counted as taken).
  """

  count: int
  is_exact: bool


class _Value(NamedTuple):
  """`element` of the loop's tuple plus `offset`; a constant where `element` is None."""

  element: int | None
  offset: int


def executions(program: Program) -> dict[str, Executions]:
  """Counts the executions of computations that run by themselves or inside a fusion, call, branch,
  loop or async pair; those applied to elements (the sum inside a reduction) are left out.
  """
  edges = {name: list(_calls(program, name)) for name in program.computations}
  total = {program.entry: Executions(1, True)}
  for caller in _callers_first(edges, program.entry):
    count, is_exact = total[caller]
    for callee, (trips, has_exact_trips) in edges[caller]:
      before = total.get(callee, Executions(0, True))
      exact = before.is_exact and is_exact and has_exact_trips
      total[callee] = Executions(before.count + count * trips, exact)
  return total


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
  """Returns the trips of a `while`; None where they depend on data or in a form not known here."""
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


def _calls(program: Program, name: str) -> list[tuple[str, Executions]]:
  computation = program.computations[name]
  found = []
  for instruction in computation.instructions.values():
    if instruction.opcode == "while":
      trips = trip_count(program, computation, instruction)
      times = Executions(1 if trips is None else trips, trips is not None)
      found += [(instruction.called("body"), times), (instruction.called("condition"), times)]
    elif instruction.opcode == "conditional":
      found += [(branch, Executions(1, False)) for branch in _branches(instruction)]
    elif instruction.opcode in ("fusion", "call", "async-start", "custom-call"):
      keys = ("calls", "to_apply", "called_computations")
      found += [(to, Executions(1, True)) for key in keys if (to := _callee(instruction, key))]
  return [(callee, times) for callee, times in found if callee in program.computations]


def _callee(instruction: Instruction, key: str) -> str:
  found = re.search(rf"\b{key}=\{{?%?([\w.\-]+)", instruction.attributes)
  return found[1] if found else ""


def _branches(instruction: Instruction) -> list[str]:
  listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
  if listed:
    return re.findall(r"[\w.\-]+", listed[1])
  return [instruction.called(f"{side}_computation") for side in ("true", "false")]


def _callers_first(edges: dict[str, list[tuple[str, Executions]]], entry: str) -> list[str]:
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
  instruction = computation.instructions[loop.operands[0]]
  if instruction.opcode != "tuple":
    return None
  value = _value(program, computation, instruction.operands[element], None)
  return value.offset if value and value.element is None else None


def _change(program: Program, loop: Instruction, element: int) -> int | None:
  """The constant that one trip adds to an element of the loop's tuple."""
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
  assert value.element is not None
  if _change(program, loop, value.element) != 0:
    return None
  start = _initial(program, computation, loop, value.element)
  return None if start is None else start + value.offset


def _comparison(
  program: Program, computation: Computation, name: str, arguments: dict[str, _Value | None] | None
) -> tuple[_Value, _Value, str] | None:
  instruction = computation.instructions[name]
  if instruction.opcode in SAME_VALUE:
    return _comparison(program, computation, instruction.operands[0], arguments)
  if instruction.opcode in ("fusion", "call"):
    inner, inner_arguments = _enter(program, computation, instruction, arguments)
    return _comparison(program, inner, inner.root, inner_arguments)
  if instruction.opcode != "compare":
    return None
  left, right = (
    _value(program, computation, operand, arguments) for operand in instruction.operands
  )
  direction = re.search(r"direction=(\w+)", instruction.attributes)
  return (left, right, direction[1]) if left and right and direction else None


def _value(
  program: Program, computation: Computation, name: str, arguments: dict[str, _Value | None] | None
) -> _Value | None:
  """A scalar as a constant, or as an element of the loop's tuple (parameter 0) plus a constant.

  arguments: values of a fused computation's parameters; None in a loop's own computation.
  """
  instruction = computation.instructions[name]
  value_of = lambda operand: _value(program, computation, operand, arguments)
  if instruction.opcode == "constant":
    return (
      _Value(None, int(instruction.literal))
      if re.fullmatch(r"-?\d+", instruction.literal)
      else None
    )
  if instruction.opcode in SAME_VALUE:
    return value_of(instruction.operands[0])
  if instruction.opcode == "parameter":
    return arguments.get(name) if arguments else None
  if instruction.opcode == "get-tuple-element":
    return _element(program, computation, instruction, arguments)
  if instruction.opcode in ("add", "subtract"):
    left, right = (value_of(operand) for operand in instruction.operands)
    return _sum(left, right, 1 if instruction.opcode == "add" else -1)
  if instruction.opcode in ("fusion", "call"):
    inner, inner_arguments = _enter(program, computation, instruction, arguments)
    return _value(program, inner, inner.root, inner_arguments)
  return None


def _element(
  program: Program,
  computation: Computation,
  instruction: Instruction,
  arguments: dict[str, _Value | None] | None,
) -> _Value | None:
  source = computation.instructions[instruction.operands[0]]
  found = re.search(r"index=(\d+)", instruction.attributes)
  assert found is not None
  index = int(found[1])
  if source.opcode == "parameter" and arguments is None:
    return _Value(index, 0)
  if source.opcode == "tuple":
    return _value(program, computation, source.operands[index], arguments)
  if source.opcode == "fusion":
    inner, inner_arguments = _enter(program, computation, source, arguments)
    root = inner.instructions[inner.root]
    if not root.operands:
      return None
    return _value(program, inner, root.operands[index], inner_arguments)
  return None


def _enter(
  program: Program,
  computation: Computation,
  instruction: Instruction,
  arguments: dict[str, _Value | None] | None,
) -> tuple[Computation, dict[str, _Value | None]]:
  inner = program.computations[_callee(instruction, "calls") or _callee(instruction, "to_apply")]
  values = (_value(program, computation, operand, arguments) for operand in instruction.operands)
  return inner, dict(zip(inner.parameters, values, strict=False))


def _sum(left: _Value | None, right: _Value | None, sign: int) -> _Value | None:
  if left is None or right is None:
    return None
  if right.element is None:
    return _Value(left.element, left.offset + sign * right.offset)
  if left.element is None and sign > 0:
    return _Value(right.element, left.offset + right.offset)
  return None
