"""The table of parameters says of each what the model has, and names every one."""

import re

import jax
from flax import nnx

from engram_jax.config import load_config
from engram_jax.core.rules import path_name
from engram_jax.model.lm import LM
from engram_jax.model.params import PARAM_RULES, param_rule

CHANGES = {
  "model.width": 10,
  "model.vocab_size": 300,
  "model.layers": 3,
  "model.attention.heads": 3,
  "model.attention.latent": 7,
  "model.attention.nope_dim": 5,
  "model.attention.rope_dim": 2,
  "model.attention.value_dim": 6,
  "model.moe.routed_experts": 9,
  "model.moe.expert_width": 11,
  "model.moe.dense_width": 11,
  "model.residual.branches": 4,
  "model.engram.layers": [1],
  "model.engram.heads": 2,
  "model.engram.row_width": 8,
  "model.engram.bias": True,
  "model.engram.conv_kernel": 4,
}
# M = 2 orders x 2 heads x 8; W and G are both 4 here, E 9 and F 11.
SIZES = {"D": 10, "V": 300, "H": 3, "L": 7, "Q": 13, "n": 5, "r": 2, "v": 6, "E": 9, "F": 11}
SIZES |= {"G": 4, "M": 32, "W": 4, "n+r": 7, "2G+GG": 24}


def params(**changes) -> list:
  """(path, shape) of each parameter."""
  cfg = load_config(None, CHANGES | changes)
  shapes = nnx.eval_shape(lambda: LM(cfg.model, rngs=nnx.Rngs(0)))
  return jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.split(shapes, nnx.Param, ...)[1]))


def test_shapes_are_those_of_the_model():
  met = set()
  for latent in (0, 13):
    for path, x in params(**{"model.attention.query_latent": latent}):
      rule = param_rule(path, x)
      met.add(rule.pattern)
      if rule.shape:
        assert x.shape == tuple(SIZES[word] for word in rule.shape.split()), path_name(path)
      assert not rule.matrix or len(rule.matrix) == len(x.shape)
  assert met == {rule.pattern for rule in PARAM_RULES}


def test_what_muon_trains_is_cast_to_the_compute_dtype():
  assert all(rule.is_cast for rule in PARAM_RULES if rule.group == "muon")
  assert all(re.fullmatch("[IOGE]+", r.matrix) for r in PARAM_RULES if r.group == "muon")
