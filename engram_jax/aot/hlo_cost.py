"""FLOPs and time of a compiled program, loops counted: XLA's cost analysis counts a body once.

FLOPs are those of matrix products, convolutions and kernels, of one device. Seconds follow XLA's
model, an instruction after the other, each as slow as its FLOPs or its memory traffic at the
compiler's rates; communication costs the memory it touches and nothing more.
"""

import math
import re
from typing import NamedTuple

from engram_jax.aot import gpu_kernels
from engram_jax.aot.hlo_loops import executions
from engram_jax.aot.hlo_text import Computation, Instruction, Program, parse

# Instructions without memory traffic of their own: that of what they call is counted there.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional")
FREE += ("call", "async-start", "async-update", "async-done", "after-all", "partition-id")
# Matrix products of each attention kernel, as multiples of T x T x the width of keys and of values;
# the backward ones compute the scores again.
SPLASH = {"fwd": (1, 1), "dkv": (2, 2), "dq": (2, 1)}


# Custom calls of its own that XLA's cost analysis does not know: minus one second each.
UNKNOWN = tuple(
  f'custom_call_target="{name}"'
  for name in ("ConcatBitcast", "PrepareAsyncCallStart", "PrepareAsyncCallDone")
)


class Rates(NamedTuple):
  """The speed of one device, as the compiler's cost model has it."""

  flops: float
  """FLOP/s."""
  bandwidth: float
  """Bytes/s of its memory."""


class Cost(NamedTuple):
  """The cost of one run of a program on one device."""

  flops: int
  missing_seconds: float
  """Seconds to add to `cost_analysis()["optimal_seconds"]`: trips of loops after the first,
  attention kernels, whose cost XLA does not know, and the second that it subtracts for each call
  that it does not know (UNKNOWN)."""
  modelled_seconds: float
  """Seconds of the program by this file's model: XLA's, but a gather reads its rows alone."""
  xla_seconds: float
  """The part of them that XLA counts: near `optimal_seconds` of a program without gathers."""
  uncounted: tuple[str, ...]
  """Kernels whose cost neither XLA nor this file knows."""


def cost(text: str, rates: Rates) -> Cost:
  """Computes FLOPs with loops counted, and the seconds that XLA leaves out.

  A loop whose trip count depends on data counts once. Attention kernels (splash) count half of
  their scores, as a causal mask leaves.
  """
  program = parse(text)
  times = executions(program)
  fused = _fused(program)
  flops, seconds, once, unknown, uncounted = 0, 0.0, 0.0, 0, set()
  for computation, instruction in program.instructions():
    unknown += any(name in instruction.attributes for name in UNKNOWN)
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
  """Counts the executions of the kernels that the program calls by name: Pallas's, and on GPUs the
  vendor's."""
  program = parse(text)
  times = executions(program)
  found: dict[str, int] = {}
  for computation, instruction in program.instructions():
    if is_kernel(instruction) and computation.name in times:
      name = kernel_name(instruction)
      found[name] = found.get(name, 0) + times[computation.name].count
  return dict(sorted(found.items()))


def launches(text: str) -> int:
  """Counts what a GPU launches in one run: every instruction outside fusions that does something.

  A loop whose trip count depends on data counts once.
  """
  program = parse(text)
  times = executions(program)
  inside = _fused(program)
  return sum(
    times[computation.name].count
    for computation, instruction in program.instructions()
    if computation.name in times
    and computation.name not in inside
    and instruction.opcode not in FREE
    and not instruction.opcode.endswith("-done")
  )


def is_kernel(instruction: Instruction) -> bool:
  """Says whether an instruction calls a kernel by name, which XLA did not write."""
  is_tpu = 'custom_call_target="tpu_custom_call"' in instruction.attributes
  return is_tpu or bool(gpu_kernels.target(instruction))


def kernel_name(instruction: Instruction) -> str:
  """The kernel's name in its source, without the number that XLA adds."""
  if gpu_kernels.target(instruction):
    return gpu_kernels.name(instruction)
  return re.sub(r"(\.(\d+|clone|cloned|remat\d*))+$", "", instruction.name)


def instruction_flops(program: Program, computation: Computation, instruction: Instruction) -> int:
  """FLOPs of one execution, with those in a fusion, without those in a loop's or call's body."""
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
      if gpu_kernels.target(instruction):
        return gpu_kernels.kernel_flops(computation, instruction)
      return int(stated[1]) if stated else _attention(computation, instruction)
  return 0


def _splash(instruction: Instruction) -> str:
  found = re.search(r"splash_m[hq]a_(fwd|dkv|dq)", instruction.name)
  return found[1] if found and is_kernel(instruction) else ""


def _attention(computation: Computation, instruction: Instruction) -> int:
  """Causal attention: queries, keys and values are its first three arrays of floats."""
  if not (part := _splash(instruction)):
    return 0
  operands = computation.operands(instruction)
  inputs = [array for operand in operands for array in operand.arrays]
  query, key, value = [array.dims for array in inputs if array.dtype in ("bf16", "f32")][:3]
  keys, values = SPLASH[part]
  if part == "dkv" and "no_residuals" not in instruction.name:
    keys += 1  # the fused backward kernel makes the queries' gradient too
  pairs = math.prod(query[:-1]) * key[-2]
  return pairs * (keys * query[-1] + values * value[-1])  # 2 FLOPs, half of the pairs


def _convolution(computation: Computation, instruction: Instruction) -> int:
  """A matrix product on TPU is one too: batch dimensions become windows that meet once."""
  left, right = (made.arrays[0].dims for made in computation.operands(instruction))
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
  assert labels is not None
  lhs, rhs, out = labels[1], labels[2], labels[3]
  result = instruction.arrays[0].dims
  groups = [_number(instruction, f"{kind}_group_count") for kind in ("feature", "batch")]
  pairs = math.prod(
    _position_pairs(left[lhs.index(d)], right[rhs.index(d)], result[out.index(d)], window)
    for d, window in zip(sorted(set(out) - {"b", "f"}), _windows(instruction), strict=True)
  )
  features = left[lhs.index("f")] // groups[0] * right[rhs.index("o")]
  return 2 * features * (left[lhs.index("b")] // groups[1]) * pairs


class _Window(NamedTuple):
  stride: int
  pad: int
  lhs_dilate: int
  rhs_dilate: int


def _windows(instruction: Instruction) -> list[_Window]:
  found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
  fields = dict(part.split("=") for part in found[1].split()) if found else {}
  number = len(fields["size"].split("x")) if "size" in fields else 0

  def read(key: str, default: int) -> list[int]:
    values = fields[key].split("x") if key in fields else [str(default)] * number
    return [int(value.split("_")[0]) for value in values]

  keys = (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
  return [_Window(*values) for values in zip(*(read(*key) for key in keys), strict=True)]


def _position_pairs(input_size: int, kernel: int, output_size: int, window: _Window) -> int:
  """Pairs of a kernel's and an output's position that read an element, along one dimension."""
  if input_size == kernel == output_size == window.lhs_dilate and window.stride == output_size - 1:
    return output_size  # a batch dimension
  found = 0
  for k in range(kernel):
    start = k * window.rhs_dilate - window.pad
    for at in range(start, start + output_size * window.stride, window.stride):
      found += at % window.lhs_dilate == 0 and 0 <= at // window.lhs_dilate < input_size
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
  """Bytes that a fusion writes: an update in place writes the update alone."""
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
  """Bytes read of a fusion's parameter: those of slices and rows where only such are used, else all
  of it, once."""
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
