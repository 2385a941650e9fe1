"""Every parameter of the model in one table: its shape, its sharding, its optimizer, its dtype.

A path is a parameter's keys joined by "/"; the first entry whose pattern matches its end counts. A
parameter that no entry names is an error, so a new one is declared here before it can be trained.

Local letters, in shapes: H, heads; L, latent; Q, query latent; n, r and v, widths of a head's
unrotated part, its rotary part and its value; E, routed experts; F, hidden width; W, taps of the
convolution. In the matrices of Muon: I, input; O, output.
"""

import re
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

from engram_jax.core.rules import ShardingRule, find_rule, path_name, shardings


class ParamRule(NamedTuple):
  """Treatment of the parameters whose path ends in keys that match `pattern`.

  shape: a word per axis; empty where the pattern names parameters of several shapes.
  axes: a word per axis, the mesh axes that divide it: f `fsdp`, t `tensor`, e `expert`, "." none;
    empty where the array is undivided.
  group: the optimizer (training/optimizer.py) that trains them.
  matrix: for Muon, a letter per axis: I in, O out; any other letter counts matrices, each of which
    is orthogonalised by itself. Heads share one matrix, as in the paper's notation; experts and
    branches have one each.
  is_cast: their use casts them to the compute dtype, so they may be gathered and stacked in it.
  """

  pattern: str
  shape: str
  axes: str
  group: Literal["muon", "adam", "adam_no_decay"]
  matrix: str = ""
  is_cast: bool = False


# `fsdp` divides no last axis where another will do: a reduce-scatter along the lanes of a TPU is
# lowered to an all-reduce unless the parts fill them, which costs twice the bytes.
#
# Decay is for weights that multiply activations and would grow without it; gains, biases, mixing
# scalars and the convolution rest at values that mean something (1 is "as it is", 0 is "off"), and
# decay would pull them elsewhere.
PARAM_RULES = (
  ParamRule("embedding", "V D", "tf .", "adam", is_cast=True),
  ParamRule("head", "D V", "f t", "adam"),
  ParamRule("attention/w_query", "D H n+r", "f t .", "muon", "IOO", True),
  ParamRule("attention/w_query_down", "D Q", "f .", "muon", "IO", True),
  ParamRule("attention/w_query_up", "Q H n+r", "f t .", "muon", "IOO", True),
  ParamRule("attention/w_latent", "D L", "f .", "muon", "IO", True),
  ParamRule("attention/w_key_rope", "D r", "f .", "muon", "IO", True),
  ParamRule("attention/w_key_up", "L H n", "f t .", "muon", "IOO", True),
  ParamRule("attention/w_value_up", "L H v", "f t .", "muon", "IOO", True),
  ParamRule("attention/w_out", "H v D", "t f .", "muon", "IIO", True),
  ParamRule("(feed_forward|shared)/w_(gate|up)", "D F", "f t", "muon", "IO", True),
  ParamRule("(feed_forward|shared)/w_down", "F D", "tf .", "muon", "IO", True),
  ParamRule("moe/w_router", "D E", "f .", "adam"),
  ParamRule("moe/w_experts_(gate|up)", "E D F", "e f t", "muon", "EIO", True),
  ParamRule("moe/w_experts_down", "E F D", "e tf .", "muon", "EIO", True),
  ParamRule("engram/w_key", "M G D", "f . .", "muon", "IGO", True),
  ParamRule("engram/w_value", "M D", "f .", "muon", "IO", True),
  ParamRule("engram/w_conv", "W G D", "", "adam_no_decay"),
  ParamRule("(attention|feed_forward)_residual/w_mix", "2G+GG G D", ". . f", "adam"),
  ParamRule(r"[abg]_\w+", "", "", "adam_no_decay"),
)
# Expert dispatch takes these as they are stored and gathers them itself.
GATHERED_BY_DISPATCH = r"(.*/)?moe/w_experts_\w+"


def param_rule(path: Any, x: Any) -> ParamRule:
  """Returns the entry of a parameter (an array or its shape); ValueError where none fits."""
  return find_rule(path_name(path), tuple(x.shape), PARAM_RULES, "model/params.py")


def param_shardings(params: Any, mesh: Mesh) -> Any:
  """Returns the NamedSharding of each parameter, or of its shape; see `core.rules.shardings`."""
  return shardings(params, [ShardingRule(rule.pattern, rule.axes) for rule in PARAM_RULES], mesh)


def expert_specs(weights: Any, mesh: Mesh) -> tuple[PartitionSpec, ...]:
  """Returns the specs of w_experts_gate, w_experts_up and w_experts_down."""
  names = ("gate", "up", "down")
  named = {f"moe/w_experts_{name}": w for name, w in zip(names, weights, strict=True)}
  sharding = param_shardings(named, mesh)
  return tuple(sharding[name].spec for name in named)


def to_compute_dtype(params: Any, dtype: Any) -> Any:
  """Casts the parameters whose use would cast them to the compute dtype; others stay."""
  return jax.tree_util.tree_map_with_path(
    lambda path, w: w.astype(dtype) if param_rule(path, w).is_cast else w, params
  )


def is_gathered_by_dispatch(path: Any) -> bool:
  """Says whether a parameter is gathered where experts are dispatched, not before its layer."""
  return re.fullmatch(GATHERED_BY_DISPATCH, path_name(path)) is not None
