"""Models of equal size: expert counts, rows and widths that meet a budget (paper, section 3).

A budget is the size of a model: total and active parameters (model/counts.py says what each sum
holds) and FLOPs a token. P_sparse = total - active - the vocabulary matrix, which only the total
counts; of it experts that a token does not choose get rho, tables the rest. Rows are fine enough to
meet any total, experts are not, so the rho that was reached stands beside the one asked for. The
width of the leading dense blocks takes up what a memory's projections or a router add to the active
parameters.
"""

import dataclasses
from typing import Any, NamedTuple

from engram_jax.config import Config, ModelConfig, build
from engram_jax.errors import ConfigError
from engram_jax.model.counts import count, flops_per_token

MOST_PARAMETERS_OFF = 0.005  # total and active, of the budget's
MOST_FLOPS_OFF = 0.01
ROUNDS = 6  # each corrects what rounding in the one before left


class Budget(NamedTuple):
  """The size that models are to have: total and active parameters, forward FLOPs a token."""

  total: int
  active: int
  flops: float

  @classmethod
  def of(cls, cfg: Config) -> "Budget":
    """The size of a config's model."""
    n = count(cfg.model)
    flops = flops_per_token(cfg.model, cfg.data.sequence_length)
    return cls(n.total_parameters, n.active_parameters, flops)

  def off(self, other: "Budget") -> dict[str, float]:
    """Distance of another size from this one by field, as fractions of this."""
    return {name: getattr(other, name) / getattr(self, name) - 1 for name in self._fields}


@dataclasses.dataclass(frozen=True)
class Split:
  """A model that meets a budget, and the share of its sparse parameters that are experts.

  changes: {dotted path: value} over the budget's config. size: what it came to.
  """

  changes: dict[str, Any]
  size: Budget
  rho: float


def allocate(cfg: Config, rho: float, budget: Budget | None = None) -> Split:
  """Splits a budget's sparse parameters between routed experts and rows.

  Args:
    cfg: a model with experts, a leading dense block and, unless rho is 1, a memory: everything but
      the number of experts, the rows and the dense width stays as it is there.
    rho: in (0, 1]; the experts' share. 1 is a model without a memory.
    budget: what to meet; the size of `cfg` itself if left out.

  Raises ConfigError naming what is missing, or how far the nearest model is from the budget.
  """
  if not 0 < rho <= 1:
    raise ConfigError(f"--rho {rho} must be above 0 and at most 1 (no memory)")
  model, budget = cfg.model, budget or Budget.of(cfg)
  if not model.moe.routed_experts or not 0 < model.moe.leading_dense_layers < model.layers:
    raise ConfigError("a budget to split needs routed experts and a leading dense block")
  if rho < 1 and not model.engram.layers:
    raise ConfigError(f"--rho {rho} leaves parameters for rows, but model.engram.layers is empty")
  blocks = model.layers - model.moe.leading_dense_layers
  expert = 3 * model.width * model.moe.expert_width * blocks
  sparse = budget.total - budget.active - model.vocab_size * model.width
  experts = model.moe.top_k + max(round(rho * sparse / expert), 0)
  changes: dict[str, Any] = {"model.moe.routed_experts": experts}
  if rho == 1:
    changes["model.engram.layers"] = ()
  split = match(cfg, changes, budget)
  n = count(changed(cfg, split.changes).model)
  reached = (n.routed_experts - n.chosen_experts) / (
    n.routed_experts - n.chosen_experts + n.tables - n.looked_up_rows
  )
  return dataclasses.replace(split, rho=reached)


def match(cfg: Config, changes: dict[str, Any], budget: Budget | None = None) -> Split:
  """Makes a changed model meet a budget: by rows, where it has a memory, and by its dense width.

  Args:
    cfg: the config that is changed. changes: {dotted path: value}.
    budget: what to meet; the size of `cfg` itself if left out.

  Raises ConfigError naming how far the nearest model is from the budget.
  """
  budget = budget or Budget.of(cfg)
  solved = dict(changes)
  for _ in range(ROUNDS):
    model = changed(cfg, solved).model
    before = dict(solved)
    if model.moe.leading_dense_layers:
      solved["model.moe.dense_width"] = _dense_width(model, budget)
      model = changed(cfg, solved).model
    if model.engram.layers:
      solved["model.engram.rows_per_head"] = _rows_per_head(model, budget)
    if solved == before:
      break
  size = Budget.of(changed(cfg, solved))
  _require_met(budget, size, changes)
  return Split(solved, size, 0.0)


def changed(cfg: Config, changes: dict[str, Any]) -> Config:
  """The config with the values at these dotted paths; ConfigError for ones that cannot be."""
  tree = cfg.model_dump(mode="json")
  for path, value in changes.items():
    *parents, name = path.split(".")
    node = tree
    for parent in parents:
      node = node[parent]
    if name not in node:
      raise ConfigError(f"{path} is no field of a config")
    node[name] = list(value) if isinstance(value, tuple) else value
  return build(tree, where=", ".join(changes) or "config")


def _dense_width(model: ModelConfig, budget: Budget) -> int:
  """The width of the dense blocks that brings the active parameters nearest to the budget's."""
  missing = budget.active - count(model).active_parameters
  width = model.moe.dense_width + round(
    missing / (3 * model.width * model.moe.leading_dense_layers)
  )
  return max(width, 1)


def _rows_per_head(model: ModelConfig, budget: Budget) -> tuple[int, ...]:
  """Rows a head, in the same proportion of orders, that bring the total near the budget's."""
  n, engram = count(model), model.engram
  wanted = n.tables + budget.total - n.total_parameters
  factor = max(wanted, 1) / n.tables
  return tuple(max(round(rows * factor), 2) for rows in engram.rows_per_head)


def _require_met(budget: Budget, size: Budget, changes: dict[str, Any]) -> None:
  off = budget.off(size)
  limits = {"total": MOST_PARAMETERS_OFF, "active": MOST_PARAMETERS_OFF, "flops": MOST_FLOPS_OFF}
  worst = {name: off[name] for name, limit in limits.items() if abs(off[name]) > limit}
  if worst:
    said = ", ".join(f"{name} {part:+.2%}" for name, part in worst.items())
    raise ConfigError(
      f"no model with {', '.join(f'{k}={v}' for k, v in changes.items())} meets the budget of "
      f"{budget.total:,} parameters, {budget.active:,} of them active: the nearest is off by {said}"
    )
