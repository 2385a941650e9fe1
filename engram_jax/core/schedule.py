"""The learning rate over a run: linear warm-up, then steps down, a cosine, or nothing."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from engram_jax.config import ScheduleConfig

Schedule = Callable[[Any], jax.Array]


def learning_rate(cfg: ScheduleConfig, peak: float, steps: int) -> Schedule:
  """The learning rate of each 0-based step of a run of `steps`, as a jittable function of it.

  Warm-up: step s takes (s + 1) / warmup_steps of the peak, so the first step already moves and
  step warmup_steps - 1 takes all of it. Afterwards

  - "step": peak x decay_to[i] from step decay_at[i] * steps on (rounded to a whole step), as in
    DeepSeek LLM (arXiv 2401.02954) and the Engram paper;
  - "cosine": half a cosine from the peak at the end of the warm-up to peak x final at `steps`;
  - "constant": the peak.
  """
  after = {"step": _steps_down, "cosine": _cosine, "constant": _constant}[cfg.kind](cfg, steps)
  warmup = max(cfg.warmup_steps, 1)

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    step = jnp.asarray(step)
    return peak * jnp.minimum((step + 1.0) / warmup, 1.0) * after(step)

  return schedule


def _steps_down(cfg: ScheduleConfig, steps: int) -> Schedule:
  starts = [round(share * steps) for share in cfg.decay_at]

  def factor(step: jax.Array) -> jax.Array:
    value = jnp.ones_like(step, jnp.float32)
    for start, to in zip(starts, cfg.decay_to, strict=True):
      value = jnp.where(step >= start, to, value)
    return value

  return factor


def _cosine(cfg: ScheduleConfig, steps: int) -> Schedule:
  length = max(steps - cfg.warmup_steps, 1)

  def factor(step: jax.Array) -> jax.Array:
    progress = jnp.clip((step - cfg.warmup_steps) / length, 0.0, 1.0)
    return cfg.final + (1.0 - cfg.final) * 0.5 * (1.0 + jnp.cos(math.pi * progress))

  return factor


def _constant(cfg: ScheduleConfig, steps: int) -> Schedule:
  del cfg, steps
  return lambda step: jnp.ones_like(step, jnp.float32)
