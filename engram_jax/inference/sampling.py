"""How the next token is chosen: greedy, temperature, top-k, top-p, repetition penalty, seeds.

A request's n-th choice follows from its logits, its own settings, its seed and n, so it does not
depend on what else is in the batch, and a token drafted ahead can be checked against the very
choice that would have been made (`choose_each`).
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
  """Of one request. Raises ConfigError for a value outside its range."""

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


class Settings(NamedTuple):
  """`Sampling` of B requests as arrays [B]; float32, int32, and uint32 seeds."""

  temperature: np.ndarray
  top_k: np.ndarray
  top_p: np.ndarray
  repetition_penalty: np.ndarray
  seed: np.ndarray

  @classmethod
  def of(cls, each: Sequence[Sampling]) -> "Settings":
    """One entry a request."""
    dtypes = (np.float32, np.int32, np.float32, np.float32, np.uint32)
    return cls(
      *(
        np.array([getattr(one, name) for one in each], dtype)
        for name, dtype in zip(cls._fields, dtypes, strict=True)
      )
    )


@jax.jit
def choose_each(
  logits_BTV: jax.Array,
  seen_BV: jax.Array,
  next_BT: jax.Array,
  first_B: jax.Array,
  settings: Settings,
) -> tuple[jax.Array, jax.Array]:
  """What each request would choose after each of T tokens.

  Args:
    seen_BV: bool, tokens that are in the request before the first choice.
    next_BT: int32 token that is assumed to follow each choice's position (a draft; the last column
      is not read).
    first_B: int32 number of choices the request has made before.

  Returns:
    int32 [B, T], and seen after each choice, bool [T, B, V] ([t] holds next_B0 .. next_B(t-1) too,
    and the choice t itself).
  """
  each_B = jnp.arange(logits_BTV.shape[0])

  def one(carry, xs):
    seen_BV, t = carry
    logits_BV, next_B = xs
    chosen_B = choose(logits_BV, seen_BV, first_B + t, settings)
    after_BV = seen_BV.at[each_B, jnp.maximum(chosen_B, 0)].set(True)
    return (seen_BV.at[each_B, next_B].set(True), t + 1), (chosen_B, after_BV)

  start = (seen_BV, jnp.int32(0))
  _, (chosen_TB, seen_TBV) = jax.lax.scan(one, start, (logits_BTV.swapaxes(0, 1), next_BT.T))
  return chosen_TB.T, seen_TBV


def choose(
  logits_BV: jax.Array, seen_BV: jax.Array, index_B: jax.Array, settings: Settings
) -> jax.Array:
  """int32 [B], the choice number `index_B` of each request; see `Sampling`.

  -1 where the logits have no finite maximum, as a diverged model's: see `require_finite`.
  """
  penalty_B1 = jnp.asarray(settings.repetition_penalty)[:, None]
  penalised = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
  logits_BV = jnp.where(seen_BV, penalised, logits_BV)
  greedy_B = logits_BV.argmax(-1).astype(jnp.int32)
  most_B1 = logits_BV.max(-1, keepdims=True)
  temperature_B = jnp.asarray(settings.temperature)

  def draw() -> jax.Array:
    # From their maximum down, so that no temperature is too small to divide by.
    warm_BV = (logits_BV - most_B1) / jnp.where(temperature_B > 0, temperature_B, 1)[:, None]
    noisy_BV = warm_BV + _noise(index_B, settings, warm_BV.shape[1])
    drawn_B = jnp.where(_allowed(warm_BV, settings), noisy_BV, -jnp.inf).argmax(-1)
    return jnp.where(temperature_B > 0, drawn_B.astype(jnp.int32), greedy_B)

  # Noise and order of a whole vocabulary cost more than the rest: only where a request asks.
  chosen_B = jax.lax.cond((temperature_B > 0).any(), draw, lambda: greedy_B)
  return jnp.where(jnp.isfinite(most_B1[:, 0]), chosen_B, -1)


def require_finite(tokens: np.ndarray) -> np.ndarray:
  """The choices, if there are any; NonFiniteError otherwise."""
  if (tokens < 0).any():
    raise NonFiniteError(
      "the model's logits are not finite: this checkpoint cannot continue a text"
    )
  return tokens


def _allowed(logits_BV: jax.Array, settings: Settings) -> jax.Array:
  """Where top-k and top-p leave a token in. The most likely one always stays."""
  top_k_B, top_p_B = jnp.asarray(settings.top_k), jnp.asarray(settings.top_p)
  cut_B = (top_k_B > 0) | (top_p_B < 1)

  def cut() -> jax.Array:
    order_BV = jnp.argsort(-logits_BV, axis=1, stable=True)
    share_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=1), axis=1)
    before_BV = jnp.cumsum(share_BV, axis=1) - share_BV
    rank_V = jnp.arange(logits_BV.shape[1])
    most_B = jnp.where(top_k_B > 0, top_k_B, rank_V.size)
    stays_BV = (rank_V < most_B[:, None]) & (before_BV < top_p_B[:, None])
    stays_BV = stays_BV | (rank_V == 0) | ~cut_B[:, None]
    each_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return jnp.zeros(logits_BV.shape, bool).at[each_B1, order_BV].set(stays_BV)

  return jax.lax.cond(cut_B.any(), cut, lambda: jnp.ones(logits_BV.shape, bool))


def _noise(index_B: jax.Array, settings: Settings, V: int) -> jax.Array:
  """Gumbel noise: the argmax of logits + noise is a draw from their softmax."""

  def one(seed, index):
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), index), (V,))

  return jax.vmap(one)(jnp.asarray(settings.seed), index_B)
