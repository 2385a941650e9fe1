"""Causal attention within segments: the plain form, and kernels that never store [T, T] logits.

All compute `softmax(scale query key^T) value` over the positions that a position sees: itself and
what precedes it in its segment. On a mesh the kernels run under a `shard_map`, on each device its
sequences and its heads; nothing travels. The plain form is left to the partitioner.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, PartitionSpec

from engram_jax.core.mesh import BATCH_AXES, platform

_MASKED = -1e30  # finite: a row of it gives equal weights, not NaN
_LANES = 128  # of a TPU's vector unit: blocks of the sequence are multiples of it
_LARGEST_BLOCK = 512
_CUDNN_HEAD = 256  # the widest that cuDNN takes from Hopper on; older GPUs refuse above 128


def attend(
  kernel: str,
  query_BTHK: jax.Array,
  key_BTHK: jax.Array,
  value_BTHV: jax.Array,
  segments_BT: jax.Array,
  scale: float,
  mesh: Mesh | None = None,
) -> jax.Array:
  """[B, T, H, V] by the kernel that a config's `attention.kernel` names.

  "plain" is `attention`. "flash" is splash attention on TPU and cuDNN on GPU. "auto" is flash where
  the platform has such a kernel for these shapes, and plain elsewhere.

  Raises:
    ValueError: "flash" on a platform without a kernel, or for shapes or a dtype it does not take.
  """
  if kernel == "plain":
    return attention(query_BTHK, key_BTHK, value_BTHV, segments_BT, scale)
  where = platform(mesh)
  refusal = _refusal(where, query_BTHK, value_BTHV)
  if refusal is None:
    flash = functools.partial({"tpu": splash_attention, "gpu": cudnn_attention}[where], scale=scale)
    return _per_device(flash, mesh)(query_BTHK, key_BTHK, value_BTHV, segments_BT)
  if kernel == "flash":
    raise ValueError(f"model.attention.kernel='flash': {refusal}; 'auto' would take 'plain' here")
  return attention(query_BTHK, key_BTHK, value_BTHV, segments_BT, scale)


def attention(
  query_BTHK: jax.Array,
  key_BTHK: jax.Array,
  value_BTHV: jax.Array,
  segments_BT: jax.Array,
  scale: float,
) -> jax.Array:
  """Causal softmax attention within segments, [B, T, H, V]; logits and softmax in float32."""
  T = query_BTHK.shape[1]
  logits = jnp.einsum(
    "bthk,bshk->bhts", query_BTHK * scale, key_BTHK, preferred_element_type=jnp.float32
  )
  seen_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
  seen_BTS &= jnp.arange(T)[:, None] >= jnp.arange(T)
  weights = jax.nn.softmax(jnp.where(seen_BTS[:, None], logits, _MASKED), axis=-1)
  return jnp.einsum("bhts,bshv->bthv", weights.astype(value_BTHV.dtype), value_BTHV)


def splash_attention(
  query_BTHK: jax.Array,
  key_BTHK: jax.Array,
  value_BTHV: jax.Array,
  segments_BT: jax.Array,
  *,
  scale: float,
  interpret: bool = False,
) -> jax.Array:
  """`attention` by JAX's Pallas kernel for TPUs; T must be a multiple of 128.

  interpret: run the kernel's operations one by one, on any platform.
  """
  T, H = query_BTHK.shape[1:3]
  mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * H)
  kernel = splash.make_splash_mha_single_device(
    mask, block_sizes=_block_sizes(T), interpret=interpret
  )
  heads_first = lambda x_BTHK: x_BTHK.swapaxes(1, 2)
  segments = splash.SegmentIds(segments_BT, segments_BT)
  mixed_BHTV = jax.vmap(kernel)(
    *map(heads_first, (query_BTHK * scale, key_BTHK, value_BTHV)), segments
  )
  return heads_first(mixed_BHTV)


def cudnn_attention(
  query_BTHK: jax.Array,
  key_BTHK: jax.Array,
  value_BTHV: jax.Array,
  segments_BT: jax.Array,
  *,
  scale: float,
  implementation: str = "cudnn",
) -> jax.Array:
  """`attention` by cuDNN through `jax.nn`, in a 16-bit dtype.

  Its interface wants values as wide as keys, so they are padded with zeros; segments enter as a
  mask [B, 1, T, T], which is the one quadratic array that remains.
  """
  value_width = value_BTHV.shape[-1]
  pad = query_BTHK.shape[-1] - value_width
  same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
  mixed_BTHK = jax.nn.dot_product_attention(
    query_BTHK,
    key_BTHK,
    jnp.pad(value_BTHV, ((0, 0),) * 3 + ((0, pad),)),
    mask=same_BTS[:, None],
    scale=scale,
    is_causal=True,
    implementation=implementation,
  )
  return mixed_BTHK[..., :value_width]


def _per_device(flash: Callable[..., jax.Array], mesh: Mesh | None) -> Callable[..., jax.Array]:
  if mesh is None or mesh.size == 1:
    return flash
  batch = PartitionSpec(BATCH_AXES)
  heads = PartitionSpec(BATCH_AXES, None, "tensor")
  return jax.shard_map(
    flash, mesh=mesh, in_specs=(heads, heads, heads, batch), out_specs=heads, check_vma=False
  )


def _refusal(where: str, query_BTHK: jax.Array, value_BTHV: jax.Array) -> str | None:
  """Why there is no kernel for these arrays; None where there is one."""
  T, width, dtype = query_BTHK.shape[1], query_BTHK.shape[-1], query_BTHK.dtype
  if where == "tpu":
    fits = T % _LANES == 0
    return None if fits else f"splash attention takes a multiple of {_LANES} positions, not {T}"
  if where != "gpu":
    return f"there is no flash kernel for {where}"
  if dtype.itemsize != 2:
    return f"cuDNN takes 16-bit numbers, not {dtype}"
  fits = T % 2 == 0 and width % 8 == 0 and width >= value_BTHV.shape[-1] and width <= _CUDNN_HEAD
  return (
    None
    if fits
    else (
      f"cuDNN takes an even number of positions, not {T}, and query heads of a multiple of 8 up to "
      f"{_CUDNN_HEAD}, no narrower than the value's {value_BTHV.shape[-1]}, not {width}"
    )
  )


def _block_sizes(T: int) -> splash.BlockSizes:
  block = next(b for b in range(_LARGEST_BLOCK, 0, -_LANES) if T % b == 0)
  names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
  return splash.BlockSizes(**{f"block_{name}": block for name in names})
