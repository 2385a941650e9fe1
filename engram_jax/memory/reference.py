"""The Engram module written as the paper's equations read, for tests of the fast one."""

import jax
import jax.numpy as jnp

from engram_jax.memory.engram import Engram


def engram_reference(
  engram: Engram,
  hidden_BTGD: jax.Array,
  rows_BTM: jax.Array,
  segments_BT: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Computes `engram(hidden_BTGD, rows_BTM, segments_BT)`, one equation a line.

  Everything in the dtype of the inputs (arXiv 2601.07372, equations 3 to 6).
  """
  cfg = engram.cfg
  value_BTD = rows_BTM
  if cfg.projections:
    value_BTD = jnp.einsum("btm,md->btd", rows_BTM, engram.w_value[...])
  if cfg.bias:
    value_BTD = value_BTD + engram.b_value[...]
  alpha_BTG = _alpha(engram, hidden_BTGD, rows_BTM)
  u_BTGD = alpha_BTG[..., None] * value_BTD[:, :, None]
  if cfg.conv_kernel == 0:
    return u_BTGD, {"gate": alpha_BTG}
  normed_BTGD = _rms_norm(u_BTGD, engram.g_conv[...], cfg.conv_norm_eps)
  y_BTGD = jnp.zeros_like(u_BTGD)
  for j in range(cfg.conv_kernel):
    past_T = jnp.arange(u_BTGD.shape[1]) - (cfg.conv_kernel - 1 - j) * cfg.max_ngram
    exists_BT = (past_T >= 0)[None]
    if segments_BT is not None and cfg.reset_at_documents:
      exists_BT &= segments_BT[:, past_T] == segments_BT
    y_BTGD += engram.w_conv[...][j] * normed_BTGD[:, past_T] * exists_BT[..., None, None]
  return jax.nn.silu(y_BTGD) + u_BTGD, {"gate": alpha_BTG}


def _alpha(engram: Engram, hidden_BTGD: jax.Array, rows_BTM: jax.Array) -> jax.Array:
  cfg = engram.cfg
  if cfg.gate == "none":
    return jnp.ones(hidden_BTGD.shape[:3], hidden_BTGD.dtype)
  key_BTGD = jnp.einsum("btm,mgd->btgd", rows_BTM, engram.w_key[...])
  if cfg.bias:
    key_BTGD = key_BTGD + engram.b_key[...]
  query_BTGD = _rms_norm(hidden_BTGD, engram.g_query[...], cfg.norm_eps)
  key_BTGD = _rms_norm(key_BTGD, engram.g_key[...], cfg.norm_eps)
  s_BTG = jnp.sum(query_BTGD * key_BTGD, -1) / engram.width**0.5
  if cfg.gate == "signed_sqrt":
    s_BTG = jnp.sign(s_BTG) * jnp.sqrt(jnp.maximum(jnp.abs(s_BTG), 1e-6))
  return jax.nn.sigmoid(s_BTG)


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
  return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + eps) * weight
