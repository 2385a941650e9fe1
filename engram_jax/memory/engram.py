"""Engram: what the rows of a token add to the residual branches (arXiv 2601.07372, section 2.3).

    key, value = rows W_key, rows W_value                    W_value and the rows serve all branches
    s_g        = RMSNorm(h_g) . RMSNorm(key_g) / sqrt(D)     how well the memory fits the context
    alpha_g    = sigmoid(sign(s_g) sqrt(|s_g|))  or  sigmoid(s_g)
    U_g        = alpha_g value
    delta_g    = SiLU(conv(RMSNorm(U_g))) + U_g              depthwise, causal, dilated by N

The caller adds delta to its residual branches. `engram_reference` computes the same as it reads
here; this file computes it with as few passes over [B, T, G, D] arrays as the algebra allows:

- the norm weights of key and query enter the logit only as their product;
- U_g is a scalar times a value the branches share, so mean(U_g^2) = alpha_g^2 mean(value^2) and the
  normed U_g is c_g value with c_g = alpha_g / sqrt(alpha_g^2 mean(value^2) + eps): the convolution
  reads [B, T, D] and [B, T, G] and nothing wider;
- its taps are shifted multiply-adds. `lax.conv` would turn the kernel's gradient into a full
  convolution over all channels on CPU.

Backward passes are written out because automatic ones store or reduce each broadcast product.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from engram_jax.config import EngramConfig

# Sums over D or T as dots: vectorised on CPU, ordinary fused reductions on accelerators. The
# operands are float32 for a reason (norms, logits), so no bfloat16 passes.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

_SQRT_FLOOR = 1e-6  # of |s| under the square root, as in the released models


class Engram(nnx.Module):
  """The module of one layer. Parameters are float32, flat, and named as released code has them.

  `w_key` [M, G, D], `w_value` [M, D]; `b_key` [G, D], `b_value` [D] with `cfg.bias`; norm weights
  `g_key`, `g_query` [G, D]; `g_conv` [G, D] and `w_conv` [W, G, D] with `cfg.conv_kernel` = W > 0,
  where `w_conv[j]` multiplies position t - (W-1-j) N. `w_conv` starts at zero, so training starts
  from delta = U.
  """

  def __init__(self, cfg: EngramConfig, width: int, branches: int, *, rngs: nnx.Rngs):
    M, G, D, W = cfg.memory_width, branches, width, cfg.conv_kernel
    if G < 1 or D < 1:
      raise ValueError(f"width={D} and branches={G} must be positive")
    self.cfg, self.width, self.branches = cfg, width, branches
    normal = jax.nn.initializers.normal(1 / math.sqrt(M))
    self.w_key = nnx.Param(normal(rngs.params(), (M, G, D)))
    self.w_value = nnx.Param(normal(rngs.params(), (M, D)))
    if cfg.bias:
      self.b_key = nnx.Param(jnp.zeros((G, D)))
      self.b_value = nnx.Param(jnp.zeros((D,)))
    self.g_key = nnx.Param(jnp.ones((G, D)))
    self.g_query = nnx.Param(jnp.ones((G, D)))
    if W > 0:
      self.g_conv = nnx.Param(jnp.ones((G, D)))
      self.w_conv = nnx.Param(jnp.zeros((W, G, D)))

  def __call__(
    self, hidden_BTGD: jax.Array, rows_BTM: jax.Array, segments_BT: jax.Array | None = None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What to add to the branches, and the gates.

    Args:
      hidden_BTGD: residual branches; their dtype is the compute dtype. Norms, gate and convolution
        are float32 throughout.
      rows_BTM: the retrieved rows of each token, laid end to end ([B, T, J, C] is taken too).
      segments_BT: int32 document of each position in a packed window: convolution taps that fall
        into another document read zero. Not used where `cfg.reset_at_documents` is off.

    Returns:
      delta_BTGD in the dtype of `hidden_BTGD`, and {"gate": float32 [B, T, G]}.

    Raises:
      ValueError: for shapes that do not fit the module.
    """
    rows_BTM = rows_BTM.reshape(*rows_BTM.shape[:2], -1)
    self._check(hidden_BTGD, rows_BTM, segments_BT)
    key_BTGD, value_BTD = self.project_rows(rows_BTM.astype(hidden_BTGD.dtype))
    with jax.named_scope("gate"):
      weight_GD = self.g_key[...] * self.g_query[...]
      logit_BTG = gate_logit(hidden_BTGD, key_BTGD, weight_GD, self.cfg.norm_eps)
      gate_BTG = gate(logit_BTG, self.cfg.gate)
    with jax.named_scope("short_conv"):
      delta_BTGD = self._conv(gate_BTG, value_BTD.astype(jnp.float32), segments_BT)
    return delta_BTGD.astype(hidden_BTGD.dtype), {"gate": gate_BTG}

  @jax.named_scope("project")
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

  def _conv(self, gate_BTG: jax.Array, value_BTD: jax.Array, segments_BT: jax.Array | None):
    W, N = self.cfg.conv_kernel, self.cfg.max_ngram
    if W == 0:
      return _einsum("btg,btd->btgd", gate_BTG, value_BTD)
    T = value_BTD.shape[1]
    taps = tuple(j for j in range(W) if (W - 1 - j) * N < T)  # the others only ever read zeros
    shifts = tuple((W - 1 - j) * N for j in taps)
    kernel_WGD = (self.w_conv[...] * self.g_conv[...])[taps[0] :]
    keep_WBT = None
    if segments_BT is not None and self.cfg.reset_at_documents:
      keep_WBT = jnp.stack([segments_BT == _delay(segments_BT, s) for s in shifts])
    return gated_conv(gate_BTG, value_BTD, kernel_WGD, keep_WBT, shifts, self.cfg.conv_norm_eps)

  def _check(self, hidden: jax.Array, rows: jax.Array, segments: jax.Array | None) -> None:
    B, T = hidden.shape[:2]
    G, D, M = self.branches, self.width, self.cfg.memory_width
    if hidden.shape != (B, T, G, D):
      raise ValueError(f"hidden has shape {hidden.shape}: expected [B, T, G={G}, D={D}]")
    if rows.shape != (B, T, M):
      raise ValueError(f"rows have shape {rows.shape}: expected [B={B}, T={T}, M={M}]")
    if segments is not None and segments.shape != (B, T):
      raise ValueError(f"segments have shape {segments.shape}: expected [B={B}, T={T}]")


