"""Manifold-constrained hyper-connections (mHC, arXiv 2512.24880).

G residual streams x in place of one. Around a sublayer F,

    r      = x / rms(x) over all G D numbers of a token
    H_pre  = sigmoid(a_pre r W_pre + b_pre)                 [G]     stream weights of F's input
    H_post = 2 sigmoid(a_post r W_post + b_post)            [G]     stream weights of its output
    H_res  = Sinkhorn(exp(a_res r W_res + b_res))           [G, G]  mixing of the streams
    x      <- H_res x + H_post (outer) F(norm(H_pre x))

H_res is doubly stochastic up to the iterations' error, so no depth of blocks blows the streams up.
With G = 1 this is the plain residual x + F(norm(x)) and has no parameters.

Local letters: F, the sublayer; H, mixing coefficients; W, their projections; S = B T tokens.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from engram_jax.config import ResidualConfig
from engram_jax.core.mesh import platform
from engram_jax.model.layers import rms_norm

# Alternations of Sinkhorn's loop in one pass on accelerators. All 19 at once are 50 launches with
# the gradient, not 295, but in a whole step XLA's GPU compiler then takes minutes for each layer.
_UNROLL = 4
_OFF_DIAGONAL = -4.0  # of b_res at the start: exp(-4) is 2 % of what a stream keeps of itself


class HyperConnection(nnx.Module):
  """One sublayer's residual: its norm's gain g_norm [D] and, for G > 1, the mixing parameters.

  w_mix [G + G + G G, G, D] holds W_pre, W_post, W_res in one projection; a_pre, a_post, a_res are
  scalars; b_pre, b_post [G], b_res [G, G]. All float32. At the start, with equal streams, the
  block reads their mean, adds F's output to each, and nearly keeps them apart: a plain residual.
  """

  def __init__(self, cfg: ResidualConfig, width: int, std: float, eps: float, *, rngs: nnx.Rngs):
    G = cfg.branches
    self.cfg, self.eps = cfg, eps
    self.g_norm = nnx.Param(jnp.ones(width))
    if G > 1:
      self.w_mix = nnx.Param(std * jax.random.normal(rngs.params(), (2 * G + G * G, G, width)))
      self.a_pre, self.a_post, self.a_res = (
        nnx.Param(jnp.full((), cfg.initial_scale, jnp.float32)) for _ in range(3)
      )
      self.b_pre = nnx.Param(jnp.full(G, -math.log(G - 1), jnp.float32))  # sigmoid: 1 / G
      self.b_post = nnx.Param(jnp.zeros(G))  # 2 sigmoid: 1
      self.b_res = nnx.Param(_OFF_DIAGONAL * (1 - jnp.eye(G)))

  def __call__(
    self,
    x_BTGD: jax.Array,
    sublayer: Callable[[jax.Array], tuple[jax.Array, Any]],
    mesh: Mesh | None = None,
  ) -> tuple[jax.Array, Any]:
    """Returns the streams after `sublayer(normed_BTD) -> (y_BTD, probes)`, and its probes.

    mesh: the devices that will run it, which choose how it is compiled; default: this process's.
    """
    if self.cfg.branches == 1:
      y_BTD, probes = sublayer(rms_norm(x_BTGD[:, :, 0], self.g_norm[...], self.eps))
      return x_BTGD + y_BTD[:, :, None], probes
    with jax.named_scope("mhc_mixing"):
      pre_BTG, post_BTG, res_BTGG = (
        h.astype(x_BTGD.dtype)
        for h in self.mixing(x_BTGD, unroll=_UNROLL if platform(mesh) != "cpu" else 1)
      )
      read_BTD = jnp.einsum("btg,btgd->btd", pre_BTG, x_BTGD)
    y_BTD, probes = sublayer(rms_norm(read_BTD, self.g_norm[...], self.eps))
    with jax.named_scope("mhc_residual"):
      kept_BTGD = jnp.einsum("btgh,bthd->btgd", res_BTGG, x_BTGD)
      return kept_BTGD + jnp.einsum("btg,btd->btgd", post_BTG, y_BTD), probes

  def mixing(self, x_BTGD: jax.Array, unroll: int = 1) -> tuple[jax.Array, jax.Array, jax.Array]:
    """H_pre [B, T, G], H_post [B, T, G] and H_res [B, T, G, G], float32; unroll: as `sinkhorn`."""
    B, T, G, D = x_BTGD.shape
    wide = x_BTGD.astype(jnp.float32)
    scale_BT1 = jax.lax.rsqrt(
      jnp.einsum("btgd,btgd->bt", wide, wide)[..., None] / (G * D) + self.eps
    )
    z_BTn = scale_BT1 * jnp.einsum("btgd,ngd->btn", wide, self.w_mix[...])
    pre, post, res = jnp.split(z_BTn, [G, 2 * G], axis=-1)
    pre = jax.nn.sigmoid(self.a_pre[...] * pre + self.b_pre[...])
    post = 2 * jax.nn.sigmoid(self.a_post[...] * post + self.b_post[...])
    # Tokens last: the 4 x 4 sums are then adds of long vectors.
    logits_GGS = (self.a_res[...] * res).reshape(B * T, G, G).transpose(1, 2, 0)
    logits_GGS += self.b_res[...][:, :, None]
    mix_GGS = sinkhorn(logits_GGS, self.cfg.sinkhorn_iterations, unroll)
    return pre, post, mix_GGS.transpose(2, 0, 1).reshape(B, T, G, G)


def sinkhorn(logits_GGS: jax.Array, iterations: int, unroll: int = 1) -> jax.Array:
  """Normalises exp(logits) alternately by row and by column, `iterations` times, over the first two
  axes: non-negative, columns sum to 1, rows nearly so (Sinkhorn and Knopp, 1967).

  unroll: alternations in one pass of the loop. A GPU launches what is in each pass by itself, 295
  launches a call with its gradient; a CPU gains nothing and compiles longer.
  """

  def alternate(p_GGS, _):
    p_GGS = p_GGS / p_GGS.sum(1, keepdims=True)
    return p_GGS / p_GGS.sum(0, keepdims=True), None

  # The first alternation works on logarithms: a row or column that exp leaves all zero would be
  # 0 / 0. After it every row and column holds an entry of at least 1 / G^2, whatever the logits.
  first_GGS = jax.nn.softmax(jax.nn.log_softmax(logits_GGS, axis=1), axis=0)
  return jax.lax.scan(alternate, first_GGS, length=iterations - 1, unroll=unroll)[0]
