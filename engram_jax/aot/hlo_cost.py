"""What a compiled program computes, loops counted: XLA's own cost analysis counts a body once.

FLOPs are those of matrix products, convolutions and kernels, of one device. Seconds follow XLA's
model, an instruction after the other, each as slow as its FLOPs or its memory traffic at the
compiler's rates; communication costs the memory it touches and nothing more.
"""

import math
import re
from typing import NamedTuple

from engram_jax.aot.hlo_loops import executions
from engram_jax.aot.hlo_text import Computation, Instruction, Program, parse

# Instructions without traffic of their own: what they hold or call is counted where it stands.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional")
FREE += ("call", "async-start", "async-update", "async-done", "after-all", "partition-id")
# Matrix products of each attention kernel, as multiples of T x T x the width of keys and of values;
# the backward ones compute the scores again.
SPLASH = {"fwd": (1, 1), "dkv": (2, 2), "dq": (2, 1)}


# A custom call of its own that XLA's cost analysis does not know: minus one second each.
UNKNOWN = 'custom_call_target="ConcatBitcast"'


class Rates(NamedTuple):
  """Of one device, as the compiler's cost model has them."""

  flops: float
  """FLOP/s."""
  bandwidth: float
  """Bytes/s of its memory."""


class Cost(NamedTuple):
  flops: int
  """Of one device in one run of the program."""
  missing_seconds: float
  """To add to `cost_analysis()["optimal_seconds"]`: the trips of loops after the first, the
  attention kernels, which tell XLA nothing, and the second that it takes off for what it does not
  know (UNKNOWN)."""
  modelled_seconds: float
  """The whole program by this file's model: XLA's, but a gather reads its rows, not the table."""
  told_seconds: float
  """The part of them that XLA counts: near `optimal_seconds` of a program without gathers."""
  uncounted: tuple[str, ...]
  """Kernels that tell XLA nothing and are not known here either."""


def cost(text: str, rates: Rates) -> Cost:
  """FLOPs with loops counted, and the seconds that XLA leaves out.

  A loop whose trip count depends on data counts once. Attention kernels (splash) count half of
  their scores, as a causal mask leaves.
  """
  program = parse(text)
  times = executions(program)
  fused = _fused(program)
  flops, seconds, once, unknown, uncounted = 0, 0.0, 0.0, 0, set()
  for computation, instruction in program.instructions():
    unknown += UNKNOWN in instruction.attributes
    if computation.name not in times or computation.name in fused:
      continue
    count = times[computation.name].count
    work = instruction_flops(program, computation, instruction)
    traffic = _traffic(program, computation, instruction) / rates.bandwidth
    flops += count * work
    seconds += count * max(work / rates.flops, traffic)
    once += traffic if _splash(instruction) else max(work / rates.flops, traffic)
    if is_kernel(instruction) and not work:
      uncounted.add(kernel_name(instruction))
  return Cost(flops, seconds - once + unknown, seconds, once, tuple(sorted(uncounted)))


def kernels(text: str) -> dict[str, int]:
  """The kernels written by hand (Pallas) that the program calls, and how often."""
  program = parse(text)
  times = executions(program)
  found: dict[str, int] = {}
  for computation, instruction in program.instructions():
    if is_kernel(instruction) and computation.name in times:
      name = kernel_name(instruction)
      found[name] = found.get(name, 0) + times[computation.name].count
  return dict(sorted(found.items()))


def is_kernel(instruction: Instruction) -> bool:
  return 'custom_call_target="tpu_custom_call"' in instruction.attributes


def kernel_name(instruction: Instruction) -> str:
  """The name it was given, without the number that XLA adds."""
  return re.sub(r"(\.(\d+|clone|cloned|remat\d*))+$", "", instruction.name)


def instruction_flops(program: Program, computation: Computation, instruction: Instruction) -> int:
  """Of one execution; what a fusion holds included, what a loop or call runs not."""
  match instruction.opcode:
    case "dot":
      left = computation.operands(instruction)[0].arrays[0].dims
      contracted = instruction.integers("lhs_contracting_dims")
      return 2 * math.prod(instruction.arrays[0].dims) * math.prod(left[i] for i in contracted)
    case "convolution":
      return _convolution(computation, instruction)
    case "fusion":
      inside = program.computations[instruction.called("calls")]
      return sum(instruction_flops(program, inside, made) for made in inside.instructions.values())
    case "custom-call":
      stated = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes)
      return int(stated[1]) if stated else _attention(computation, instruction)
  return 0


def _splash(instruction: Instruction) -> str:
  found = re.search(r"splash_m[hq]a_(fwd|dkv|dq)", instruction.name)
  return found[1] if found and is_kernel(instruction) else ""


def _attention(computation: Computation, instruction: Instruction) -> int:
  """Causal attention: queries, keys and values are its first three arrays of floats."""
  if not (part := _splash(instruction)):
    return 0
  given = [array for made in computation.operands(instruction) for array in made.arrays]
  query, key, value = [array.dims for array in given if array.dtype in ("bf16", "f32")][:3]
  keys, values = SPLASH[part]
  if part == "dkv" and "no_residuals" not in instruction.name:
    keys += 1  # the fused backward kernel makes the queries' gradient too
  pairs = math.prod(query[:-1]) * key[-2]
  return pairs * (keys * query[-1] + values * value[-1])  # 2 FLOPs, half of the pairs


