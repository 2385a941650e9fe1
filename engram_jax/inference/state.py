"""The state that a decoder holds of its requests: a pytree that nothing changes in place.

Keeping an old state is a snapshot. Positions from `length_B` on are never read, so a state with a
smaller length is the past one: a rollback chooses a length, and the n-grams and the convolution's
inputs of that position, and copies no latent cache.

Local letters: H, canonical ids of history (N-1 for n-grams of order up to N); X, H + T of them;
S, positions that a request can hold; L, latent width; P, positions that the convolution reads
before the first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.config import ModelConfig
from engram_jax.core.mesh import compute_dtype, platform
from engram_jax.memory.engram import ConvCache
from engram_jax.memory.hash_layout import HashLayout
from engram_jax.model.mla import LatentCache, empty_cache


class DecodeState(NamedTuple):
  """The tokens that B requests hold, as the model remembers them.

  length_B: int32 tokens held. latent_caches: one LatentCache a block, [B, S, ...]. history_BH:
  int32, the last H canonical ids, newest last, the pad id before the start ([B, 0] without a
  memory). conv_caches: one `ConvCache` a memory, [B, P, ...].
  """

  length_B: jax.Array
  latent_caches: tuple[LatentCache, ...]
  history_BH: jax.Array
  conv_caches: tuple[ConvCache, ...]

  @property
  def capacity(self) -> int:
    """S, positions that a request can hold."""
    return self.latent_caches[0].latent_BSL.shape[1]


class RollbackInfo(NamedTuple):
  """Everything that `rollback` needs to reach the state after any of the T tokens just added.

  length_B: int32 tokens held before them. history_BX: int32, canonical ids before and among them.
  conv_inputs: one `ConvCache` a memory, [B, P+T, ...].
  """

  length_B: jax.Array
  history_BX: jax.Array
  conv_inputs: tuple[ConvCache, ...]


def empty_state(
  cfg: ModelConfig, layout: HashLayout | None, batch: int, capacity: int
) -> DecodeState:
  """The state of `batch` requests that hold nothing, with room for `capacity` tokens each."""
  dtype = compute_dtype(cfg.dtype, platform(None))
  H, pad = (layout.max_ngram - 1, layout.pad_id) if layout else (0, 0)
  return DecodeState(
    length_B=jnp.zeros(batch, jnp.int32),
    latent_caches=tuple(
      empty_cache(cfg.attention, batch, capacity, dtype) for _ in range(cfg.layers)
    ),
    history_BH=jnp.full((batch, H), pad, jnp.int32),
    conv_caches=tuple(
      ConvCache.empty(cfg.engram, batch, cfg.residual.branches, cfg.width)
      for _ in cfg.engram.layers
    ),
  )


def rollback(state: DecodeState, info: RollbackInfo, count_B: jax.Array) -> DecodeState:
  """The state that holds the first `count_B` of the tokens just added; jittable.

  state: as `StagedModel.run` returned it with `info`. count_B: int32 in [0, T].
  """
  return DecodeState(
    length_B=info.length_B + count_B,
    latent_caches=state.latent_caches,
    history_BH=slice_each(info.history_BX, count_B, state.history_BH.shape[1]),
    conv_caches=tuple(
      slice_conv_cache(inputs, count_B, cache)
      for inputs, cache in zip(info.conv_inputs, state.conv_caches, strict=True)
    ),
  )


def insert(state: DecodeState, slot: jax.Array, request: DecodeState) -> DecodeState:
  """`state` with request `slot` replaced by the only one of `request`, of the same capacity."""
  return jax.tree.map(lambda x, y: x.at[slot].set(y[0]), state, request)


def slice_each(x_BX: jax.Array, start_B: jax.Array, size: int) -> jax.Array:
  """[B, size, ...], the positions of each request from `start_B` on, which must exist."""
  index = start_B[:, None] + jnp.arange(size)
  return jnp.take_along_axis(x_BX, index.reshape(*index.shape, *[1] * (x_BX.ndim - 2)), axis=1)


def slice_conv_cache(inputs: ConvCache, start_B: jax.Array, like: ConvCache) -> ConvCache:
  """A cache as long as `like`, cut from longer `inputs` at each request's `start_B`."""
  return ConvCache(*(slice_each(x, start_B, y.shape[1]) for x, y in zip(inputs, like, strict=True)))
