"""One transformer block: memory at its entry, then attention, then a feed-forward or experts."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from engram_jax.config import ModelConfig
from engram_jax.memory.engram import Engram
from engram_jax.model.mhc import HyperConnection
from engram_jax.model.mla import LatentAttention
from engram_jax.model.moe import FeedForward, MoE


class Block(nnx.Module):
  """Block `layer` (0-based): `engram` where the config places a memory, and either `moe` or
  `feed_forward`; the others are None."""

  def __init__(self, cfg: ModelConfig, layer: int, *, rngs: nnx.Rngs):
    D, G, std, eps = cfg.width, cfg.residual.branches, cfg.init_std, cfg.norm_eps
    connection = lambda: HyperConnection(cfg.residual, D, std, eps, rngs=rngs)
    has_memory = layer in cfg.engram.layers
    self.engram = Engram(cfg.engram, D, G, rngs=rngs) if has_memory else None
    self.attention_residual = connection()
    self.attention = LatentAttention(cfg.attention, D, std, eps, rngs=rngs)
    self.feed_forward_residual = connection()
    self.moe = MoE(cfg.moe, D, std, rngs=rngs) if cfg.is_moe(layer) else None
    dense = None if cfg.is_moe(layer) else FeedForward(D, cfg.moe.dense_width, std, rngs=rngs)
    self.feed_forward = dense

  def __call__(
    self,
    x_BTGD: jax.Array,
    rows_BTM: jax.Array | None,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    mesh: Mesh | None = None,
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Returns the streams after the block, and its probes: "gate" [B, T, G] of a memory, "load" of
    experts.

    rows_BTM: the rows of each token, M = J C; None in a block without a memory.
    mesh: the devices that B is divided over; None is one.
    """

    def remember(x_BTGD: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
      assert self.engram is not None
      assert rows_BTM is not None, "a block with a memory needs rows"
      return self.engram(x_BTGD, rows_BTM, segments_BT)

    return self.around(
      x_BTGD,
      remember,
      lambda normed_BTD: self.attention(normed_BTD, segments_BT, positions_BT, mesh),
      mesh,
    )

  def around(
    self,
    x_BTGD: jax.Array,
    remember: Callable[[jax.Array], tuple[jax.Array, dict[str, Any]]],
    attend: Callable[[jax.Array], jax.Array],
    mesh: Mesh | None = None,
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Runs the block with other memory and attention: a decoder reads caches in both.

    remember: `x_BTGD -> (delta_BTGD, probes)`, called where the block has a memory.
    attend: `normed_BTD -> y_BTD`.
    """
    probes = {}
    if self.engram is not None:
      with jax.named_scope("engram"):
        delta_BTGD, gates = remember(x_BTGD)
        x_BTGD, probes = x_BTGD + delta_BTGD, probes | gates

    def feed(normed_BTD):
      if self.moe is not None:
        with jax.named_scope("moe"):
          return self.moe(normed_BTD, mesh)
      assert self.feed_forward is not None
      with jax.named_scope("feed_forward"):
        return self.feed_forward(normed_BTD), {}

    attend_alone = lambda normed_BTD: (attend(normed_BTD), {})
    x_BTGD, _ = self.attention_residual(x_BTGD, attend_alone, mesh)
    x_BTGD, load = self.feed_forward_residual(x_BTGD, feed, mesh)
    return x_BTGD, probes | load
