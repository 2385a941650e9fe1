"""Root-mean-square normalisation (arXiv 1910.07467)."""

import functools

import jax
import jax.numpy as jnp


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