@jax.custom_vjp
def project(
  rows_BTM: jax.Array, w_key: jax.Array, w_value: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(rows w_key [B, T, G, D], rows w_value [B, T, D]) for w_key [M, G, D] and w_value [M, D].

  One dot forward. Backward each part keeps its own, so that neither their gradients nor the
  weights' are put together only to be taken apart.
  """
  G = w_key.shape[1]
  both_BTXD = jnp.einsum("btm,mxd->btxd", rows_BTM, jnp.concatenate([w_key, w_value[:, None]], 1))
  return both_BTXD[:, :, :G], both_BTXD[:, :, G]


def _project_forward(rows, w_key, w_value):
  return project(rows, w_key, w_value), (rows, w_key, w_value)


def _project_backward(saved, cotangents):
  rows, w_key, w_value = saved
  dkey, dvalue = cotangents
  # An einsum is free to contract d before g, and would copy both operands to do so.
  drows = lax.dot_general(dkey, w_key, (((2, 3), (1, 2)), ((), ())))
  drows += lax.dot_general(dvalue, w_value, (((2,), (1,)), ((), ())))
  dw_key = lax.dot_general(rows, dkey, (((0, 1), (0, 1)), ((), ())))
  dw_value = lax.dot_general(rows, dvalue, (((0, 1), (0, 1)), ((), ())))
  return drows, dw_key, dw_value


project.defvjp(_project_forward, _project_backward)


def gate(logit_BTG: jax.Array, kind: str) -> jax.Array:
  """alpha: sigmoid(s), or sigmoid(sign(s) sqrt(max(|s|, 1e-6))), which is exactly 0.5 at s = 0.

  Below 1e-6 the square root is held constant, so its gradient there is zero, not infinite.
  """
  if kind == "sigmoid":
    return jax.nn.sigmoid(logit_BTG)
  root = jnp.sqrt(jnp.maximum(jnp.abs(logit_BTG), _SQRT_FLOOR))
  return jax.nn.sigmoid(jnp.sign(logit_BTG) * root)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def gate_logit(
  hidden_BTGD: jax.Array, key_BTGD: jax.Array, weight_GD: jax.Array, eps: float
) -> jax.Array:
  """s_g = sum_d weight_g h_g k_g / (rms(h_g) rms(k_g) sqrt(D)), float32 [B, T, G]."""
  return _gate_logit_forward(hidden_BTGD, key_BTGD, weight_GD, eps)[0]


def _gate_logit_forward(hidden, key, weight_GD, eps):
  h, k = hidden.astype(jnp.float32), key.astype(jnp.float32)
  D = h.shape[-1]
  r_h = lax.rsqrt(_einsum("btgd,btgd->btg", h, h) / D + eps)
  r_k = lax.rsqrt(_einsum("btgd,btgd->btg", k, k) / D + eps)
  s = _einsum("btgd,btgd->btg", h * weight_GD, k) * r_h * r_k / math.sqrt(D)
  return s, (hidden, key, weight_GD, s, r_h, r_k)


def _gate_logit_backward(eps, saved, ds):
  hidden, key, weight_GD, s, r_h, r_k = saved
  h, k = hidden.astype(jnp.float32), key.astype(jnp.float32)
  D = h.shape[-1]
  scale = (ds * r_h * r_k / math.sqrt(D))[..., None]
  dh = scale * (weight_GD * k) - (ds * s * r_h**2 / D)[..., None] * h
  dk = (scale * weight_GD) * h - (ds * s * r_k**2 / D)[..., None] * k
  dweight_GD = _einsum("btgd,btgd->gd", scale * h, k)
  return dh.astype(hidden.dtype), dk.astype(key.dtype), dweight_GD


gate_logit.defvjp(_gate_logit_forward, _gate_logit_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def gated_conv(
  gate_BTG: jax.Array,
  value_BTD: jax.Array,
  kernel_WGD: jax.Array,
  keep_WBT: jax.Array | None,
  shifts: tuple[int, ...],
  eps: float,
) -> jax.Array:
  """SiLU(conv(RMSNorm(U))) + U for U_g = gate_g value, float32 [B, T, G, D].

  Args:
    kernel_WGD: convolution weights times the norm's weights; tap j reads position t - shifts[j].
    keep_WBT: bool; where False, tap j of position t reads zero. None keeps every tap.
    eps: of the norm.
  """
  return _gated_conv_forward(gate_BTG, value_BTD, kernel_WGD, keep_WBT, shifts, eps)[0]


def _gated_conv_forward(a, v, kernel, keep, shifts, eps):
  c, _ = norm_scale(a, v, eps)
  delta = jax.nn.silu(_convolve(_tap_scales(c, keep, shifts), v, kernel, shifts))
  return delta + a[..., None] * v[:, :, None], (a, v, kernel, keep)


def _gated_conv_backward(shifts, eps, saved, ddelta):
  a, v, kernel, keep = saved
  T, D = v.shape[1:]
  c, r = norm_scale(a, v, eps)
  scales = _tap_scales(c, keep, shifts)
  y = _convolve(scales, v, kernel, shifts)
  sigmoid = jax.nn.sigmoid(y)
  dy = _pad_end(ddelta * sigmoid * (1 + y * (1 - sigmoid)), max(shifts))
  dy = lax.optimization_barrier(dy)  # stored once: every sum below would compute it again
  dkernel = jnp.stack(
    [_sum_over_time(dy, scale, _delay(v, s)) for scale, s in zip(scales, shifts, strict=True)]
  )
  taps = [kernel[j] * dy[:, s : s + T] for j, s in enumerate(shifts)]
  if keep is not None:
    kept = [_advance(k, s)[..., None, None] for k, s in zip(keep, shifts, strict=True)]
    taps = [jnp.where(k, tap, 0) for k, tap in zip(kept, taps, strict=True)]
  dn = sum(taps)  # of RMSNorm(U) before its weight
  dc = _einsum("btgd,btd->btg", dn, v)
  da = _einsum("btgd,btd->btg", ddelta, v) + dc * eps * r**3  # dc/da = r - a^2 m r^3 = eps r^3
  dmean = _einsum("btg,btg->bt", dc, -0.5 * c**3)
  dv = (2 / D * dmean)[..., None] * v
  for g in range(a.shape[2]):
    dv += a[:, :, g, None] * ddelta[:, :, g] + c[:, :, g, None] * dn[:, :, g]
  return da, dv, dkernel, None


gated_conv.defvjp(_gated_conv_forward, _gated_conv_backward)


def norm_scale(a, v, eps):
  """c and r, both [B, T, G], with RMSNorm(a v) = c v and c = a r."""
  mean_BT = _einsum("btd,btd->bt", v, v) / v.shape[-1]
  r = lax.rsqrt(a**2 * mean_BT[..., None] + eps)
  return a * r, r


def _tap_scales(c, keep, shifts):
  """What multiplies the delayed value in each tap: c of that position, zero where not kept."""
  scales = [_delay(c, s) for s in shifts]
  if keep is None:
    return scales
  return [jnp.where(k[..., None], scale, 0) for k, scale in zip(keep, scales, strict=True)]


def _convolve(scales, v, kernel, shifts):
  return sum(
    kernel[j] * scales[j][..., None] * _delay(v, s)[:, :, None] for j, s in enumerate(shifts)
  )


def _sum_over_time(x_BTGD, scale_BTG, y_BTD, parts: int = 16):
  """sum over b, t of x scale y, [G, D]; x may go on past the end of y.

  XLA's CPU code sums over a leading axis one column at a time, striding through memory; adding
  slices of the time axis first keeps the loop along D and stores nothing wider than one slice.
  """
  B, T = y_BTD.shape[:2]
  size = T // math.gcd(T, parts)
  total = 0
  for t in range(0, T, size):
    part = slice(t, t + size)
    total += x_BTGD[:, part] * scale_BTG[:, part, :, None] * y_BTD[:, part, None]
  return _einsum("bt,btgd->gd", jnp.ones((B, size)), total)


def _delay(x, steps: int):
  """x at t - steps along axis 1; zero before the start."""
  if steps == 0:
    return x
  return jnp.pad(x[:, :-steps], ((0, 0), (steps, 0)) + ((0, 0),) * (x.ndim - 2))


def _advance(x, steps: int):
  """x at t + steps along axis 1; zero (False) past the end."""
  return _pad_end(x[:, steps:], steps)


def _pad_end(x, steps: int):
  return jnp.pad(x, ((0, 0), (0, steps)) + ((0, 0),) * (x.ndim - 2))
