"""Feed-forward layers: one SwiGLU, or a mixture of many with a router.

Local letters: E, routed experts; F, hidden width; K, experts per token; S = B T, tokens.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from engram_jax.config import MoEConfig
from engram_jax.model.expert_dispatch import experts_for
from engram_jax.model.expert_parallel import routed_experts
from engram_jax.model.fsdp import is_sharded
from engram_jax.model.params import expert_specs
from engram_jax.model.router import RouterBias, expert_load, route


class FeedForward(nnx.Module):
  """SwiGLU (arXiv 2002.05202): `(silu(x w_gate) * (x w_up)) w_down`, without biases.

  Parameters, float32, normal with standard deviation `std`: w_gate [D, F], w_up [D, F],
  w_down [F, D].
  """

  def __init__(self, width: int, hidden: int, std: float, *, rngs: nnx.Rngs):
    normal = nnx.initializers.normal(std)
    self.w_gate = nnx.Param(normal(rngs.params(), (width, hidden), jnp.float32))
    self.w_up = nnx.Param(normal(rngs.params(), (width, hidden), jnp.float32))
    self.w_down = nnx.Param(normal(rngs.params(), (hidden, width), jnp.float32))

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """Maps [..., D] to [..., D], computed in the dtype of `x_BTD`."""
    w_gate, w_up, w_down = (
      w[...].astype(x_BTD.dtype) for w in (self.w_gate, self.w_up, self.w_down)
    )
    return (jax.nn.silu(x_BTD @ w_gate) * (x_BTD @ w_up)) @ w_down


class MoE(nnx.Module):
  """Mixture of experts: shared and chosen routed experts, each a SwiGLU feed-forward of width F.

  Parameters, float32, normal with standard deviation `std`: w_router [D, E], w_experts_gate and
  w_experts_up [E, D, F], w_experts_down [E, F, D], and with shared experts `shared`, one
  `FeedForward` of width shared_experts * F. `bias` is a `RouterBias` [E], zeros.

  cfg.dispatch chooses the implementation (model/expert_dispatch.py), never the result.
  """

  def __init__(self, cfg: MoEConfig, width: int, std: float, *, rngs: nnx.Rngs):
    if not 0 < cfg.top_k <= cfg.routed_experts:
      raise ValueError(
        f"top_k={cfg.top_k} must be from 1 to routed_experts={cfg.routed_experts}, "
        "and a mixture of experts needs at least one"
      )
    experts, hidden = cfg.routed_experts, cfg.expert_width
    normal = nnx.initializers.normal(std)
    self.cfg = cfg
    self.w_router = nnx.Param(normal(rngs.params(), (width, experts), jnp.float32))
    self.w_experts_gate = nnx.Param(normal(rngs.params(), (experts, width, hidden), jnp.float32))
    self.w_experts_up = nnx.Param(normal(rngs.params(), (experts, width, hidden), jnp.float32))
    self.w_experts_down = nnx.Param(normal(rngs.params(), (experts, hidden, width), jnp.float32))
    self.bias = RouterBias(jnp.zeros(experts, jnp.float32))
    self.shared = (
      FeedForward(width, cfg.shared_experts * hidden, std, rngs=rngs)
      if cfg.shared_experts
      else None
    )

  def __call__(
    self, x_BTD: jax.Array, mesh: Mesh | None = None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns ([B, T, D] of the same dtype, {"load": float32 [E], shares that sum to 1}).

    On a mesh B and the experts are divided over it (model/expert_parallel.py).
    """
    cast = lambda w: w[...].astype(x_BTD.dtype)
    weights = cast(self.w_experts_gate), cast(self.w_experts_up), cast(self.w_experts_down)
    if is_sharded(mesh):
      specs = expert_specs(weights, mesh)
      y_BTD, load_E = routed_experts(
        self.cfg, x_BTD, self.w_router[...], self.bias[...], weights, specs, mesh
      )
    else:
      y_BTD, load_E = self._on_one_device(x_BTD, weights, mesh)
    if self.shared is not None:
      with jax.named_scope("shared_experts"):
        y_BTD = y_BTD + self.shared(x_BTD)
    return y_BTD, {"load": load_E}

  def _on_one_device(self, x_BTD, weights, mesh: Mesh | None) -> tuple[jax.Array, jax.Array]:
    cfg = self.cfg
    x_SD = x_BTD.reshape(-1, x_BTD.shape[-1])
    with jax.named_scope("router"):
      experts_SK, weights_SK = route(
        x_SD, self.w_router[...], self.bias[...], cfg.top_k, cfg.route_scale
      )
    with jax.named_scope("routed_experts"):
      y_SD = experts_for(cfg.dispatch, mesh)(x_SD, experts_SK, weights_SK, *weights)
    return y_SD.reshape(x_BTD.shape), expert_load(experts_SK, cfg.routed_experts)
