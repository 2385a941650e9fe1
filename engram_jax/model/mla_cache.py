"""Latent attention over a cache, in the absorbed form (arXiv 2405.04434, section 2.1.2).

    q_nope . (latent W_key_up) = (q_nope W_key_up^T) . latent
    sum_s a_s (latent_s W_value_up) = (sum_s a_s latent_s) W_value_up

so keys and values of past positions are never made: heads attend over the latents themselves, and
a cached token is L + r numbers whatever the number of heads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.config import AttentionConfig
from engram_jax.model.mla import LatentAttention


class LatentCache(NamedTuple):
  """One layer's, in the compute dtype; S positions, of which each request has filled the first."""

  latent_BSL: jax.Array
  key_rope_BSR: jax.Array


def empty_cache(cfg: AttentionConfig, batch: int, capacity: int, dtype: jax.Array) -> LatentCache:
  """Room for `capacity` positions a request."""
  return LatentCache(
    jnp.zeros((batch, capacity, cfg.latent), dtype),
    jnp.zeros((batch, capacity, cfg.rope_dim), dtype),
  )


def attend_cached(
  module: LatentAttention, x_BTD: jax.Array, places_BT: jax.Array, cache: LatentCache
) -> tuple[jax.Array, LatentCache]:
  """`LatentAttention.__call__` of T new positions, and the cache with them.

  Args:
    places_BT: int32 position of each new token in its request; S (outside) on padding, which is
      not written and whose output is to be ignored.
  """
  query_BTHK = module.queries(x_BTD, places_BT)
  cache = _write(cache, *module.latents(x_BTD, places_BT), places_BT)
  nope_BTHN, rope_BTHR = jnp.split(query_BTHK, [module.cfg.nope_dim], axis=-1)
  with jax.named_scope("absorbed_attention"):
    query_BTHL = jnp.einsum("bthn,lhn->bthl", nope_BTHN, module.w_key_up.astype(x_BTD.dtype))
    logits_BHTS = _dot("bthl,bsl->bhts", query_BTHL, cache.latent_BSL)
    logits_BHTS += _dot("bthr,bsr->bhts", rope_BTHR, cache.key_rope_BSR)
    seen_BTS = jnp.arange(cache.latent_BSL.shape[1]) <= places_BT[:, :, None]
    logits_BHTS = jnp.where(seen_BTS[:, None], logits_BHTS * module.scale, -jnp.inf)
    weights_BHTS = jax.nn.softmax(logits_BHTS, axis=-1).astype(x_BTD.dtype)
    mixed_BTHL = jnp.einsum("bhts,bsl->bthl", weights_BHTS, cache.latent_BSL)
    mixed_BTHV = jnp.einsum("bthl,lhv->bthv", mixed_BTHL, module.w_value_up.astype(x_BTD.dtype))
  return jnp.einsum("bthv,hvd->btd", mixed_BTHV, module.w_out.astype(x_BTD.dtype)), cache


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _write(cache: LatentCache, latent_BTL, key_rope_BTR, places_BT) -> LatentCache:
  each_B1 = jnp.arange(places_BT.shape[0])[:, None]
  put = lambda old, new: old.at[each_B1, places_BT].set(new.astype(old.dtype), mode="drop")
  return LatentCache(put(cache.latent_BSL, latent_BTL), put(cache.key_rope_BSR, key_rope_BTR))
