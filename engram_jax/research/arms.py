"""The models that each kind of sweep compares, and what is claimed of them.

An arm is a budget's config with a few fields changed, and `match` or `allocate` (allocation.py)
have made its size that of the budget unless its note says otherwise. A claim is a pair of arms
whose difference in validation loss, seed by seed, is to be judged.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from engram_jax.config import Config
from engram_jax.errors import ConfigError
from engram_jax.research.allocation import Budget, allocate, changed, match

MEMORY, TWIN = "memory", "twin"
SHUFFLED = "shuffled"  # begins the names of arms on other text


@dataclasses.dataclass(frozen=True)
class Arm:
  """One model of a sweep.

  changes: {dotted path: value} over the budget's config. about: a phrase for tables. x: its place
  on the axis of a plot, where the sweep is a curve. budget: the name of the budget's config, where
  a sweep has several.
  """

  name: str
  changes: dict[str, Any]
  about: str
  x: float | None = None
  budget: str = ""


@dataclasses.dataclass(frozen=True)
class Claim:
  """A question about two arms: is the loss of `arm` above that of `against`?"""

  question: str
  arm: str
  against: str


@dataclasses.dataclass(frozen=True)
class Design:
  """The arms of a sweep in the order of tables, and the claims in the order of their weight."""

  arms: tuple[Arm, ...]
  claims: tuple[Claim, ...]
  axis: str = ""  # of the plot: what `Arm.x` is; empty for bars


def controls(cfg: Config, *, quick: bool = False) -> Design:
  """Arms that keep the module and take away what it could remember, and rivals of it.

  quick: those that decide between rows and projections, for a verdict in an hour.
  """
  _require_memory(cfg)
  twin = allocate(cfg, 1.0).changes
  first = [
    Arm(MEMORY, {}, "the memory as the paper has it"),
    Arm(TWIN, twin, "no memory: more experts and a wider dense block"),
    Arm("one_row", {"model.engram.address": "one_row"}, "one row a head for every token"),
    Arm(
      "other_window",
      {"model.engram.address": "other_window"},
      "rows of another window at the same place",
    ),
    Arm("token", {"model.engram.address": "token"}, "rows addressed by the token alone"),
    Arm("plain_bigram", _plain_bigram(cfg), "bigram rows added as they are"),
  ]
  more = [
    Arm("frozen", {"train.optimizer.table": "frozen"}, "rows stay as they were drawn"),
    Arm("input_embedding", _input_embedding(cfg), "n-gram rows projected into the input embedding"),
    Arm("wide", _wide(cfg), "no memory: wider experts; more active parameters and FLOPs"),
    Arm(SHUFFLED, {"data.shuffle_tokens": True}, "memory, tokens of each document shuffled"),
    Arm(f"{SHUFFLED}_{TWIN}", twin | {"data.shuffle_tokens": True}, "twin, tokens shuffled"),
  ]
  claims = [
    Claim("Does the memory beat experts at equal parameters?", TWIN, MEMORY),
    Claim("Is it the rows, not the projections (one row a head)?", "one_row", MEMORY),
    Claim("Is it what the n-grams address (other window)?", "other_window", MEMORY),
    Claim("Do n-grams say more than the token alone?", "token", MEMORY),
    Claim("Is the module worth more than plain bigram rows?", "plain_bigram", MEMORY),
    Claim("Is the module without its content any better than experts?", TWIN, "one_row"),
  ]
  more_claims = [
    Claim("Is training the rows worth something?", "frozen", MEMORY),
    Claim("Is a layer with a gate better than the input embedding?", "input_embedding", MEMORY),
    Claim("Does the memory beat wider experts?", "wide", MEMORY),
    Claim("Is anything left of the gain once tokens are shuffled?", "shuffled_twin", "shuffled"),
  ]
  arms = first if quick else first + more
  return Design(tuple(arms), tuple(claims if quick else claims + more_claims))


def allocation(cfg: Config, rhos: Sequence[float]) -> Design:
  """Splits of the sparse parameters: the loss over rho, the experts' share."""
  _require_memory(cfg)
  arms = []
  for rho in sorted(set(rhos), reverse=True):
    split = allocate(cfg, rho)
    about = f"{split.changes['model.moe.routed_experts']} experts"
    arms.append(Arm(f"rho_{rho:g}", split.changes, about, x=split.rho))
  pure = [arm for arm in arms if arm.x == 1]
  claims = [
    Claim(f"Are {pure[0].about} alone worse than {arm.name}?", pure[0].name, arm.name)
    for arm in arms
    if pure and arm.x != 1
  ]
  return Design(tuple(arms), tuple(claims), axis="rho, the experts' share of sparse parameters")


def capacity(cfg: Config, rows: Sequence[int]) -> Design:
  """One backbone with tables that double, at sizes that are not equal."""
  _require_memory(cfg)
  arms = [Arm("no_memory", {"model.engram.layers": ()}, "the same backbone without a memory")]
  for n in sorted(set(rows)):
    changes = {"model.engram.rows_per_head": n}
    total = Budget.of(changed(cfg, changes)).total
    arms.append(Arm(f"rows_{n}", changes, f"{total:,} parameters", x=float(n)))
  claims = tuple(
    Claim(f"Do {b.x:g} rows a head beat {a.x:g}?", a.name, b.name)
    for a, b in itertools.pairwise(arms[1:])
  )
  return Design(tuple(arms), claims, axis="rows a head")


