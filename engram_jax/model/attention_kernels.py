"""Causal attention within segments: the plain form, and kernels that never store [T, T] logits.

All compute `softmax(scale query key^T) value` over the positions that a position sees: itself and
what precedes it in its segment. On a mesh the kernels run under a `shard_map`, on each device its
sequences and its heads, without communication. The plain form is left to the partitioner.

Local letters: H, heads; S, key positions, equal to T here; k and v, widths of a head's query and
key and of its value.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, PartitionSpec

from engram_jax.core.mesh import BATCH_AXES, compute_capability, platform

_MASKED = -1e30  # finite: a row of it gives equal weights, not NaN
_LANES = 128  # of a TPU's vector unit: blocks of the sequence are multiples of it
_LARGEST_BLOCK = 512
_CUDNN_CAPABILITY = 8.0  # the least compute capability that cuDNN's kernels take


def attend(
  kernel: str,
  query_BTHk: jax.Array,
  key_BTHk: jax.Array,
  value_BTHv: jax.Array,
  segments_BT: jax.Array,
  scale: float,
  mesh: Mesh | None = None,
) -> jax.Array:
  """Computes attention [B, T, H, v] by the kernel that a config's `attention.kernel` names.

  "plain" is `attention`. "flash" is splash attention on TPU and cuDNN on GPU. "auto" is flash where
  the platform has such a kernel for these shapes, and plain elsewhere.

  Raises:
    ValueError: "flash" on a platform without a kernel, or for shapes or a dtype it does not take.
  """
  if kernel == "plain":
    return attention(query_BTHk, key_BTHk, value_BTHv, segments_BT, scale)
  platform_name = platform(mesh)
  refusal = _refusal(platform_name, compute_capability(mesh), query_BTHk, value_BTHv)
  if refusal is None:
    flash = functools.partial(
      {"tpu": splash_attention, "gpu": cudnn_attention}[platform_name], scale=scale
    )
    return _per_device(flash, mesh)(query_BTHk, key_BTHk, value_BTHv, segments_BT)
  if kernel == "flash":
    raise ValueError(f"model.attention.kernel='flash': {refusal}; 'auto' would take 'plain' here")
  return attention(query_BTHk, key_BTHk, value_BTHv, segments_BT, scale)


def attention(
  query_BTHk: jax.Array,
  key_BTHk: jax.Array,
  value_BTHv: jax.Array,
  segments_BT: jax.Array,
  scale: float,
) -> jax.Array:
  """Causal softmax attention within segments, [B, T, H, v]; logits and softmax in float32."""
  T = query_BTHk.shape[1]
  logits = jnp.einsum(
    "bthk,bshk->bhts", query_BTHk * scale, key_BTHk, preferred_element_type=jnp.float32
  )
  seen_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
  seen_BTS &= jnp.arange(T)[:, None] >= jnp.arange(T)
  weights = jax.nn.softmax(jnp.where(seen_BTS[:, None], logits, _MASKED), axis=-1)
  return jnp.einsum("bhts,bshv->bthv", weights.astype(value_BTHv.dtype), value_BTHv)


def splash_attention(
  query_BTHk: jax.Array,
  key_BTHk: jax.Array,
  value_BTHv: jax.Array,
  segments_BT: jax.Array,
  *,
  scale: float,
  interpret: bool = False,
) -> jax.Array:
  """Computes `attention` by JAX's Pallas kernel for TPUs; T must be a multiple of 128.

  interpret: run the kernel's operations one by one, on any platform.
  """
  T, H = query_BTHk.shape[1:3]
  mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * H)
  kernel = splash.make_splash_mha_single_device(
    mask, block_sizes=_block_sizes(T), interpret=interpret
  )
  heads_first = lambda x_BTHk: x_BTHk.swapaxes(1, 2)
  segments = splash.SegmentIds(segments_BT, segments_BT)
  mixed_BHTv = jax.vmap(kernel)(
    *map(heads_first, (query_BTHk * scale, key_BTHk, value_BTHv)), segments
  )
  return heads_first(mixed_BHTv)


def cudnn_attention(
  query_BTHk: jax.Array,
  key_BTHk: jax.Array,
  value_BTHv: jax.Array,
  segments_BT: jax.Array,
  *,
  scale: float,
  implementation: Literal["xla", "cudnn"] = "cudnn",
) -> jax.Array:
  """Computes `attention` by cuDNN through `jax.nn`, in a 16-bit dtype.

  Its interface wants values as wide as keys, so they are padded with zeros; segments enter as a
  mask [B, 1, T, T], which is the one quadratic array that remains.
  """
  value_width = value_BTHv.shape[-1]
  pad = query_BTHk.shape[-1] - value_width
  same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
  mixed_BTHk = jax.nn.dot_product_attention(
    query_BTHk,
    key_BTHk,
    jnp.pad(value_BTHv, ((0, 0),) * 3 + ((0, pad),)),
    mask=same_BTS[:, None],
    scale=scale,
    is_causal=True,
    implementation=implementation,
  )
  return mixed_BTHk[..., :value_width]


def _per_device(flash: Callable[..., jax.Array], mesh: Mesh | None) -> Callable[..., jax.Array]:
  if mesh is None or mesh.size == 1:
    return flash
  batch = PartitionSpec(BATCH_AXES)
  heads = PartitionSpec(BATCH_AXES, None, "tensor")
  return jax.shard_map(
    flash, mesh=mesh, in_specs=(heads, heads, heads, batch), out_specs=heads, check_vma=False
  )


def _refusal(
  platform_name: str, capability: float | None, query_BTHk: jax.Array, value_BTHv: jax.Array
) -> str | None:
  """The reason why there is no kernel for these arrays; None where there is one.

  capability: compute capability of an NVIDIA GPU, None of another device.
  """
  T, width, dtype = query_BTHk.shape[1], query_BTHk.shape[-1], query_BTHk.dtype
  if platform_name == "tpu":
    fits = T % _LANES == 0
    return None if fits else f"splash attention takes a multiple of {_LANES} positions, not {T}"
  if platform_name != "gpu":
    return f"there is no flash kernel for {platform_name}"
  if capability is None or capability < _CUDNN_CAPABILITY:
    has = "another maker's GPU" if capability is None else f"one of {capability}"
    return f"cuDNN takes NVIDIA GPUs of compute capability {_CUDNN_CAPABILITY} and later, not {has}"
  if dtype.itemsize != 2:
    return f"cuDNN takes 16-bit numbers, not {dtype}"
  # Wider heads are Hopper's alone: its predecessors have none, and Blackwell no backward pass.
  widest = 256 if 9 <= capability < 10 else 128
  if T % 2 == 0 and width % 8 == 0 and value_BTHv.shape[-1] <= width <= widest:
    return None
  return (
    f"cuDNN takes an even number of positions, not {T}, and on GPUs of compute capability "
    f"{capability} query heads of a multiple of 8 up to {widest}, no narrower than the value's "
    f"{value_BTHv.shape[-1]}, not {width}"
  )


def _block_sizes(T: int) -> splash.BlockSizes:
  block = next(b for b in range(_LARGEST_BLOCK, 0, -_LANES) if T % b == 0)
  names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
  sizes: dict[str, Any] = {f"block_{name}": block for name in names}
  return splash.BlockSizes(**sizes)
