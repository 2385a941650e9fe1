"""The arithmetic of the Engram module, with backward passes written out.

Automatic ones store or reduce each broadcast product; these read and write [B, T, G, D] arrays as
few times as the algebra allows:

- the norm weights of key and query enter the logit only as their product;
- U_g is a scalar times a value the branches share, so mean(U_g^2) = alpha_g^2 mean(value^2) and the
  normed U_g is c_g value with c_g = alpha_g / sqrt(alpha_g^2 mean(value^2) + eps): the convolution
  reads [B, T, D] and [B, T, G] and nothing wider;
- its taps are shifted multiply-adds. `lax.conv` would turn the kernel's gradient into a full
  convolution over all channels on CPU.

Local letters: W, taps of the convolution; X = G + 1, the keys and the value.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Sums over D or T as dots: vectorised on CPU, ordinary fused reductions on accelerators. The
# operands are float32 for a reason (norms, logits), so no bfloat16 passes.
sum_products = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

_SQRT_FLOOR = 1e-6  # of |s| under the square root, as in the released models


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
  r_h = lax.rsqrt(sum_products("btgd,btgd->btg", h, h) / D + eps)
  r_k = lax.rsqrt(sum_products("btgd,btgd->btg", k, k) / D + eps)
  s = sum_products("btgd,btgd->btg", h * weight_GD, k) * r_h * r_k / math.sqrt(D)
  return s, (hidden, key, weight_GD, s, r_h, r_k)


def _gate_logit_backward(eps, saved, ds):
  hidden, key, weight_GD, s, r_h, r_k = saved
  h, k = hidden.astype(jnp.float32), key.astype(jnp.float32)
  D = h.shape[-1]
  scale = (ds * r_h * r_k / math.sqrt(D))[..., None]
  dh = scale * (weight_GD * k) - (ds * s * r_h**2 / D)[..., None] * h
  dk = (scale * weight_GD) * h - (ds * s * r_k**2 / D)[..., None] * k
  dweight_GD = sum_products("btgd,btgd->gd", scale * h, k)
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
  delta = jax.nn.silu(_convolve_delayed(kernel, _tap_scales(c, keep, shifts), v, shifts))
  return delta + a[..., None] * v[:, :, None], (a, v, kernel, keep)


def _gated_conv_backward(shifts, eps, saved, ddelta):
  a, v, kernel, keep = saved
  T, D = v.shape[1:]
  c, r = norm_scale(a, v, eps)
  scales = _tap_scales(c, keep, shifts)
  y = _convolve_delayed(kernel, scales, v, shifts)
  sigmoid = jax.nn.sigmoid(y)
  dy = _pad_end(ddelta * sigmoid * (1 + y * (1 - sigmoid)), max(shifts))
  dy = lax.optimization_barrier(dy)  # stored once: every sum below would compute it again
  dkernel = jnp.stack(
    [_sum_over_time(dy, scale, delay(v, s)) for scale, s in zip(scales, shifts, strict=True)]
  )
  taps = [kernel[j] * dy[:, s : s + T] for j, s in enumerate(shifts)]
  if keep is not None:
    kept = [_advance(k, s)[..., None, None] for k, s in zip(keep, shifts, strict=True)]
    taps = [jnp.where(k, tap, 0) for k, tap in zip(kept, taps, strict=True)]
  dn: Any = sum(taps)  # of RMSNorm(U) before its weight
  dc = sum_products("btgd,btd->btg", dn, v)
  da = sum_products("btgd,btd->btg", ddelta, v) + dc * eps * r**3  # dc/da = r - a^2 m r^3 = eps r^3
  dmean = sum_products("btg,btg->bt", dc, -0.5 * c**3)
  dv = (2 / D * dmean)[..., None] * v
  for g in range(a.shape[2]):
    dv += a[:, :, g, None] * ddelta[:, :, g] + c[:, :, g, None] * dn[:, :, g]
  return da, dv, dkernel, None


gated_conv.defvjp(_gated_conv_forward, _gated_conv_backward)


def norm_scale(a, v, eps):
  """c and r, both [B, T, G], with RMSNorm(a v) = c v and c = a r."""
  mean_BT = sum_products("btd,btd->bt", v, v) / v.shape[-1]
  r = lax.rsqrt(a**2 * mean_BT[..., None] + eps)
  return a * r, r


def _tap_scales(c, keep, shifts):
  """Factors of the delayed value in each tap: c of that position, zero where not kept."""
  scales = [delay(c, s) for s in shifts]
  if keep is None:
    return scales
  return [jnp.where(k[..., None], scale, 0) for k, scale in zip(keep, scales, strict=True)]


def convolve(kernel_WGD: jax.Array, scales: Sequence[jax.Array], values: Sequence[jax.Array]):
  """[B, T, G, D]: the sum over taps j of kernel_j scale_j value_j, with what each tap reads given.

  Args:
    scales: [B, T, G] for each tap.
    values: [B, T, D] for each tap.
  """
  taps = zip(kernel_WGD, scales, values, strict=True)
  total: Any = sum(k_GD * c_BTG[..., None] * v_BTD[:, :, None] for k_GD, c_BTG, v_BTD in taps)
  return total


def _convolve_delayed(kernel, scales, v, shifts):
  return convolve(kernel, scales, [delay(v, s) for s in shifts])


def _sum_over_time(x_BTGD, scale_BTG, y_BTD, parts: int = 16):
  """sum over b, t of x scale y, [G, D]; x may go on past the end of y.

  XLA's CPU code sums over a leading axis one column at a time, striding through memory; adding
  slices of the time axis first keeps the loop along D and stores nothing wider than one slice.
  """
  B, T = y_BTD.shape[:2]
  size = T // math.gcd(T, parts)
  total: Any = 0
  for t in range(0, T, size):
    part = slice(t, t + size)
    total += x_BTGD[:, part] * scale_BTG[:, part, :, None] * y_BTD[:, part, None]
  return sum_products("bt,btgd->gd", jnp.ones((B, size)), total)


def delay(x, steps: int):
  """x at t - steps along axis 1; zero before the start."""
  if steps == 0:
    return x
  return jnp.pad(x[:, :-steps], ((0, 0), (steps, 0)) + ((0, 0),) * (x.ndim - 2))


def _advance(x, steps: int):
  """x at t + steps along axis 1; zero (False) past the end."""
  return _pad_end(x[:, steps:], steps)


def _pad_end(x, steps: int):
  return jnp.pad(x, ((0, 0), (0, steps)) + ((0, 0),) * (x.ndim - 2))