def ablation(cfg: Config) -> Design:
  """Arms that each change one part of the memory, at equal size."""
  _require_memory(cfg)
  engram, model = cfg.model.engram, cfg.model
  rows = engram.rows_per_head[0]
  arms = [Arm(MEMORY, {}, f"the reference: a memory at block {engram.layers[0]}")]

  def add(name: str, changes: dict[str, Any], about: str) -> None:
    arms.append(Arm(name, match(cfg, changes).changes, about))

  for layer in range(model.layers):
    if (layer,) != engram.layers:
      add(f"layer_{layer}", {"model.engram.layers": (layer,)}, f"at block {layer}")
  if model.layers > 2:
    two = (1, model.layers - 1)
    halves = {"model.engram.layers": two, "model.engram.rows_per_head": max(rows // 2, 2)}
    add("two_layers", halves, f"at blocks {two[0]} and {two[1]}, half the rows in each")
  add("no_compression", {"model.engram.compress": False}, "the tokenizer's own ids are hashed")
  add("no_gate", {"model.engram.gate": "none"}, "the value is added as it is")
  add("sigmoid_gate", {"model.engram.gate": "sigmoid"}, "sigmoid(s) in place of the signed root")
  one = {"model.residual.branches": 1}
  add("one_branch", one, "a plain residual stream, one gate")
  arms.append(_one_branch_twin(cfg, one))
  add("no_conv", {"model.engram.conv_kernel": 0}, "no short convolution")
  grams = {"model.engram.max_ngram": 4, "model.engram.rows_per_head": max(2 * rows // 3, 2)}
  add("four_grams", grams, "2-, 3- and 4-grams, rows divided among them")
  add("rate_1", {"train.optimizer.table_rate": 1.0}, "rows at the backbone's learning rate")
  add("sinkhorn", {"train.optimizer.table": "sinkhorn"}, "V4.1's momentum and Sinkhorn for rows")
  add("adagrad", {"train.optimizer.table": "adagrad"}, "row-wise Adagrad for rows")
  questions = {
    "no_gate": "Is the gate worth more than plain addition?",
    "no_compression": "Does compression of the vocabulary help?",
    "no_conv": "Does the short convolution help?",
    "sigmoid_gate": "Is the signed root better than a plain sigmoid?",
    "four_grams": "Are 2- and 3-grams better than 2- to 4-grams?",
    "rate_1": "Does a learning rate of five times the backbone's help?",
    "sinkhorn": "Is Adam better than Sinkhorn?",
    "two_layers": "Is one memory better than two of half the rows?",
  }
  claims = [Claim(question, name, MEMORY) for name, question in questions.items()]
  names = {arm.name for arm in arms}
  claims.append(
    Claim("With one branch, does the memory beat experts?", "one_branch_twin", "one_branch")
  )
  return Design(tuple(arms), tuple(c for c in claims if c.arm in names))


def ladder(configs: dict[str, Config]) -> Design:
  """A memory and its twin at each of several sizes, with tokens by one rule.

  configs: {name: config}, smallest first; each is trained as its own steps say.
  """
  arms, claims = [], []
  for name, cfg in configs.items():
    _require_memory(cfg)
    budget = Budget.of(cfg)
    arms.append(Arm(f"{name}_{MEMORY}", {}, "memory", x=float(budget.active), budget=name))
    changes = allocate(cfg, 1.0).changes
    arms.append(
      Arm(f"{name}_{TWIN}", changes, "no memory: more experts", x=float(budget.active), budget=name)
    )
    question = f"At {budget.active:,} active parameters, does the memory beat experts?"
    claims.append(Claim(question, f"{name}_{TWIN}", f"{name}_{MEMORY}"))
  return Design(tuple(arms), tuple(claims), axis="active parameters")


def _require_memory(cfg: Config) -> None:
  engram = cfg.model.engram
  if len(engram.layers) != 1 or engram.is_control or engram.gate == "none":
    raise ConfigError(
      f"a sweep begins at a model with one memory as the paper has it, not layers="
      f"{list(engram.layers)}, address={engram.address!r}, gate={engram.gate!r}"
    )


def _plain_bigram(cfg: Config) -> dict[str, Any]:
  """One row of model width for each hashed bigram, added at the block's entry."""
  changes = {
    "model.engram.max_ngram": 2,
    "model.engram.heads": 1,
    "model.engram.row_width": cfg.model.width,
    "model.engram.rows_per_head": cfg.model.engram.rows_per_head[0],  # to be solved
    "model.engram.gate": "none",
    "model.engram.projections": False,
    "model.engram.conv_kernel": 0,
  }
  return match(cfg, changes).changes


def _input_embedding(cfg: Config) -> dict[str, Any]:
  """n-gram embeddings as OverEncoding has them: projected, and added before the first block."""
  changes = {
    "model.engram.layers": (0,),
    "model.engram.gate": "none",
    "model.engram.conv_kernel": 0,
  }
  return match(cfg, changes).changes


def _wide(cfg: Config) -> dict[str, Any]:
  """No memory; experts so wide that the total is the budget's, and more active with them."""
  base = changed(cfg, {"model.engram.layers": ()})
  budget, width = Budget.of(cfg).total, cfg.model.moe.expert_width
  while (size := Budget.of(changed(base, {"model.moe.expert_width": width})).total) < budget:
    width += max((budget - size) * width // (8 * size), 1)
  return {"model.engram.layers": (), "model.moe.expert_width": width}


def _one_branch_twin(cfg: Config, one: dict[str, Any]) -> Arm:
  """The twin of `one_branch`, at the budget's size too."""
  budget = Budget.of(cfg)
  changes = allocate(changed(cfg, one), 1.0, budget).changes | one
  return Arm("one_branch_twin", changes, "no memory, a plain residual stream")
