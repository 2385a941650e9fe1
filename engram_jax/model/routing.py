"""The router of a mixture of experts: who computes a token, and how much each counts."""

import jax
import jax.numpy as jnp
from jax import lax


def route(
  x_SD: jax.Array, w_router_DE: jax.Array, bias_E: jax.Array, top_k: int, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Chooses K experts for each token, in float32 whatever the dtype of `x_SD`.

  Returns:
    experts_SK: int32 in [0, E), by falling score + bias.
    weights_SK: float32, the chosen scores over their sum, times `scale`: a row sums to `scale`.
      Differentiable through the scores; `bias_E` only chooses.
  """
  logits_SE = jnp.matmul(
    x_SD.astype(jnp.float32), w_router_DE.astype(jnp.float32), precision=lax.Precision.HIGHEST
  )
  scores_SE = jax.nn.sigmoid(logits_SE)
  experts_SK = lax.top_k(lax.stop_gradient(scores_SE + bias_E), top_k)[1]
  chosen_SK = jnp.take_along_axis(scores_SE, experts_SK, axis=-1)
  total_S1 = jnp.sum(chosen_SK, axis=-1, keepdims=True)
  return experts_SK, chosen_SK / (total_S1 + 1e-20) * scale


def expert_load(experts_SK: jax.Array, experts: int) -> jax.Array:
  """Each expert's share of the assignments: float32 [E], sums to 1."""
  return jnp.bincount(experts_SK.reshape(-1), length=experts) / jnp.float32(experts_SK.size)
