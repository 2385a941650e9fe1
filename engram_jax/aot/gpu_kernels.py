"""FLOPs of the kernels that a GPU program calls by name, which XLA counts in none of its analyses.

Ours in Triton (model/grouped_product_gpu.py), cuDNN's attention, cuBLAS's matrix products: each by
the shapes that it is given. Products in fusions are counted as what they are, by aot/hlo_cost.py.
"""

import math
import re

from engram_jax.aot.hlo_text import Computation, Instruction

TRITON, ATTENTION, MATMUL = "__gpu$xla.gpu.triton", "__cudnn$fmha", "__cublas$"
# Products of an attention, of which half a causal mask leaves: scores and values forward; backward
# the scores again, and gradients of values, weights, queries and keys.
FORWARD, BACKWARD = 2, 5


def target(instruction: Instruction) -> str:
  """The kernel's name to XLA if it is one that a GPU is given by name, else an empty string."""
  found = re.search(r'custom_call_target="(__(?:gpu|cudnn|cublas)\$[^"]*)"', instruction.attributes)
  return found[1] if found else ""


def name(instruction: Instruction) -> str:
  """Returns what to call the kernel in a report: a Triton kernel's own name, else XLA's."""
  own = re.search(r'\bname = "(\w+)"', instruction.attributes)
  wanted = target(instruction)
  return own[1] if own and wanted == TRITON else wanted.removeprefix("__")


def kernel_flops(computation: Computation, instruction: Instruction) -> int:
  """FLOPs of one execution; 0 of a kernel that is not known."""
  kind = target(instruction)
  inputs = [array.dims for made in computation.operands(instruction) for array in made.arrays]
  output = instruction.arrays[0].dims
  if kind == TRITON and name(instruction).startswith("grouped_product"):
    rows, depth = inputs[-2]
    width = inputs[-1][-1] if name(instruction).endswith("gradient") else output[-1]
    return 2 * rows * depth * width
  if kind.startswith(ATTENTION):
    pairs, width = _attention(instruction)
    products = BACKWARD if kind.endswith("Backward") else FORWARD
    return (
      products * 2 * pairs * width // (2 if '"mask_type": "CAUSAL"' in _plain(instruction) else 1)
    )
  if kind.startswith(MATMUL):
    contracted = re.search(r'"lhs_contracting_dimensions": ?\["(\d+)"', _plain(instruction))
    return 2 * math.prod(output) * inputs[0][int(contracted[1])] if contracted else 0
  return 0


def _attention(instruction: Instruction) -> tuple[int, int]:
  """(examples x heads x queries x keys, the width of a head), of cuDNN's [B, T, H, k] operands."""
  scores = re.search(
    r'"intermediate_tensor_shape": ?\{.*?"dimensions": ?\[([^\]]*)\]', _plain(instruction)
  )
  assert scores is not None, instruction.name
  pairs = math.prod(int(size) for size in re.findall(r"\d+", scores[1]))
  layouts = re.search(r"operand_layout_constraints=\{\w+\[([\d,]+)\]", instruction.attributes)
  assert layouts is not None, instruction.name
  return pairs, int(layouts[1].split(",")[-1])


def _plain(instruction: Instruction) -> str:
  return instruction.attributes.replace(r"\"", '"')
