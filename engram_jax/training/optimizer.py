"""The backbone's optimizer: Muon for matrices, AdamW for the rest, by rule over parameter paths."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from engram_jax.config import OptimizerConfig
from engram_jax.core.schedule import Schedule
from engram_jax.model.params import param_rule
from engram_jax.training.muon import scale_by_muon

ADAM_RMS = 0.2  # of an Adam update, in units of the learning rate (arXiv 2502.16982)


def backbone_optimizer(
  cfg: OptimizerConfig, schedule: Schedule, params: Any, mesh: Mesh | None = None
) -> optax.GradientTransformation:
  """Muon on matrices and AdamW on everything else, at one learning rate.

  Muon (https://kellerjordan.github.io/posts/muon) orthogonalises the momentum of a matrix by
  Newton-Schulz iterations (training/muon.py), and here scales it by
  0.2 sqrt(max(in, out)), so that its entries move as far as Adam's would (arXiv 2502.16982): one
  learning rate and one weight decay serve both.

  Args:
    cfg: betas, momentum, weight decay, Newton-Schulz iterations.
    schedule: the learning rate of a 0-based step.
    params: the tree to be trained (arrays or their shapes), checked against the rules here.
    mesh: the devices that share the orthogonalisation.

  Raises:
    ValueError: a parameter that no rule names, with its path and shape.
  """
  parameter_groups(params)
  adam = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps)
  decay = optax.add_decayed_weights(cfg.weight_decay)
  muon = scale_by_muon(_axes, cfg.newton_schulz_steps, cfg.momentum, mesh)
  groups: dict[Any, Any] = {
    "muon": optax.chain(muon, _scale_to_adam(), decay),
    "adam": optax.chain(adam, decay),
    "adam_no_decay": adam,
  }
  return optax.chain(
    optax.partition(groups, parameter_groups), optax.scale_by_learning_rate(schedule)
  )


def at_step(state: Any, step: int) -> Any:
  """Sets a new state of `backbone_optimizer` to the learning rate of that step of the schedule.

  Moments and their counts, which correct their bias, stay zero.
  """
  *moments, scheduled = state
  assert isinstance(scheduled, optax.ScaleByScheduleState), type(scheduled)
  return *moments, scheduled._replace(count=jnp.full((), step, jnp.int32))


def parameter_groups(params: Any) -> Any:
  """Returns a tree of "muon", "adam" or "adam_no_decay", one for each parameter."""
  return jax.tree_util.tree_map_with_path(lambda path, x: param_rule(path, x).group, params)


def _axes(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(lambda path, x: param_rule(path, x).matrix, params)


def _scale_to_adam() -> optax.GradientTransformation:
  """Scales orthogonal matrices, with entries of RMS 1 / sqrt(max(in, out)), to ADAM_RMS."""

  def scale(path: Any, update: jax.Array) -> jax.Array:
    rule = param_rule(path, update)
    sides = {"I": 1, "O": 1}
    for axis, size in zip(rule.matrix, update.shape, strict=True):
      sides[axis] = sides.get(axis, 1) * size
    return update * (ADAM_RMS * max(sides["I"], sides["O"]) ** 0.5)

  return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))
