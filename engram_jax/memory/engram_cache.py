"""Engram for a decoder: the module on new positions only, given what its convolution saw before.

The convolution reads c_g value at t, t-N, ..., t-(W-1)N, where c_g is the norm's scale times the
gate. So a request's past is the last P = (W-1) N columns of two arrays, [P, G] and [P, D], and
nothing of width G D is kept.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from engram_jax.config import EngramConfig
from engram_jax.memory.engram import Engram, gate, gate_logit, norm_scale


class Columns(NamedTuple):
  """What the convolution may still read, oldest first, float32; zeros stand before the start."""

  scale_BPG: jax.Array
  value_BPD: jax.Array


def past_columns(cfg: EngramConfig) -> int:
  """P: positions before the current one that the convolution reads."""
  return max(cfg.conv_kernel - 1, 0) * cfg.max_ngram


def no_columns(cfg: EngramConfig, batch: int, branches: int, width: int) -> Columns:
  """The past of a request that has none."""
  P = past_columns(cfg)
  return Columns(jnp.zeros((batch, P, branches)), jnp.zeros((batch, P, width)))


def extend(
  module: Engram, hidden_BTGD: jax.Array, rows_BTM: jax.Array, past: Columns
) -> tuple[jax.Array, dict[str, jax.Array], Columns]:
  """`Engram.__call__` on the T positions that follow `past`, within one document.

  Returns:
    delta_BTGD, {"gate": [B, T, G]}, and past and new columns together, [B, P+T, ...]: those up to
    any of the new positions are a slice of them.
  """
  rows_BTM = rows_BTM.reshape(*rows_BTM.shape[:2], -1).astype(hidden_BTGD.dtype)
  key_BTGD, value_BTD = module.project_rows(rows_BTM)
  weight_GD = module.g_key[...] * module.g_query[...]
  logit_BTG = gate_logit(hidden_BTGD, key_BTGD, weight_GD, module.cfg.norm_eps)
  gate_BTG = gate(logit_BTG, module.cfg.gate)
  value_BTD = value_BTD.astype(jnp.float32)
  delta_BTGD = gate_BTG[..., None] * value_BTD[:, :, None]
  columns = past
  if module.cfg.conv_kernel:
    scale_BTG, _ = norm_scale(gate_BTG, value_BTD, module.cfg.conv_norm_eps)
    columns = Columns(
      jnp.concatenate([past.scale_BPG, scale_BTG], 1),
      jnp.concatenate([past.value_BPD, value_BTD], 1),
    )
    delta_BTGD += jax.nn.silu(_convolve(module, columns, hidden_BTGD.shape[1]))
  return delta_BTGD.astype(hidden_BTGD.dtype), {"gate": gate_BTG}, columns


def _convolve(module: Engram, columns: Columns, T: int) -> jax.Array:
  W, N = module.cfg.conv_kernel, module.cfg.max_ngram
  kernel_WGD = module.w_conv[...] * module.g_conv[...]
  total = 0
  for j in range(W):
    tap = slice(j * N, j * N + T)  # position t - (W-1-j) N lies at P + t - (W-1-j) N = t + j N
    scale_BTG, value_BTD = columns.scale_BPG[:, tap], columns.value_BPD[:, tap]
    total += kernel_WGD[j] * scale_BTG[..., None] * value_BTD[:, :, None]
  return total
