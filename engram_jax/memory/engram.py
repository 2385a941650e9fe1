"""Engram: what the rows of a token add to the residual branches (arXiv 2601.07372, section 2.3).

    key_g      = rows W_key_g                                `key_BTGD`
    value      = rows W_value                                `value_BTD`, shared by all branches
    s_g        = RMSNorm(h_g) . RMSNorm(key_g) / sqrt(D)     `logit_BTG`, the memory's fit
    alpha_g    = sigmoid(sign(s_g) sqrt(|s_g|)), sigmoid(s_g), or 1     `gate_BTG`
    U_g        = alpha_g value
    delta_g    = SiLU(conv(RMSNorm(U_g))) + U_g              depthwise, causal, dilated by N

The caller adds delta to its residual branches. `engram_reference` computes the same as it reads
here; memory/engram_ops.py computes it with few passes over memory.

Local letters: N, the largest order of n-grams (`cfg.max_ngram`); W, taps of the convolution;
P = (W-1) N, positions that it reads before the first; U, the gated value.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from engram_jax.config import EngramConfig
from engram_jax.memory.compress import check_visible_ids
from engram_jax.memory.engram_ops import (
  convolve,
  delay,
  gate,
  gate_logit,
  gated_conv,
  norm_scale,
  project,
  sum_products,
)


class ConvCache(NamedTuple):
  """The past that a decoder's convolution may still read: float32, oldest first, zeros before the
  start. RMSNorm(U_g) is a scale times a value the branches share, so nothing of width G D is kept.

  scale_BPG: [B, P, G]. value_BPD: [B, P, D].
  """

  scale_BPG: jax.Array
  value_BPD: jax.Array

  @classmethod
  def empty(cls, cfg: EngramConfig, batch: int, branches: int, width: int) -> "ConvCache":
    """The cache of `batch` requests that hold nothing."""
    P = max(cfg.conv_kernel - 1, 0) * cfg.max_ngram
    return cls(jnp.zeros((batch, P, branches)), jnp.zeros((batch, P, width)))


class Engram(nnx.Module):
  """The module of one layer. Parameters are float32, flat, and named as released code has them.

  `w_key` [M, G, D], `w_value` [M, D]; `b_key` [G, D], `b_value` [D] with `cfg.bias`; norm weights
  `g_key`, `g_query` [G, D]; `g_conv` [G, D] and `w_conv` [W, G, D] with `cfg.conv_kernel` = W > 0,
  where `w_conv[j]` multiplies position t - (W-1-j) N. `w_conv` starts at zero, so training starts
  from delta = U. Without a gate (`cfg.gate` = "none": alpha = 1) there are no keys and nothing of
  theirs, and without `cfg.projections` the rows are the value themselves, M = D.
  """

  def __init__(self, cfg: EngramConfig, width: int, branches: int, *, rngs: nnx.Rngs):
    M, G, D, W = cfg.memory_width, branches, width, cfg.conv_kernel
    if G < 1 or D < 1:
      raise ValueError(f"width={D} and branches={G} must be positive")
    self.cfg, self.width, self.branches = cfg, width, branches
    if not cfg.projections and M != D:
      raise ValueError(f"rows of {M} numbers a token are no value of width={D}: projections=False")
    normal = jax.nn.initializers.normal(1 / math.sqrt(M))
    has_gate = cfg.gate != "none"
    if has_gate:
      self.w_key = nnx.Param(normal(rngs.params(), (M, G, D)))
    if cfg.projections:
      self.w_value = nnx.Param(normal(rngs.params(), (M, D)))
    if cfg.bias and has_gate:
      self.b_key = nnx.Param(jnp.zeros((G, D)))
    if cfg.bias:
      self.b_value = nnx.Param(jnp.zeros((D,)))
    if has_gate:
      self.g_key = nnx.Param(jnp.ones((G, D)))
      self.g_query = nnx.Param(jnp.ones((G, D)))
    if W > 0:
      self.g_conv = nnx.Param(jnp.ones((G, D)))
      self.w_conv = nnx.Param(jnp.zeros((W, G, D)))

  def __call__(
    self, hidden_BTGD: jax.Array, rows_BTM: jax.Array, segments_BT: jax.Array | None = None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes what to add to the branches, and the gates.

    Args:
      hidden_BTGD: residual branches; their dtype is the compute dtype. Norms, gate and convolution
        are float32 throughout.
      rows_BTM: the retrieved rows of each token, laid end to end ([B, T, J, C] is taken too).
      segments_BT: int32 document of each position in a packed window: convolution taps that fall
        into another document read zero. Not used where `cfg.reset_at_documents` is off.

    Returns:
      delta_BTGD in the dtype of `hidden_BTGD`, and {"gate": float32 [B, T, G]}.

    Raises:
      ValueError: for shapes or dtypes that do not fit the module.
    """
    rows_BTM = self._check(hidden_BTGD, rows_BTM, segments_BT)
    gate_BTG, value_BTD = self._gated(hidden_BTGD, rows_BTM)
    with jax.named_scope("short_conv"):
      delta_BTGD = self._conv(gate_BTG, value_BTD.astype(jnp.float32), segments_BT)
    return delta_BTGD.astype(hidden_BTGD.dtype), {"gate": gate_BTG}

  def extend(
    self, hidden_BTGD: jax.Array, rows_BTM: jax.Array, past: ConvCache
  ) -> tuple[jax.Array, dict[str, jax.Array], ConvCache]:
    """`__call__` on the T positions that follow `past`, within one document.

    Returns:
      delta_BTGD, {"gate": [B, T, G]}, and the columns of past and new positions together,
      [B, P+T, ...]: the cache after any of the new positions is a slice of P of them.
    """
    rows_BTM = self._check(hidden_BTGD, rows_BTM, None)
    gate_BTG, value_BTD = self._gated(hidden_BTGD, rows_BTM)
    value_BTD = value_BTD.astype(jnp.float32)
    delta_BTGD = gate_BTG[..., None] * value_BTD[:, :, None]
    columns = past
    if self.cfg.conv_kernel:
      scale_BTG, _ = norm_scale(gate_BTG, value_BTD, self.cfg.conv_norm_eps)
      columns = ConvCache(
        jnp.concatenate([past.scale_BPG, scale_BTG], 1),
        jnp.concatenate([past.value_BPD, value_BTD], 1),
      )
      delta_BTGD += jax.nn.silu(self._conv_columns(columns, hidden_BTGD.shape[1]))
    return delta_BTGD.astype(hidden_BTGD.dtype), {"gate": gate_BTG}, columns

  def _gated(self, hidden_BTGD: jax.Array, rows_BTM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gates, float32 [B, T, G], and the value they multiply, [B, T, D]."""
    rows_BTM = rows_BTM.astype(hidden_BTGD.dtype)
    if self.cfg.gate == "none":
      return jnp.ones(hidden_BTGD.shape[:3], jnp.float32), self._value(rows_BTM)
    key_BTGD, value_BTD = self.project_rows(rows_BTM)
    with jax.named_scope("context_aware_gating"):
      weight_GD = self.g_key[...] * self.g_query[...]  # both norms' weights scale the same products
      logit_BTG = gate_logit(hidden_BTGD, key_BTGD, weight_GD, self.cfg.norm_eps)
      return gate(logit_BTG, self.cfg.gate), value_BTD

  @jax.named_scope("key_value_projection")
  def project_rows(self, rows_BTM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys of all branches and the value they share, in one dot."""
    dtype = rows_BTM.dtype
    w_key, w_value = self.w_key[...].astype(dtype), self.w_value[...].astype(dtype)
    key_BTGD, value_BTD = project(rows_BTM, w_key, w_value)
    if self.cfg.bias:
      # Broadcast by a dot with ones: its transpose, the bias gradient, is then a dot as well.
      ones_BT = jnp.ones(rows_BTM.shape[:2], dtype)
      key_BTGD += jnp.einsum("bt,gd->btgd", ones_BT, self.b_key[...].astype(dtype))
      value_BTD += jnp.einsum("bt,d->btd", ones_BT, self.b_value[...].astype(dtype))
    return key_BTGD, value_BTD

  @jax.named_scope("value_projection")
  def _value(self, rows_BTM: jax.Array) -> jax.Array:
    """The value alone, [B, T, D], for a module without keys."""
    if not self.cfg.projections:
      return rows_BTM
    value_BTD = jnp.einsum("btm,md->btd", rows_BTM, self.w_value[...].astype(rows_BTM.dtype))
    return value_BTD + self.b_value[...].astype(rows_BTM.dtype) if self.cfg.bias else value_BTD

  def _conv(self, gate_BTG: jax.Array, value_BTD: jax.Array, segments_BT: jax.Array | None):
    W, N = self.cfg.conv_kernel, self.cfg.max_ngram
    if W == 0:
      return sum_products("btg,btd->btgd", gate_BTG, value_BTD)
    T = value_BTD.shape[1]
    taps = tuple(j for j in range(W) if (W - 1 - j) * N < T)  # the others only ever read zeros
    shifts = tuple((W - 1 - j) * N for j in taps)
    kernel_WGD = (self.w_conv[...] * self.g_conv[...])[taps[0] :]
    keep_WBT = None
    if segments_BT is not None and self.cfg.reset_at_documents:
      keep_WBT = jnp.stack([segments_BT == delay(segments_BT, s) for s in shifts])
    return gated_conv(gate_BTG, value_BTD, kernel_WGD, keep_WBT, shifts, self.cfg.conv_norm_eps)

  def _conv_columns(self, columns: ConvCache, T: int) -> jax.Array:
    """The convolution at the last T of the columns."""
    W, N = self.cfg.conv_kernel, self.cfg.max_ngram
    taps = [slice(j * N, j * N + T) for j in range(W)]  # t - (W-1-j) N lies at P + that = t + j N
    return convolve(
      self.w_conv[...] * self.g_conv[...],
      [columns.scale_BPG[:, tap] for tap in taps],
      [columns.value_BPD[:, tap] for tap in taps],
    )

  def _check(self, hidden: jax.Array, rows: jax.Array, segments: jax.Array | None) -> jax.Array:
    """The rows as [B, T, M]; ValueError for what does not fit."""
    G, D, M = self.branches, self.width, self.cfg.memory_width
    if hidden.ndim != 4 or hidden.shape[2:] != (G, D):
      raise ValueError(f"hidden has shape {hidden.shape}: expected [B, T, G={G}, D={D}]")
    B, T = hidden.shape[:2]
    if rows.shape[:2] != (B, T) or rows.ndim not in (3, 4) or math.prod(rows.shape[2:]) != M:
      raise ValueError(f"rows have shape {rows.shape}: expected [B={B}, T={T}, M={M}]")
    for name, array in (("hidden", hidden), ("rows", rows)):
      if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name}: expected a float dtype, not {array.dtype}")
    if segments is not None:
      check_visible_ids(segments, None, "segment id")
      if segments.shape != (B, T):
        raise ValueError(f"segments have shape {segments.shape}: expected [B={B}, T={T}]")
    return rows.reshape(B, T, M)
