"""Models of one budget have its size, by arithmetic and by the arrays of the model itself."""

import jax
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import load_config
from engram_jax.errors import ConfigError
from engram_jax.model.counts import count
from engram_jax.model.lm import LM
from engram_jax.research.allocation import Budget, allocate, changed, match

RHOS = (1.0, 0.95, 0.85, 0.75, 0.6, 0.4, 0.25, 0.1)


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("name", ["micro", "tiny", "small"])
def test_splits_have_the_budgets_size_and_nearly_the_rho_asked_for(name, rho):
  cfg = load_config(f"configs/{name}.yaml")
  budget, split = Budget.of(cfg), allocate(cfg, rho)
  off = budget.off(split.size)
  assert max(abs(off["total"]), abs(off["active"])) <= 0.005
  assert abs(off["flops"]) <= 0.01
  assert split.size == Budget.of(changed(cfg, split.changes))
  model = cfg.model
  blocks = model.layers - model.moe.leading_dense_layers
  expert = 3 * model.width * model.moe.expert_width * blocks  # the finest step there is
  sparse = budget.total - budget.active - model.vocab_size * model.width
  assert abs(split.rho - rho) <= 0.51 * expert / sparse + 0.005
  assert bool(changed(cfg, split.changes).model.engram.layers) == (rho < 1)


def test_a_split_counts_the_arrays_of_its_model():
  cfg = load_config("configs/micro.yaml")
  for rho in (1.0, 0.4):
    split = allocate(cfg, rho)
    model = changed(cfg, split.changes).model
    params = nnx.state(nnx.eval_shape(lambda m=model: LM(m, rngs=nnx.Rngs(0))), nnx.Param)
    arrays = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(nnx.to_pure_dict(params)))
    embedding = model.vocab_size * model.width
    assert split.size.total == arrays - embedding + count(model).tables


def test_the_budgets_own_rho_is_the_budgets_own_model():
  cfg = load_config("configs/tiny.yaml")
  split = allocate(cfg, 0.2507)
  assert changed(cfg, split.changes) == cfg


def test_what_a_part_frees_goes_into_the_dense_block():
  cfg = load_config("configs/tiny.yaml")
  split = match(cfg, {"model.engram.gate": "none"})
  assert split.changes["model.moe.dense_width"] > cfg.model.moe.dense_width
  assert abs(Budget.of(cfg).off(split.size)["active"]) < 0.001


@pytest.mark.parametrize("rho", [0.0, -1.0, 1.01])
def test_a_share_outside_0_to_1_is_refused(rho):
  with pytest.raises(ConfigError, match=r"--rho .* above 0 and at most 1"):
    allocate(load_config("configs/micro.yaml"), rho)


def test_what_cannot_be_split_or_met_is_refused_with_the_distance():
  cfg = load_config("configs/micro.yaml")
  with pytest.raises(ConfigError, match="needs routed experts and a leading dense block"):
    allocate(changed(cfg, {"model.moe.leading_dense_layers": 0}), 0.5)
  with pytest.raises(ConfigError, match=r"engram\.layers is empty"):
    allocate(changed(cfg, {"model.engram.layers": ()}), 0.5)
  with pytest.raises(ConfigError, match=r"the nearest is off by .*active \+\d"):
    match(cfg, {"model.attention.heads": 64})
  with pytest.raises(ConfigError, match=r"model\.moe\.expert is no field"):
    changed(cfg, {"model.moe.expert": 3})
