"""The dense feed-forward: leading dense layers, and the shared experts of the others."""

import jax
import jax.numpy as jnp
from flax import nnx


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
    """[..., D] -> [..., D], computed in the dtype of `x_BTD`."""
    w_gate, w_up, w_down = (
      w[...].astype(x_BTD.dtype) for w in (self.w_gate, self.w_up, self.w_down)
    )
    return (jax.nn.silu(x_BTD @ w_gate) * (x_BTD @ w_up)) @ w_down
