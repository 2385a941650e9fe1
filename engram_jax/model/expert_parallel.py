"""Experts over a mesh: each device's own tokens through experts that other devices may hold.

A `shard_map` over all axes. Tokens stay on the device of their sequence, equal along `tensor`.
Communication: over `fsdp` an all-gather of the weights in the compute dtype (a reduce-scatter of
their gradients); over `expert` an all-to-all of token rows to the experts' owners and one back;
over `tensor` a sum of the parts that each slice of the hidden width contributes.

Buffers of the all-to-all hold CAPACITY times the mean number of assignments a pair of devices
exchanges. Assignments beyond that are not dropped: if any device has some, all devices gather the
tokens of their expert group, compute the assignments that overflowed, and reduce-scatter the sums.

Local letters: E, experts; K, experts per token; F, expert width; n, devices along `expert`; and of
one device e = E / n experts, s tokens, N = s K assignments, b and t examples and positions, c slots
in each of n buckets, S = n c slots.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from engram_jax.config import MoEConfig
from engram_jax.core.mesh import AXES, BATCH_AXES
from engram_jax.model.expert_dispatch import Experts, experts_for, sort_by_expert
from engram_jax.model.router import expert_counts, expert_load, route

# Over the mean. Balanced routers keep the shares of whole groups of experts closer to the mean than
# single experts' shares; one half more leaves the exact path to the first steps of a run.
CAPACITY = 1.5

Weights = tuple[jax.Array, jax.Array, jax.Array]  # gate and up [E, D, F], down [E, F, D]


def routed_experts(
  cfg: MoEConfig,
  x_BTD: jax.Array,
  w_router_DE: jax.Array,
  bias_E: jax.Array,
  weights: Weights,
  specs: tuple[PartitionSpec, ...],
  mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
  """Computes routed experts as `MoE` does on one device, and each expert's load, on a mesh.

  Args:
    x_BTD: B divides by the batch's mesh axes.
    weights: in the compute dtype, E over `expert` and F over `tensor`.
    specs: sharding of each of the weights; `fsdp` may divide any axis.

  Returns:
    (y_BTD, load_E): the load is float32, the share of all devices' assignments.
  """
  experts = experts_for(cfg.dispatch, mesh)
  batch = PartitionSpec(BATCH_AXES)

  def local(x_btD, w_router_DE, bias_E, weights):
    x_sD = x_btD.reshape(-1, x_btD.shape[-1])
    with jax.named_scope("router"):
      routing = route(x_sD, w_router_DE, bias_E, cfg.top_k, cfg.route_scale)
      load_E = lax.pmean(expert_load(routing[0], cfg.routed_experts), BATCH_AXES)
    with jax.named_scope("routed_experts"):
      weights = tuple(_gather_fsdp(w, spec) for w, spec in zip(weights, specs, strict=True))
      compute = experts if mesh.shape["expert"] == 1 else functools.partial(_exchange, experts)
      y_sD = lax.psum(compute(x_sD, *routing, *weights), "tensor")
    return y_sD.reshape(x_btD.shape), load_E

  # Loops with hand-written backward passes have no replication rules, hence check_vma=False.
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(batch, PartitionSpec(), PartitionSpec(), specs),
    out_specs=(batch, PartitionSpec()),
    check_vma=False,
  )(x_BTD, w_router_DE, bias_E, weights)


def _gather_fsdp(w: jax.Array, spec: PartitionSpec) -> jax.Array:
  for axis, names in enumerate(spec):
    if names == "fsdp" or (isinstance(names, tuple) and "fsdp" in names):
      return lax.all_gather(w, "fsdp", axis=axis, tiled=True)
  return w


class _Slots(NamedTuple):
  """Slots of a device's assignments in buckets, one per owner of experts.

  Numbers at and above S mean that a bucket was full; at and above N that a slot is empty.
  """

  slot_N: jax.Array  # int32: the slot of an assignment
  assignment_S: jax.Array  # int32: the assignment in a slot
  expert_S: jax.Array  # int32: the expert of the owner's e that is requested; e if none


def capacity(tokens: int, top_k: int, experts: int, devices: int) -> int:
  """c, slots per bucket for that many tokens a device; never more than could be used."""
  mean = tokens * top_k / devices
  most = tokens * min(top_k, experts // devices)
  return min(-(-int(CAPACITY * mean + 1) // 8) * 8, most)


def _exchange(experts_fn: Experts, x_sD, experts_sK, weights_sK, *weights_e: jax.Array):
  """Computes the experts of `expert_dispatch` where this device holds e of E of them."""
  n, e = lax.axis_size("expert"), weights_e[0].shape[0]
  s, K = experts_sK.shape
  c = capacity(s, K, n * e, n)
  slots = _bucket(experts_sK, n, e, c)

  x_ND = jnp.repeat(x_sD, K, axis=0)
  sent_SD = _take(x_ND, slots.assignment_S)
  swap = functools.partial(lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0)
  received_SD, ids_S = (swap(a, tiled=True) for a in (sent_SD, slots.expert_S))
  y_SD = swap(_grouped(experts_fn, received_SD, ids_S, weights_e), tiled=True)
  y_sKD = _take(y_SD, slots.slot_N).reshape(s, K, -1)
  y_sD = jnp.einsum("skd,sk->sd", y_sKD, weights_sK).astype(x_sD.dtype)
  if c == s * min(K, e):
    return y_sD

  over_sK = (slots.slot_N >= n * c).reshape(s, K)
  # The same answer on every device: collectives wait in both branches.
  any_over = lax.pmax(jnp.any(over_sK).astype(jnp.int32), AXES) > 0
  overflow = jax.checkpoint(functools.partial(_overflow, experts_fn))
  extra_sD = lax.cond(
    any_over,
    overflow,
    lambda x_sD, *_: jnp.zeros_like(x_sD),
    x_sD,
    jnp.where(over_sK, experts_sK, n * e),
    weights_sK,
    weights_e,
  )
  return y_sD + extra_sD


def _bucket(experts_sK: jax.Array, n: int, e: int, c: int) -> _Slots:
  N = experts_sK.size
  order_N, expert_N = sort_by_expert(experts_sK, n * e)  # an owner's experts are neighbours
  owner_N = expert_N // e
  counts_n = expert_counts(owner_N, n)
  slot_in_bucket_N = jnp.arange(N, dtype=jnp.int32) - (jnp.cumsum(counts_n) - counts_n)[owner_N]
  # Numbers past the end differ from one another, so that "unique" stays true of them.
  slot_N = jnp.where(
    slot_in_bucket_N < c, owner_N * c + slot_in_bucket_N, n * c + jnp.arange(N, dtype=jnp.int32)
  )
  empty_S = N + jnp.arange(n * c, dtype=jnp.int32)
  put = lambda into, index, values: into.at[index].set(values, mode="drop", unique_indices=True)
  return _Slots(
    slot_N=put(jnp.zeros(N, jnp.int32), order_N, slot_N),
    assignment_S=put(empty_S, slot_N, order_N),
    expert_S=put(jnp.full(n * c, e, jnp.int32), slot_N, expert_N % e),
  )


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
  """Gathers rows by distinct numbers; zeros for numbers past the end."""
  return rows.at[index].get(mode="fill", fill_value=0, unique_indices=True)


def _grouped(experts_fn: Experts, x_ND, ids_N, weights_e) -> jax.Array:
  """Runs each row through its expert; rows of no expert (e) are zeros and give anything."""
  return experts_fn(x_ND, ids_N[:, None], jnp.ones((len(ids_N), 1), x_ND.dtype), *weights_e)


def _overflow(experts_fn: Experts, x_sD, experts_sK, weights_sK, weights_e) -> jax.Array:
  """The exact path: this device's experts over the overflowed assignments of its whole group.

  One device's tokens at a time, computed again in the backward pass, so that it needs little more
  memory than the tokens of the group.
  """
  e, K = weights_e[0].shape[0], experts_sK.shape[1]
  first = lax.axis_index("expert") * e

  @jax.checkpoint
  def from_device(x_sD, experts_sK, weights_sK):
    ids_sK = experts_sK - first
    is_local_N1 = ((ids_sK >= 0) & (ids_sK < e)).reshape(-1, 1)
    ids_N = jnp.where(is_local_N1[:, 0], ids_sK.reshape(-1), e)
    x_ND = jnp.where(is_local_N1, jnp.repeat(x_sD, K, axis=0), 0)
    y_ND = jnp.where(is_local_N1, _grouped(experts_fn, x_ND, ids_N, weights_e), 0)
    y_sKD = y_ND.reshape(*experts_sK.shape, -1)
    return jnp.einsum("skd,sk->sd", y_sKD, weights_sK).astype(x_sD.dtype)

  group = tuple(lax.all_gather(a, "expert") for a in (x_sD, experts_sK, weights_sK))
  y_nsD = lax.map(lambda tokens: from_device(*tokens), group)
  return lax.psum_scatter(y_nsD, "expert", scatter_dimension=0, tiled=False)
