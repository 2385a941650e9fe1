"""Every arm is a config that can be, at the budget's size unless its note says otherwise."""

import pytest

from engram_jax.config import load_config
from engram_jax.errors import ConfigError
from engram_jax.research import arms
from engram_jax.research.allocation import Budget, changed
from engram_jax.research.sweep import QUIET

UNEQUAL = ("wide",)  # says that it has more active parameters and FLOPs


def budget(name="micro"):
  return load_config(f"configs/{name}.yaml", dict(QUIET))


@pytest.mark.parametrize("name", ["micro", "tiny"])
@pytest.mark.parametrize("kind", ["controls", "ablation"])
def test_arms_have_the_size_of_the_budget(kind, name):
  cfg = budget(name)
  size, design = Budget.of(cfg), getattr(arms, kind)(cfg)
  for arm in design.arms:
    off = size.off(Budget.of(changed(cfg, arm.changes)))
    assert abs(off["total"]) <= 0.005, arm.name
    if arm.name not in UNEQUAL:
      assert abs(off["active"]) <= 0.005, arm.name
      assert abs(off["flops"]) <= 0.01, arm.name


@pytest.mark.parametrize("kind", ["controls", "ablation"])
def test_claims_compare_arms_that_there_are(kind):
  design = getattr(arms, kind)(budget())
  names = [arm.name for arm in design.arms]
  assert len(set(names)) == len(names)
  assert {c.arm for c in design.claims} | {c.against for c in design.claims} <= set(names)
  assert len({c.question for c in design.claims}) == len(design.claims)


def test_controls_differ_from_the_memory_in_one_field():
  by_name = {arm.name: arm.changes for arm in arms.controls(budget()).arms}
  for name in ("one_row", "other_window", "token", "frozen", "shuffled"):
    assert len(by_name[name]) == 1


def test_quick_controls_are_the_first_of_all():
  every, quick = arms.controls(budget()), arms.controls(budget(), quick=True)
  assert every.arms[: len(quick.arms)] == quick.arms
  assert every.claims[: len(quick.claims)] == quick.claims


def test_capacity_changes_rows_alone():
  cfg = budget()
  design = arms.capacity(cfg, (400, 200, 800))
  assert [arm.x for arm in design.arms] == [None, 200.0, 400.0, 800.0]
  active = {Budget.of(changed(cfg, arm.changes)).active for arm in design.arms[1:]}
  assert active == {Budget.of(cfg).active}


def test_a_sweep_begins_at_one_plain_memory():
  cfg = budget()
  for changes in (
    {"model.engram.layers": ()},
    {"model.engram.layers": (1, 2)},
    {"model.engram.gate": "none"},
    {"model.engram.address": "token"},
  ):
    with pytest.raises(ConfigError, match="a sweep begins at a model with one memory"):
      arms.controls(changed(cfg, changes))