def _convolution(computation: Computation, instruction: Instruction) -> int:
  """A matrix product on TPU is one too: batch dimensions become windows that meet once."""
  left, right = (made.arrays[0].dims for made in computation.operands(instruction))
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
  lhs, rhs, out = labels[1], labels[2], labels[3]
  result = instruction.arrays[0].dims
  groups = [_number(instruction, f"{kind}_group_count") for kind in ("feature", "batch")]
  places = math.prod(
    _meetings(left[lhs.index(d)], right[rhs.index(d)], result[out.index(d)], window)
    for d, window in zip(sorted(set(out) - {"b", "f"}), _windows(instruction), strict=True)
  )
  features = left[lhs.index("f")] // groups[0] * right[rhs.index("o")]
  return 2 * features * (left[lhs.index("b")] // groups[1]) * places


class _Window(NamedTuple):
  stride: int
  pad: int
  lhs_dilate: int
  rhs_dilate: int


def _windows(instruction: Instruction) -> list[_Window]:
  found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
  given = dict(part.split("=") for part in found[1].split()) if found else {}
  number = len(given["size"].split("x")) if "size" in given else 0

  def read(key: str, default: int) -> list[int]:
    values = given[key].split("x") if key in given else [str(default)] * number
    return [int(value.split("_")[0]) for value in values]

  keys = (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
  return [_Window(*values) for values in zip(*(read(*key) for key in keys), strict=True)]


def _meetings(given: int, kernel: int, made: int, window: _Window) -> int:
  """Pairs of a kernel's and an output's position that meet an element, along one dimension."""
  if given == kernel == made == window.lhs_dilate and window.stride == made - 1:
    return made  # a batch dimension
  found = 0
  for k in range(kernel):
    start = k * window.rhs_dilate - window.pad
    for at in range(start, start + made * window.stride, window.stride):
      found += at % window.lhs_dilate == 0 and 0 <= at // window.lhs_dilate < given
  return found


def _number(instruction: Instruction, key: str) -> int:
  found = re.search(rf"\b{key}=(\d+)", instruction.attributes)
  return int(found[1]) if found else 1


def _fused(program: Program) -> set[str]:
  """Computations whose instructions run as one, inside a fusion."""
  found = set()
  for _, instruction in program.instructions():
    if instruction.opcode == "fusion":
      found.add(instruction.called("calls"))
  return found


def _traffic(program: Program, computation: Computation, instruction: Instruction) -> int:
  """Bytes of memory that an instruction reads and writes, as XLA counts them."""
  if instruction.opcode in FREE or (
    instruction.opcode == "custom-call" and not is_kernel(instruction)  # such as AllocateBuffer
  ):
    return 0
  made = sum(array.bytes for array in instruction.arrays)
  if instruction.opcode.endswith("-done"):
    return made if instruction.opcode == "copy-done" else 0
  if instruction.opcode in ("dynamic-slice", "slice", "gather"):
    return 2 * made
  operands = computation.operands(instruction)
  if instruction.opcode == "dynamic-update-slice":
    return 2 * operands[1].arrays[0].bytes
  if instruction.opcode == "fusion":
    inside = program.computations[instruction.called("calls")]
    read = sum(_read(program, inside, name) for name in inside.parameters)
    return _written(program, inside, inside.root) + read
  return made + sum(array.bytes for operand in operands for array in operand.arrays)


def _written(program: Program, inside: Computation, name: str) -> int:
  """Of a fusion's result: an update in place writes the update alone."""
  root = inside.instructions[name]
  if root.opcode == "tuple":
    return sum(_written(program, inside, operand) for operand in root.operands)
  if root.opcode == "bitcast":
    return _written(program, inside, root.operands[0])
  if root.opcode == "fusion":
    deeper = program.computations[root.called("calls")]
    return _written(program, deeper, deeper.root)
  if root.opcode == "dynamic-update-slice":
    root = inside.instructions[root.operands[1]]
  return sum(array.bytes for array in root.arrays)


def _read(program: Program, inside: Computation, name: str) -> int:
  """Of a fusion's parameter: slices and rows where only those are used, else all of it, once."""
  size = sum(array.bytes for array in inside.instructions[name].arrays)
  found = 0
  for user in inside.instructions.values():
    if name not in user.operands:
      continue
    if user.opcode == "bitcast":
      found += _read(program, inside, user.name)
    elif user.opcode == "fusion":
      deeper = program.computations[user.called("calls")]
      found += _read(program, deeper, deeper.parameters[user.operands.index(name)])
    elif user.opcode in ("slice", "dynamic-slice", "gather") and user.operands[0] == name:
      found += sum(array.bytes for array in user.arrays)
    elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
      found += inside.instructions[user.operands[1]].arrays[0].bytes
    else:
      return size
  return min(found, size)
