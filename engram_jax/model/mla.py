"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values of all heads are up-projected from one normalised latent a token, and all heads
share one rotary key, so that a decoder need store only latent + rope_dim numbers a token.

Local letters: H, heads; L, latent; Q, query latent; S, positions of a cache; n, r and v, widths of
a head's unrotated part, its rotary part and its value; k = n + r.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from engram_jax.config import AttentionConfig
from engram_jax.model.attention_kernels import attend
from engram_jax.model.layers import frequencies, logit_factor, rms_norm, rotate


class LatentAttention(nnx.Module):
  """The attention of one block. Parameters, float32:

  w_query [D, H, n+r], or with a query latent w_query_down [D, Q], g_query [Q] and w_query_up
  [Q, H, n+r]; w_latent [D, L], g_latent [L], w_key_rope [D, r]; w_key_up [L, H, n], w_value_up
  [L, H, v]; w_out [H, v, D].
  """

  def __init__(self, cfg: AttentionConfig, width: int, std: float, eps: float, *, rngs: nnx.Rngs):
    self.cfg, self.eps = cfg, eps
    H, L, Q, D = cfg.heads, cfg.latent, cfg.query_latent, width
    head = cfg.nope_dim + cfg.rope_dim
    param = lambda *shape: nnx.Param(std * jax.random.normal(rngs.params(), shape))
    if Q:
      self.w_query_down = param(D, Q)
      self.g_query = nnx.Param(jnp.ones(Q))
      self.w_query_up = param(Q, H, head)
    else:
      self.w_query = param(D, H, head)
    self.w_latent = param(D, L)
    self.g_latent = nnx.Param(jnp.ones(L))
    self.w_key_rope = param(D, cfg.rope_dim)
    self.w_key_up = param(L, H, cfg.nope_dim)
    self.w_value_up = param(L, H, cfg.value_dim)
    self.w_out = param(H, cfg.value_dim, D)

  def __call__(
    self,
    x_BTD: jax.Array,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    mesh: Mesh | None = None,
  ) -> jax.Array:
    """Attends, [B, T, D] in the dtype of x, to each position and those before it in its segment."""
    query_BTHk = self.queries(x_BTD, positions_BT)
    latent_BTL, key_rope_BTr = self.latents(x_BTD, positions_BT)
    with jax.named_scope("up_projection"):
      key_BTHk = self.keys(latent_BTL, key_rope_BTr)
      value_BTHv = jnp.einsum("btl,lhv->bthv", latent_BTL, self.w_value_up.astype(x_BTD.dtype))
    with jax.named_scope("attention"):
      mixed_BTHv = attend(
        self.cfg.kernel, query_BTHk, key_BTHk, value_BTHv, segments_BT, self.scale, mesh
      )
    return jnp.einsum("bthv,hvd->btd", mixed_BTHv, self.w_out.astype(x_BTD.dtype))

  @property
  def scale(self) -> float:
    """Scale of the logits: 1 / sqrt(n + r), times YaRN's factor."""
    return logit_factor(self.cfg.yarn) / math.sqrt(self.cfg.nope_dim + self.cfg.rope_dim)

  @jax.named_scope("queries")
  def queries(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Queries [B, T, H, k], the last r of each rotated."""
    if self.cfg.query_latent:
      down = jnp.einsum("btd,dq->btq", x_BTD, self.w_query_down.astype(x_BTD.dtype))
      down = rms_norm(down, self.g_query[...], self.eps)
      query = jnp.einsum("btq,qhk->bthk", down, self.w_query_up.astype(x_BTD.dtype))
    else:
      query = jnp.einsum("btd,dhk->bthk", x_BTD, self.w_query.astype(x_BTD.dtype))
    nope, rope = jnp.split(query, [self.cfg.nope_dim], axis=-1)
    return jnp.concatenate([nope, self._rotate(rope, positions_BT)], axis=-1)

  @jax.named_scope("latents")
  def latents(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The part of each token that a cache stores: the normalised latent [B, T, L] and the rotated
    shared key [B, T, r]."""
    latent = jnp.einsum("btd,dl->btl", x_BTD, self.w_latent.astype(x_BTD.dtype))
    latent = rms_norm(latent, self.g_latent[...], self.eps)
    key = jnp.einsum("btd,dr->btr", x_BTD, self.w_key_rope.astype(x_BTD.dtype))
    return latent, self._rotate(key[:, :, None], positions_BT)[:, :, 0]

  def keys(self, latent_BTL: jax.Array, key_rope_BTr: jax.Array) -> jax.Array:
    """Keys [B, T, H, k]: each head's unrotated part beside the rotary part that all share."""
    nope_BTHn = jnp.einsum("btl,lhn->bthn", latent_BTL, self.w_key_up.astype(latent_BTL.dtype))
    B, T, H, _ = nope_BTHn.shape
    shared = jnp.broadcast_to(key_rope_BTr[:, :, None], (B, T, H, key_rope_BTr.shape[-1]))
    return jnp.concatenate([nope_BTHn, shared], axis=-1)

  def _rotate(self, x_BTHr: jax.Array, positions_BT: jax.Array) -> jax.Array:
    turns = frequencies(self.cfg.rope_dim, self.cfg.rope_base, self.cfg.yarn)
    return rotate(x_BTHr, positions_BT, turns)


class LatentCache(NamedTuple):
  """One layer's cache, in the compute dtype; each request has filled the first of S positions."""

  latent_BSL: jax.Array
  key_rope_BSr: jax.Array


def empty_cache(cfg: AttentionConfig, batch: int, capacity: int, dtype: Any) -> LatentCache:
  """A cache of zeros with room for `capacity` positions a request."""
  return LatentCache(
    jnp.zeros((batch, capacity, cfg.latent), dtype),
    jnp.zeros((batch, capacity, cfg.rope_dim), dtype),
  )


def attend_cached(
  module: LatentAttention, x_BTD: jax.Array, new_positions_BT: jax.Array, cache: LatentCache
) -> tuple[jax.Array, LatentCache]:
  """Returns `LatentAttention.__call__` of T new positions, and the cache with them.

  Args:
    new_positions_BT: int32 position of each new token in its request; S (outside) on padding, which
      is not written and whose output is to be ignored.
  """
  query_BTHk = module.queries(x_BTD, new_positions_BT)
  cache = _write(cache, *module.latents(x_BTD, new_positions_BT), new_positions_BT)
  nope_BTHn, rope_BTHr = jnp.split(query_BTHk, [module.cfg.nope_dim], axis=-1)
  with jax.named_scope("absorbed_attention"):
    query_BTHL = jnp.einsum("bthn,lhn->bthl", nope_BTHn, module.w_key_up.astype(x_BTD.dtype))
    logits_BHTS = _dot("bthl,bsl->bhts", query_BTHL, cache.latent_BSL)
    logits_BHTS += _dot("bthr,bsr->bhts", rope_BTHr, cache.key_rope_BSr)
    seen_BTS = jnp.arange(cache.latent_BSL.shape[1]) <= new_positions_BT[:, :, None]
    logits_BHTS = jnp.where(seen_BTS[:, None], logits_BHTS * module.scale, -jnp.inf)
    weights_BHTS = jax.nn.softmax(logits_BHTS, axis=-1).astype(x_BTD.dtype)
    mixed_BTHL = jnp.einsum("bhts,bsl->bthl", weights_BHTS, cache.latent_BSL)
    mixed_BTHv = jnp.einsum("bthl,lhv->bthv", mixed_BTHL, module.w_value_up.astype(x_BTD.dtype))
  return jnp.einsum("bthv,hvd->btd", mixed_BTHv, module.w_out.astype(x_BTD.dtype)), cache


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _write(cache: LatentCache, latent_BTL, key_rope_BTr, new_positions_BT) -> LatentCache:
  request_B1 = jnp.arange(new_positions_BT.shape[0])[:, None]
  put = lambda old, new: old.at[request_B1, new_positions_BT].set(
    new.astype(old.dtype), mode="drop"
  )
  return LatentCache(put(cache.latent_BSL, latent_BTL), put(cache.key_rope_BSr, key_rope_BTr))
