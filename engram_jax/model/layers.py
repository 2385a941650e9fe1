"""Layers without state of their own: RMS normalisation (arXiv 1910.07467) and rotary positions.

Local letters: H, heads; r, width of a head's rotary part; p = r / 2, pairs that are rotated.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import YarnConfig


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, gain_D: jax.Array, eps: float) -> jax.Array:
  """`gain x / sqrt(mean(x^2) + eps)` over the last axis, in float32, returned in the dtype of x."""
  return _forward(x, gain_D, eps)[0]


def _forward(x, gain_D, eps):
  wide = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
  return (wide * scale * gain_D).astype(x.dtype), (x, gain_D, scale)


def _backward(eps, saved, dy):
  x, gain_D, scale = saved
  D = x.shape[-1]
  unit = x.astype(jnp.float32) * scale
  dy = dy.astype(jnp.float32)
  dunit = dy * gain_D
  dx = scale * (dunit - unit * jnp.mean(dunit * unit, -1, keepdims=True))
  # A dot with ones: XLA's CPU code sums over leading axes one strided column at a time.
  products = (dy * unit).reshape(-1, D)
  dgain_D = jnp.ones(len(products)) @ products
  return dx.astype(x.dtype), dgain_D


rms_norm.defvjp(_forward, _backward)


def frequencies(dim: int, base: float, yarn: YarnConfig) -> np.ndarray:
  """Angles in radians per position of the dim / 2 pairs, float32 [p].

  YaRN's "NTK by parts": pairs that turn more than `beta` times within the original length keep
  their frequency, those that turn less than `alpha` times are slowed by `scale`, and between the
  two the share of each changes linearly with the number of turns.
  """
  plain = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
  if yarn.scale == 1:
    return plain.astype(np.float32)
  turns = yarn.original_length * plain / (2 * math.pi)
  keep = np.clip((turns - yarn.alpha) / (yarn.beta - yarn.alpha), 0, 1)
  return (keep * plain + (1 - keep) * plain / yarn.scale).astype(np.float32)


def logit_factor(yarn: YarnConfig) -> float:
  """The factor of attention logits under YaRN, (0.1 f ln(scale) + 1)^2; 1 for plain RoPE."""
  return (0.1 * yarn.attention_factor * math.log(yarn.scale) + 1) ** 2


def rotate(x_BTHr: jax.Array, positions_BT: jax.Array, frequencies_p: np.ndarray) -> jax.Array:
  """Rotates each pair of the last axis by position x frequency, in float32; dtype of x.

  Args:
    x_BTHr: r = 2 len(frequencies).
    positions_BT: int32 positions within the document.
  """
  angle_BT1p = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies_p
  cos, sin = jnp.cos(angle_BT1p), jnp.sin(angle_BT1p)
  first, second = jnp.split(x_BTHr.astype(jnp.float32), 2, axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(x_BTHr.dtype)
