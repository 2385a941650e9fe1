"""Sampling of the next token: greedy, temperature, top-k, top-p, repetition penalty, seeds.

A request's n-th token follows from its logits, its `Sampling`, and n, so it does not depend on what
else is in the batch, and a draft token can be checked against the very token that would have been
sampled (`sample_each_position`).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.errors import ConfigError, NonFiniteError


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Sampling parameters of one request. Raises ConfigError for a value outside its range."""

  temperature: float = 0.0
  """0 is greedy."""
  top_k: int = 0
  """Only the k most likely tokens; 0 is all."""
  top_p: float = 1.0
  """Only the fewest most likely tokens that together have this probability."""
  repetition_penalty: float = 1.0
  """Logits of tokens already in the request are divided by it if positive, else multiplied
  (arXiv 1909.05858)."""
  seed: int = 0

  def __post_init__(self):
    for name, ok, valid in (
      ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or above"),
      ("top_k", 0 <= self.top_k < 2**31, "0 (all) or above"),
      ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
      ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
      ("seed", 0 <= self.seed < 2**32, "from 0 to 2^32 - 1"),
    ):
      if not ok:
        raise ConfigError(f"{name}={getattr(self, name)} must be {valid}")


class SamplingBatch(NamedTuple):
  """`Sampling` of B requests as arrays [B]: float32, int32, and uint32 seeds."""

  temperature: np.ndarray
  top_k: np.ndarray
  top_p: np.ndarray
  repetition_penalty: np.ndarray
  seed: np.ndarray

  @classmethod
  def of(cls, samplings: Sequence[Sampling]) -> "SamplingBatch":
    """Stacks one `Sampling` a request."""
    dtypes = (np.float32, np.int32, np.float32, np.float32, np.uint32)
    return cls(
      *(
        np.array([getattr(sampling, name) for sampling in samplings], dtype)
        for name, dtype in zip(cls._fields, dtypes, strict=True)
      )
    )


@jax.jit
def sample_each_position(
  logits_BTV: jax.Array,
  seen_BV: jax.Array,
  next_BT: jax.Array,
  first_B: jax.Array,
  batch: SamplingBatch,
) -> tuple[jax.Array, jax.Array]:
  """Samples the token that each request would take after each of T tokens.

  Args:
    logits_BTV: float32, after each of the T tokens.
    seen_BV: bool, True for tokens that are in the request before the first sample.
    next_BT: int32 token assumed to follow each position (a draft; the last column is not read).
      In [0, V): the caller takes drafts from checked prompts and sampled tokens.
    first_B: int32 number of tokens that the request has sampled before.

  Returns:
    int32 [B, T], and the tokens seen after each sample, bool [T, B, V]: entry t holds
    next_B0 .. next_B(t-1) and the sample t too.
  """
  row_B = jnp.arange(logits_BTV.shape[0])

  def sample_position(carry, xs):
    seen_BV, t = carry
    logits_BV, next_B = xs
    sampled_B = sample_tokens(logits_BV, seen_BV, first_B + t, batch)
    after_BV = seen_BV.at[row_B, jnp.maximum(sampled_B, 0)].set(True)
    return (seen_BV.at[row_B, next_B].set(True), t + 1), (sampled_B, after_BV)

  init = (seen_BV, jnp.int32(0))
  _, (sampled_TB, seen_TBV) = jax.lax.scan(
    sample_position, init, (logits_BTV.swapaxes(0, 1), next_BT.T)
  )
  return sampled_TB.T, seen_TBV


def sample_tokens(
  logits_BV: jax.Array, seen_BV: jax.Array, index_B: jax.Array, batch: SamplingBatch
) -> jax.Array:
  """int32 [B], sample number `index_B` of each request; see `Sampling`.

  -1 where the logits have no finite maximum, as a diverged model's: see `require_finite`.
  """
  penalty_B1 = jnp.asarray(batch.repetition_penalty)[:, None]
  penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
  logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
  greedy_B = logits_BV.argmax(-1).astype(jnp.int32)
  max_B1 = logits_BV.max(-1, keepdims=True)
  temperature_B = jnp.asarray(batch.temperature)

  def sample() -> jax.Array:
    # From their maximum down, so that no temperature is too small to divide by.
    scaled_BV = (logits_BV - max_B1) / jnp.where(temperature_B > 0, temperature_B, 1)[:, None]
    noisy_BV = scaled_BV + _gumbel(index_B, batch, scaled_BV.shape[1])
    sampled_B = jnp.where(_nucleus(scaled_BV, batch), noisy_BV, -jnp.inf).argmax(-1)
    return jnp.where(temperature_B > 0, sampled_B.astype(jnp.int32), greedy_B)

  # Noise and order of all V logits cost more than the rest: only if a request asks for them.
  sampled_B = jax.lax.cond((temperature_B > 0).any(), sample, lambda: greedy_B)
  return jnp.where(jnp.isfinite(max_B1[:, 0]), sampled_B, -1)


def require_finite(tokens: np.ndarray) -> np.ndarray:
  """Returns the sampled tokens; NonFiniteError if one is -1, for logits that are not finite."""
  if (tokens < 0).any():
    raise NonFiniteError(
      "the model's logits are not finite: this checkpoint cannot continue a text"
    )
  return tokens


def _nucleus(logits_BV: jax.Array, batch: SamplingBatch) -> jax.Array:
  """bool [B, V], True for tokens that top-k and top-p leave in; the likeliest one always stays."""
  top_k_B, top_p_B = jnp.asarray(batch.top_k), jnp.asarray(batch.top_p)
  is_cut_B = (top_k_B > 0) | (top_p_B < 1)

  def cut() -> jax.Array:
    order_BV = jnp.argsort(-logits_BV, axis=1, stable=True)
    probability_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=1), axis=1)
    before_BV = jnp.cumsum(probability_BV, axis=1) - probability_BV
    rank_V = jnp.arange(logits_BV.shape[1])
    limit_B = jnp.where(top_k_B > 0, top_k_B, rank_V.size)
    stays_BV = (rank_V < limit_B[:, None]) & (before_BV < top_p_B[:, None])
    stays_BV = stays_BV | (rank_V == 0) | ~is_cut_B[:, None]
    row_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return jnp.zeros(logits_BV.shape, bool).at[row_B1, order_BV].set(stays_BV)

  return jax.lax.cond(is_cut_B.any(), cut, lambda: jnp.ones(logits_BV.shape, bool))


def _gumbel(index_B: jax.Array, batch: SamplingBatch, V: int) -> jax.Array:
  """Gumbel noise [B, V]: the argmax of logits + noise is a sample from their softmax."""

  def noise_V(seed, index):
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), index), (V,))

  return jax.vmap(noise_V)(jnp.asarray(batch.seed), index_B)
