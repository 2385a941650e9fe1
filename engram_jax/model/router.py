"""The router of a mixture of experts: the choice of experts, their weights, and load balancing.

Scores are sigmoids; the top-k of score + bias are chosen, and weighted by their scores without the
bias (arXiv 2401.06066, 2412.19437). The bias balances the load without a loss term and therefore
without a gradient: after each step it moves by a fixed amount against an expert's load
(arXiv 2408.15664).

Local letters: E, routed experts; K, experts per token; S, tokens.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

ROUTING = "routing"
"""Name of the small integers that a backward pass keeps, since they are slow to sort again."""


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
  experts_SK = checkpoint_name(experts_SK, ROUTING)
  # As sums over E, not by index: the transpose of an index is a scatter, which a TPU sorts for.
  is_chosen_SKE = _is_expert(experts_SK, scores_SE.shape[1])
  chosen_SK = jnp.sum(jnp.where(is_chosen_SKE, scores_SE[:, None], 0), axis=-1)
  total_S1 = jnp.sum(chosen_SK, axis=-1, keepdims=True)
  return experts_SK, chosen_SK / (total_S1 + 1e-20) * scale


def expert_load(experts_SK: jax.Array, experts: int) -> jax.Array:
  """The share of the assignments that each expert has, float32 [E], sum 1."""
  return expert_counts(experts_SK, experts) / jnp.float32(experts_SK.size)


def expert_counts(experts_SK: jax.Array, experts: int) -> jax.Array:
  """Counts the assignments to each of E experts, int32 [E]; ids outside [0, E) count for none."""
  return jnp.sum(_is_expert(experts_SK.reshape(-1), experts), axis=0, dtype=jnp.int32)


def _is_expert(ids: jax.Array, experts: int) -> jax.Array:
  return ids[..., None] == jnp.arange(experts)


class RouterBias(nnx.Variable):
  """The balancing bias [E] of a router: state that the step moves, never trained by gradient."""


def updated_bias(bias_E: jax.Array, load_E: jax.Array, step_size: float) -> jax.Array:
  """Loss-free balancing: `bias + step_size * sign(mean load - load)` (arXiv 2408.15664, alg. 1)."""
  return bias_E + step_size * jnp.sign(jnp.mean(load_E) - load_E)
