"""What a decoder remembers of each request: a pytree that nothing changes in place.

Keeping an old state is a snapshot. Positions after `length_B` are never read, so a state with a
smaller length is the past one: going back is choosing a length, the n-grams and the convolution's
columns of that position, and no cache is copied.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.config import ModelConfig
from engram_jax.core.mesh import compute_dtype, platform
from engram_jax.memory.engram import ConvCache
from engram_jax.memory.hashing import HashLayout
from engram_jax.model.mla import LatentCache, empty_cache


class DecodeState(NamedTuple):
  """length_B: int32 tokens held. caches: one LatentCache a block. history_BH: the last N-1
  canonical ids, newest last, the pad id before the start ([B, 0] without a memory). columns: one
  `ConvCache` a memory."""

  length_B: jax.Array
  caches: tuple[LatentCache, ...]
  history_BH: jax.Array
  columns: tuple[ConvCache, ...]

  @property
  def capacity(self) -> int:
    """S: positions that a request can hold."""
    return self.caches[0].latent_BSL.shape[1]


class Trail(NamedTuple):
  """What `rewind` needs to leave a state after any of the T tokens that were just added.

  length_B: tokens held before them. history_BX: [B, H+T]. columns: [B, P+T, ...]."""

  length_B: jax.Array
  history_BX: jax.Array
  columns: tuple[ConvCache, ...]


def empty_state(
  cfg: ModelConfig, layout: HashLayout | None, batch: int, capacity: int
) -> DecodeState:
  """`batch` requests that hold nothing, with room for `capacity` tokens each."""
  dtype = compute_dtype(cfg.dtype, platform(None))
  H, pad = (layout.max_ngram - 1, layout.pad_id) if layout else (0, 0)
  one_memory = lambda: ConvCache.empty(cfg.engram, batch, cfg.residual.branches, cfg.width)
  return DecodeState(
    length_B=jnp.zeros(batch, jnp.int32),
    caches=tuple(empty_cache(cfg.attention, batch, capacity, dtype) for _ in range(cfg.layers)),
    history_BH=jnp.full((batch, H), pad, jnp.int32),
    columns=tuple(one_memory() for _ in cfg.engram.layers),
  )


def rewind(state: DecodeState, trail: Trail, count_B: jax.Array) -> DecodeState:
  """The state that holds the first `count_B` of the tokens just added; jittable.

  state: what `extend` returned with the trail. count_B: int32 [B] in [0, T].
  """
  H = state.history_BH.shape[1]
  columns = tuple(
    ConvCache(*(window(wide, count_B, past.shape[1]) for wide, past in zip(t, s, strict=True)))
    for t, s in zip(trail.columns, state.columns, strict=True)
  )
  return DecodeState(
    length_B=trail.length_B + count_B,
    caches=state.caches,
    history_BH=window(trail.history_BX, count_B, H),
    columns=columns,
  )


def insert(state: DecodeState, slot: jax.Array, one: DecodeState) -> DecodeState:
  """`state` with request `slot` replaced by the single request of `one`, of the same capacity."""
  return jax.tree.map(lambda many, single: many.at[slot].set(single[0]), state, one)


def window(x_BX: jax.Array, start_B: jax.Array, size: int) -> jax.Array:
  """`size` columns of each row from `start_B` on, which must be there."""
  index = start_B[:, None] + jnp.arange(size)
  return jnp.take_along_axis(x_BX, index.reshape(*index.shape, *[1] * (x_BX.ndim - 2)), axis=1)
