"""Rotary position embedding (arXiv 2104.09864) and its YaRN extension (arXiv 2309.00071).

Dimension i of the first half is paired with dimension i of the second half.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import YarnConfig


def frequencies(dim: int, base: float, yarn: YarnConfig) -> np.ndarray:
  """Radians a position for each of the dim/2 pairs, float32.

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
  """What YaRN multiplies attention logits by: (0.1 f ln(scale) + 1)^2; 1 for plain RoPE."""
  return (0.1 * yarn.attention_factor * math.log(yarn.scale) + 1) ** 2


def rotate(x_BTHR: jax.Array, positions_BT: jax.Array, frequencies_r: np.ndarray) -> jax.Array:
  """Each pair of the last axis turned by position x frequency, in float32; dtype of x.

  Args:
    x_BTHR: [B, T, H, R] with R = 2 len(frequencies).
    positions_BT: int32 positions within the document.
  """
  angle_BT1r = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies_r
  cos, sin = jnp.cos(angle_BT1r), jnp.sin(angle_BT1r)
  first, second = jnp.split(x_BTHR.astype(jnp.float32), 2, axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(x_BTHR.dtype)
