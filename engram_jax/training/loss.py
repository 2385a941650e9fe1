"""Cross-entropy of next tokens, without ever making the logits of a full batch.

Logits [B, T, V] are the largest array of a small model's step. Here only `chunk` tokens have logits
at once: a scan over time makes a chunk's logits, and while it has them also makes their gradient
and both products with it. So a training step has three matrix products per chunk, none of them
twice, and the backward pass only scales what the forward pass saved: d_hidden [B, T, D] and
d_head [D, V].

Local letters, inside a `shard_map`: b, t, d and v, sizes on one device.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from engram_jax.core.mesh import BATCH_AXES
from engram_jax.model.fsdp import all_gather_param
from engram_jax.model.params import param_shardings

Aux = dict[str, jax.Array]


def chunked_cross_entropy(
  hidden_BTD: jax.Array,
  head_DV: jax.Array,
  targets_BT: jax.Array,
  mask_BT: jax.Array,
  *,
  chunk: int,
  z_loss: float = 0.0,
) -> tuple[jax.Array, Aux]:
  """Sums the cross-entropy in nats over the tokens where `mask_BT` holds.

  Args:
    hidden_BTD: the state the head reads, any float dtype: the matrix products run in it and
      accumulate in float32.
    head_DV: output matrix, cast to the dtype of `hidden_BTD`.
    targets_BT: int ids in [0, V). A masked token's target is not looked at; an unmasked one at
      V or above gives NaN.
    mask_BT: bool; masked tokens add nothing and get a gradient of exactly zero.
    chunk: tokens whose logits exist at once. Chunks are slices of time, so a batch sharded over a
      mesh needs no communication; at least one time step of all B sequences is taken.
    z_loss: weight of logsumexp^2, which keeps the logits' scale bounded (PaLM, arXiv 2204.02311).

  Returns:
    The float32 sum (not the mean: micro-batches and devices add up before the division), and aux:
    "tokens" float32 number of unmasked tokens, "nll_sum" without and "z_sum" the z-loss part, and
    "nll_BT" float32 nats per token, zero where masked. Only the sum carries a gradient; aux has
    none. Where nothing is differentiated (evaluation) no gradient is computed.

  Raises:
    ValueError: `chunk` below one.
  """
  if chunk < 1:
    raise ValueError(f"chunk={chunk} must be at least 1 token")
  steps = max(1, chunk // hidden_BTD.shape[0])
  total, aux = _summed(
    min(steps, hidden_BTD.shape[1]), float(z_loss), hidden_BTD, head_DV, targets_BT, mask_BT
  )
  return total, jax.lax.stop_gradient(aux)


def cross_entropy_on(
  mesh: Mesh | None,
  hidden_BTD: jax.Array,
  head_DV: jax.Array,
  targets_BT: jax.Array,
  mask_BT: jax.Array,
  *,
  chunk: int,
  z_loss: float = 0.0,
) -> tuple[jax.Array, Aux]:
  """Computes `chunked_cross_entropy` on a mesh: each device its own tokens, with the full head.

  B is divided over the batch's axes and T over `tensor`; `chunk` counts one device's tokens. The
  communication, once and in the dtype of `hidden_BTD`, is an all-gather of the head's parts and a
  reduce-scatter of its gradient: left to the partitioner the gradient would be summed over devices
  for every chunk. Without a mesh it is `chunked_cross_entropy`.
  """
  if mesh is None:
    return chunked_cross_entropy(
      hidden_BTD, head_DV, targets_BT, mask_BT, chunk=chunk, z_loss=z_loss
    )

  stored = param_shardings({"head": head_DV}, mesh)["head"].spec

  def run(hidden_btD, head_dv, targets_bt, mask_bt):
    head_DV = all_gather_param(head_dv, stored)
    total, aux = chunked_cross_entropy(
      hidden_btD, head_DV, targets_bt, mask_bt, chunk=chunk, z_loss=z_loss
    )
    return total[None], {k: v if k == "nll_BT" else v[None] for k, v in aux.items()}

  tokens, each = PartitionSpec(BATCH_AXES, "tensor"), PartitionSpec(mesh.axis_names)
  aux = {"tokens": each, "nll_sum": each, "z_sum": each, "nll_BT": tokens}
  run = jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(tokens, stored, tokens, tokens),
    out_specs=(each, aux),
    check_vma=False,
  )
  totals, aux = run(hidden_BTD, head_DV.astype(hidden_BTD.dtype), targets_BT, mask_BT)
  return totals.sum(), {k: v if k == "nll_BT" else v.sum() for k, v in aux.items()}


def cross_entropy_reference(
  hidden_BTD: jax.Array,
  head_DV: jax.Array,
  targets_BT: jax.Array,
  mask_BT: jax.Array,
  *,
  chunk: int = 0,
  z_loss: float = 0.0,
) -> tuple[jax.Array, Aux]:
  """Sums the cross-entropy from all logits at once, by autodiff: the reference in tests.

  `chunk` is there for the signature and ignored.
  """
  del chunk
  logits_BTV = _logits(hidden_BTD, head_DV)
  lse_BT, nll_BT = _nll(logits_BTV, targets_BT, mask_BT)
  aux = _aux(nll_BT, z_loss * jnp.where(mask_BT, lse_BT, 0.0) ** 2, mask_BT)
  return aux["nll_sum"] + aux["z_sum"], aux


def _logits(hidden: jax.Array, head_DV: jax.Array) -> jax.Array:
  return jnp.matmul(hidden, head_DV.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _nll(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns logsumexp and negative log-likelihood [...] in nats; the latter zero where masked."""
  lse = jax.nn.logsumexp(logits, axis=-1)
  label = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return lse, jnp.where(mask, lse - label, 0.0)


