"""The backbone's optimizer: Muon for matrices, AdamW for the rest, by rule over parameter paths."""

import re
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from engram_jax.config import OptimizerConfig
from engram_jax.core.schedule import Schedule
from engram_jax.training.muon import scale_by_muon

ADAM_RMS = 0.2  # of an Adam update, in units of the learning rate (arXiv 2502.16982)


class Rule(NamedTuple):
  """What trains the parameters whose path ends in keys that match `pattern`.

  axes: one letter per axis, I in, O out, and any other letter counts matrices, each of which is
  orthogonalised by itself; empty where there is no matrix, and any number of axes will do.
  """

  pattern: str
  group: Literal["muon", "adam", "adam_no_decay"]
  axes: str = ""


# The first match wins. Decay is for weights that multiply activations and would grow without it;
# gains, biases, mixing scalars and the convolution rest at values that mean something (1 is "as it
# is", 0 is "off"), and decay would pull them elsewhere. Heads share one matrix, as in the paper's
# notation; experts and branches have one each.
RULES = (
  Rule("attention/w_(query|query_up|key_up|value_up)", "muon", "IOO"),
  Rule("attention/w_(query_down|latent|key_rope)", "muon", "IO"),
  Rule("attention/w_out", "muon", "IIO"),
  Rule("(feed_forward|shared)/w_(gate|up|down)", "muon", "IO"),
  Rule("moe/w_experts_(gate|up|down)", "muon", "EIO"),
  Rule("moe/w_router", "adam"),
  Rule("engram/w_key", "muon", "IGO"),
  Rule("engram/w_value", "muon", "IO"),
  Rule("engram/w_conv", "adam_no_decay"),
  Rule("(attention|feed_forward)_residual/w_mix", "adam"),
  Rule("embedding|head", "adam"),
  Rule(r"[abg]_\w+", "adam_no_decay"),
)


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
  groups = {
    "muon": optax.chain(muon, _scale_to_adam(), decay),
    "adam": optax.chain(adam, decay),
    "adam_no_decay": adam,
  }
  return optax.chain(
    optax.partition(groups, parameter_groups), optax.scale_by_learning_rate(schedule)
  )


def at_step(state: Any, step: int) -> Any:
  """A new state of `backbone_optimizer`, at the learning rate of that step of the schedule.

  Moments know nothing yet, and their own counts, which correct them for that, stay zero.
  """
  *moments, scheduled = state
  assert isinstance(scheduled, optax.ScaleByScheduleState), type(scheduled)
  return *moments, scheduled._replace(count=jnp.full((), step, jnp.int32))


def parameter_groups(params: Any) -> Any:
  """The tree of "muon", "adam" or "adam_no_decay", one for each parameter."""
  return jax.tree_util.tree_map_with_path(lambda path, x: _rule(path, x).group, params)


def _axes(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(lambda path, x: _rule(path, x).axes, params)


def _scale_to_adam() -> optax.GradientTransformation:
  """From orthogonal matrices, whose entries have an RMS of 1 / sqrt(max(in, out)), to ADAM_RMS."""

  def scale(path: Any, update: jax.Array) -> jax.Array:
    rule = _rule(path, update)
    sides = {"I": 1, "O": 1}
    for axis, size in zip(rule.axes, update.shape, strict=True):
      sides[axis] = sides.get(axis, 1) * size
    return update * (ADAM_RMS * max(sides["I"], sides["O"]) ** 0.5)

  return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def _rule(path: Any, x: Any) -> Rule:
  # An nnx.State keeps each array under a last key "value"; a pure dict does not.
  name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
  rule = next((rule for rule in RULES if re.fullmatch(rf"(.*/)?({rule.pattern})", name)), None)
  if rule is None:
    raise ValueError(
      f"no optimizer rule names parameter {name!r} of shape {tuple(x.shape)}: "
      "add one to RULES in engram_jax/training/optimizer.py"
    )
  if rule.axes and len(rule.axes) != len(x.shape):
    raise ValueError(
      f"parameter {name!r} of shape {tuple(x.shape)} has {len(x.shape)} axes, "
      f"but its optimizer rule reads {rule.axes!r}"
    )
  return rule
