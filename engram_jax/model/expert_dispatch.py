"""Three implementations of the chosen experts over their tokens; equal, and none drops a token.

All have one signature: `(x_SD, experts_SK, weights_SK, w_gate_EDF, w_up_EDF, w_down_EFD) -> y_SD`,

    y[s] = sum_k weights[s, k] * expert[experts[s, k]](x[s]),
    expert[e](x) = (silu(x w_gate[e]) * (x w_up[e])) w_down[e],

with experts_SK int32 in [0, E) and, per token, no expert twice. With K = 1 a row of zeros may also
name expert E, which does not exist: it adds to no gradient of a weight, and its own result, forward
and backward, is to be ignored.

Local letters: S, tokens; E, experts; K, experts per token; F, expert width; N = S K, assignments,
numbered s K + k; P, blocks; Q, rows of a block.

`dense_experts` is the plain reference, with E / K times the work. `blocked_experts` is for CPUs,
where XLA has no grouped product: assignments are sorted by expert, each expert's run is padded to
whole blocks, and a loop takes one block at a time through its expert, forward and backward.
`ragged_experts` is for accelerators: assignments are sorted by expert and each of the three
products is one over groups of rows, by kernels (model/grouped_product.py), since compilers do E
times the work for `lax.ragged_dot` on GPUs and most TPUs. That remains for GPUs that Triton does
not compile for: NVIDIA's before compute capability 8.0, and AMD's.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from engram_jax.core.mesh import compute_capability, platform
from engram_jax.model.grouped_product_gpu import TRITON_CAPABILITY, gpu_grouped_product
from engram_jax.model.grouped_product_tpu import tpu_grouped_product
from engram_jax.model.router import ROUTING, expert_counts

Experts = Callable[..., jax.Array]


def experts_for(dispatch: str, mesh: Mesh | None = None) -> Experts:
  """Returns the function that `dispatch` names; "auto": blocked on CPU, ragged elsewhere.

  mesh: the devices that will run it; default: this process's.
  """
  name = platform(mesh)
  if dispatch == "auto":
    dispatch = "blocked" if name == "cpu" else "ragged"
  if dispatch == "ragged" and name == "tpu":
    return functools.partial(ragged_experts, product=tpu_grouped_product)
  if dispatch == "ragged" and (compute_capability(mesh) or 0) >= TRITON_CAPABILITY:
    return functools.partial(ragged_experts, product=gpu_grouped_product)
  return {"dense": dense_experts, "blocked": blocked_experts, "ragged": ragged_experts}[dispatch]


def dense_experts(
  x_SD: jax.Array,
  experts_SK: jax.Array,
  weights_SK: jax.Array,
  w_gate_EDF: jax.Array,
  w_up_EDF: jax.Array,
  w_down_EFD: jax.Array,
) -> jax.Array:
  """Runs every expert over every token, weighted; an expert that was not chosen weighs zero."""
  chosen_SKE = jax.nn.one_hot(experts_SK, w_gate_EDF.shape[0], dtype=weights_SK.dtype)
  weights_SE = jnp.einsum("SKE,SK->SE", chosen_SKE, weights_SK)
  gate_ESF = jnp.einsum("SD,EDF->ESF", x_SD, w_gate_EDF)
  up_ESF = jnp.einsum("SD,EDF->ESF", x_SD, w_up_EDF)
  y_ESD = jnp.einsum("ESF,EFD->ESD", jax.nn.silu(gate_ESF) * up_ESF, w_down_EFD)
  return jnp.einsum("ESD,SE->SD", y_ESD, weights_SE).astype(x_SD.dtype)


def ragged_experts(
  x_SD: jax.Array,
  experts_SK: jax.Array,
  weights_SK: jax.Array,
  w_gate_EDF: jax.Array,
  w_up_EDF: jax.Array,
  w_down_EFD: jax.Array,
  product: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = lax.ragged_dot,
) -> jax.Array:
  """Sorts assignments by expert, then multiplies each expert's rows by its matrices.

  product: `(x_ND, w_EDF, sizes_E) -> y_NF`, as `lax.ragged_dot`.
  """
  tokens, k = experts_SK.shape
  experts = w_gate_EDF.shape[0]
  order_N = checkpoint_name(sort_by_expert(experts_SK, experts)[0], ROUTING)
  position_N = jnp.arange(tokens * k, dtype=order_N.dtype)
  inverse_N = jnp.zeros_like(order_N).at[order_N].set(position_N, unique_indices=True)
  inverse_N = checkpoint_name(inverse_N, ROUTING)
  sizes_E = expert_counts(experts_SK, experts)
  x_ND = _permute(jnp.repeat(x_SD, k, axis=0), order_N, inverse_N)
  gate_NF = product(x_ND, w_gate_EDF, sizes_E)
  up_NF = product(x_ND, w_up_EDF, sizes_E)
  y_ND = product(jax.nn.silu(gate_NF) * up_NF, w_down_EFD, sizes_E)
  y_SKD = _permute(y_ND, inverse_N, order_N).reshape(tokens, k, -1)
  return jnp.einsum("SKD,SK->SD", y_SKD, weights_SK).astype(x_SD.dtype)


@jax.custom_vjp
def _permute(rows: jax.Array, order_N: jax.Array, inverse_N: jax.Array) -> jax.Array:
  """Permutes rows; its gradient permutes by the inverse order, where autodiff would scatter."""
  del inverse_N
  return rows.at[order_N].get(unique_indices=True, mode="promise_in_bounds")


_permute.defvjp(
  lambda rows, order_N, inverse_N: (_permute(rows, order_N, inverse_N), (order_N, inverse_N)),
  lambda orders, d_rows: (_permute(d_rows, *reversed(orders)), None, None),
)


def sort_by_expert(experts_SK: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
  """Returns (assignments in the order of their experts, those experts), both int32 [N]; stable."""
  expert_N = experts_SK.reshape(-1)
  count = expert_N.size
  if (experts + 1) * count < 2**31:  # one packed key sorts four times as fast as a key and a value
    packed_N = jnp.sort(expert_N * count + jnp.arange(count, dtype=jnp.int32))
    return packed_N % count, packed_N // count
  order_N = jnp.argsort(expert_N, stable=True)
  return order_N, expert_N[order_N]


class _Blocks(NamedTuple):
  """Positions of the assignments when every expert's run is padded to whole blocks.

  P is the worst case; only the first `used` blocks hold assignments.
  """

  token_PQ: jax.Array  # int32: the token whose activation the row holds; any on padding
  assignment_PQ: jax.Array  # int32: s K + k, or N on padding
  expert_P: jax.Array  # int32
  used: jax.Array  # int32 []
  row_SK: jax.Array  # int32: position in [P Q] of an assignment


def block_rows(assignments: int, experts: int) -> int:
  """Q, the power of two next to half an expert's mean share, between 16 and 512.

  About half a block per expert is padding, and small blocks waste a CPU's matrix product. Measured
  on 1 and 2 cores at 512 assignments per expert: 128 and 256 rows within 15 % of each other, 512
  rows up to 40 % slower than the better.
  """
  half = max(assignments // (2 * experts), 1)
  return min(max(1 << (half - 1).bit_length(), 16), 512)


def _blocks(experts_SK: jax.Array, experts: int, rows: int) -> _Blocks:
  tokens, k = experts_SK.shape
  count = tokens * k
  blocks = -(-count // rows) + experts
  order_N, expert_N = sort_by_expert(experts_SK, experts)
  sizes_E = expert_counts(experts_SK, experts)
  blocks_E = -(-sizes_E // rows)
  end_E = jnp.cumsum(blocks_E)
  shift_E = (end_E - blocks_E) * rows - (jnp.cumsum(sizes_E) - sizes_E)
  row_N = jnp.arange(count, dtype=jnp.int32) + shift_E[jnp.minimum(expert_N, experts - 1)]
  assignment = jnp.full(blocks * rows, count, jnp.int32)
  assignment = assignment.at[row_N].set(order_N, unique_indices=True, indices_are_sorted=True)
  row_SK = jnp.zeros(count, jnp.int32).at[order_N].set(row_N, unique_indices=True)
  expert_P = jnp.sum(jnp.arange(blocks)[:, None] >= end_E, axis=1, dtype=jnp.int32)
  return _Blocks(
    token_PQ=jnp.minimum(assignment // k, tokens - 1).reshape(blocks, rows),
    assignment_PQ=assignment.reshape(blocks, rows),
    expert_P=jnp.minimum(expert_P, experts - 1),
    used=end_E[-1],
    row_SK=row_SK.reshape(tokens, k),
  )


@jax.custom_vjp
def blocked_experts(
  x_SD: jax.Array,
  experts_SK: jax.Array,
  weights_SK: jax.Array,
  w_gate_EDF: jax.Array,
  w_up_EDF: jax.Array,
  w_down_EFD: jax.Array,
) -> jax.Array:
  """Runs blocks of one expert's tokens, one after the other; no work on experts without tokens.

  Both directions read rows by gathers: the sum over a token's K experts, and the gradient of its
  activation, read each assignment's row at its sorted position, so nothing is scattered.
  """
  return _forward(x_SD, experts_SK, weights_SK, w_gate_EDF, w_up_EDF, w_down_EFD)[0]


def _forward(x_SD, experts_SK, weights_SK, w_gate_EDF, w_up_EDF, w_down_EFD):
  experts, width, hidden = w_gate_EDF.shape
  rows = block_rows(experts_SK.size, experts)
  blocks = _blocks(experts_SK, experts, rows)
  w_in = jnp.concatenate([w_gate_EDF, w_up_EDF], axis=-1)  # [E, D, 2F]: one product for both

  def body(p, carry):
    pre, y = carry
    expert = blocks.expert_P[p]
    pre_p = x_SD[blocks.token_PQ[p]] @ w_in[expert]
    act = jax.nn.silu(pre_p[:, :hidden]) * pre_p[:, hidden:]
    return pre.at[p].set(pre_p), y.at[p].set(act @ w_down_EFD[expert])

  count = blocks.expert_P.shape[0]
  pre = jnp.zeros((count, rows, 2 * hidden), x_SD.dtype)
  y = jnp.zeros((count, rows, width), x_SD.dtype)
  pre, y = lax.fori_loop(0, blocks.used, body, (pre, y))
  y_SD = _sum_over_k(y.reshape(-1, width), blocks.row_SK, weights_SK).astype(x_SD.dtype)
  return y_SD, (x_SD, weights_SK, w_in, w_down_EFD, blocks, pre)


def _backward(residuals, dy_SD):
  x_SD, weights_SK, w_in, w_down, blocks, pre = residuals
  _, hidden, width = w_down.shape
  count, rows = blocks.token_PQ.shape
  weight_PQ = jnp.append(weights_SK.reshape(-1), 0)[blocks.assignment_PQ]  # zero on padding

  def body(p, carry):
    dx, dweight, dw_in, dw_down = carry
    expert, token_Q = blocks.expert_P[p], blocks.token_PQ[p]
    x, dy, weight = x_SD[token_Q], dy_SD[token_Q], weight_PQ[p][:, None].astype(x_SD.dtype)
    gate, up = pre[p][:, :hidden], pre[p][:, hidden:]
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    act = silu * up
    dact = dy @ w_down[expert].T
    dweight = dweight.at[p].set(jnp.sum(dact * act, axis=-1, dtype=dweight.dtype))
    dact = dact * weight
    dgate = dact * up * (sigmoid + silu * (1 - sigmoid))
    dpre = jnp.concatenate([dgate, dact * silu], axis=-1)
    dx = dx.at[p].set(dpre @ w_in[expert].T)
    dw_in = dw_in.at[expert].add(_outer(x, dpre))
    dw_down = dw_down.at[expert].add(_outer(act * weight, dy))
    return dx, dweight, dw_in, dw_down

  zeros = (
    jnp.zeros((count, rows, width), x_SD.dtype),
    jnp.zeros((count, rows), weights_SK.dtype),
    jnp.zeros(w_in.shape, jnp.float32),
    jnp.zeros(w_down.shape, jnp.float32),
  )
  dx, dweight, dw_in, dw_down = lax.fori_loop(0, blocks.used, body, zeros)
  dx_SD = _sum_over_k(dx.reshape(-1, width), blocks.row_SK).astype(x_SD.dtype)
  dweights_SK = dweight.reshape(-1)[blocks.row_SK]
  dw_gate, dw_up = jnp.split(dw_in.astype(w_in.dtype), 2, axis=-1)
  return dx_SD, None, dweights_SK, dw_gate, dw_up, dw_down.astype(w_down.dtype)


blocked_experts.defvjp(_forward, _backward)


def _outer(x_QD: jax.Array, y_QF: jax.Array) -> jax.Array:
  # A float32 sum over blocks, whatever the compute dtype.
  return jnp.matmul(x_QD.T, y_QF, preferred_element_type=jnp.float32)


def _sum_over_k(rows: jax.Array, row_SK: jax.Array, weights_SK: jax.Array | None = None):
  """Adds the K rows of each token, [S, D], weighted if weights are given."""
  total = jnp.zeros((), rows.dtype)
  for k in range(row_SK.shape[1]):
    row_SD = rows[row_SK[:, k]]
    total = total + (row_SD if weights_SK is None else row_SD * weights_SK[:, k, None])
  return total