def _aux(nll_BT: jax.Array, z_BT: jax.Array, mask_BT: jax.Array) -> Aux:
  return {
    "tokens": jnp.sum(mask_BT, dtype=jnp.float32),
    "nll_sum": jnp.sum(nll_BT),
    "z_sum": jnp.sum(z_BT),
    "nll_BT": nll_BT,
  }


def _cut(x_BT: jax.Array, steps: int) -> jax.Array:
  """Slices time, [B, T, ...] -> [T / steps, B, steps, ...], padded with zeros at the end."""
  batch, time = x_BT.shape[:2]
  chunks = -(-time // steps)
  padding = [(0, 0), (0, chunks * steps - time)] + [(0, 0)] * (x_BT.ndim - 2)
  cut = jnp.pad(x_BT, padding).reshape(batch, chunks, steps, *x_BT.shape[2:])
  return jnp.moveaxis(cut, 1, 0)


def _join(chunks: jax.Array, time: int) -> jax.Array:
  """The inverse of `_cut`: [n, B, steps, ...] -> [B, T, ...]."""
  joined = jnp.moveaxis(chunks, 0, 1)
  return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :time]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(steps, z_loss, hidden_BTD, head_DV, targets_BT, mask_BT):
  def body(_, inputs):
    hidden, targets, mask = inputs
    lse, nll = _nll(_logits(hidden, head_DV), targets, mask)
    return None, (nll, z_loss * jnp.where(mask, lse, 0.0) ** 2)

  chunks = tuple(_cut(x, steps) for x in (hidden_BTD, targets_BT, mask_BT))
  _, (nll, z) = jax.lax.scan(body, None, chunks)
  return _total(nll, z, mask_BT)


def _total(nll: jax.Array, z: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, Aux]:
  time = mask_BT.shape[1]
  aux = _aux(_join(nll, time), _join(z, time), mask_BT)
  return aux["nll_sum"] + aux["z_sum"], aux


def _forward(steps, z_loss, hidden_BTD, head_DV, targets_BT, mask_BT):
  head = head_DV.astype(hidden_BTD.dtype)

  def body(d_head_DV, inputs):
    hidden, targets, mask = inputs
    logits = _logits(hidden, head)
    lse, nll = _nll(logits, targets, mask)
    z = jnp.where(mask, lse, 0.0)
    # d(sum)/d(logits): (1 + 2 z lse) softmax - onehot, and nothing at all where masked.
    onehot = targets[..., None] == jnp.arange(head.shape[1])
    softmax = jnp.exp(logits - lse[..., None])
    d_logits = (1.0 + 2.0 * z_loss * z)[..., None] * softmax - onehot
    d_logits = jnp.where(mask[..., None], d_logits, 0.0).astype(hidden.dtype)
    d_hidden = jnp.matmul(d_logits, head.T, preferred_element_type=jnp.float32)
    d_head_DV += jnp.einsum("btd,btv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
    return d_head_DV, (nll, z_loss * z**2, d_hidden.astype(hidden.dtype))

  chunks = tuple(_cut(x, steps) for x in (hidden_BTD, targets_BT, mask_BT))
  d_head_DV = jnp.zeros(head.shape, jnp.float32)
  d_head_DV, (nll, z, d_hidden) = jax.lax.scan(body, d_head_DV, chunks)
  d_hidden_BTD = _join(d_hidden, hidden_BTD.shape[1])
  return _total(nll, z, mask_BT), (d_hidden_BTD, d_head_DV, jnp.zeros((), head_DV.dtype))


def _backward(steps, z_loss, residuals, cotangents):
  del steps, z_loss
  d_hidden_BTD, d_head_DV, head_like = residuals
  scale = cotangents[0]  # of the sum; aux is cut off from the gradient by its caller
  return (
    (scale * d_hidden_BTD).astype(d_hidden_BTD.dtype),
    (scale * d_head_DV).astype(head_like.dtype),
    None,
    None,
  )


_summed.defvjp(_forward, _backward)
