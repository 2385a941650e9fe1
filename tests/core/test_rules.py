"""Shardings by rule, on meshes that no device is needed for."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from engram_jax.config import Config, EngramConfig, ModelConfig
from engram_jax.core.mesh import AXES, batch_sharding, batch_shards
from engram_jax.core.rules import ShardingRule, shardings, state_shardings
from engram_jax.model.lm import LM
from engram_jax.model.params import param_shardings
from engram_jax.training.optimizer import backbone_optimizer


def mesh(**sizes: int) -> AbstractMesh:
  return AbstractMesh(
    tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES)
  )


def array(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def specs(tree):
  return jax.tree.map(lambda sharding: sharding.spec, tree)


@pytest.fixture(scope="module")
def params():
  cfg = ModelConfig(engram=EngramConfig(layers=(1,), heads=2, row_width=8, rows_per_head=(50,) * 2))
  shapes = nnx.eval_shape(lambda: LM(cfg, rngs=nnx.Rngs(0)))
  return nnx.to_pure_dict(nnx.split(shapes, nnx.Param, ...)[1])


def test_every_parameter_has_a_place(params):
  place = specs(param_shardings(params, mesh(fsdp=4, expert=2, tensor=2)))
  assert place["embedding"] == P(("tensor", "fsdp"), None)
  assert place["head"] == P("fsdp", "tensor")
  assert place["g_final"] == P()
  layer = place["blocks"][1]
  assert layer["attention"]["w_out"] == P("tensor", "fsdp", None)
  assert layer["attention"]["w_key_up"] == P("fsdp", "tensor", None)
  assert layer["moe"]["w_experts_up"] == P("expert", "fsdp", "tensor")
  assert layer["moe"]["w_experts_down"] == P("expert", ("tensor", "fsdp"), None)
  assert layer["engram"]["w_key"] == P("fsdp", None, None)
  assert layer["attention_residual"]["w_mix"] == P(None, None, "fsdp")


def test_every_large_parameter_is_divided_by_fsdp(params):
  place = param_shardings(params, mesh(fsdp=8))
  whole = {
    x.shape
    for x, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(place), strict=True)
    if x.size > 4000 and "fsdp" not in str(sharding.spec)
  }
  assert whole == set()


def test_axes_that_do_not_divide_stay_whole():
  rules = (ShardingRule("w", "tf ."), ShardingRule("mix", ". . f"))
  tree = {"w": array(6, 5), "mix": array(24, 4, 10)}
  assert specs(shardings(tree, rules, mesh(fsdp=4, tensor=2))) == {
    "w": P("tensor", None),
    "mix": P(None, None, None),
  }


def test_what_no_rule_names_is_refused():
  with pytest.raises(ValueError, match=r"no rule names parameter 'a/odd' of shape \(2,\)"):
    shardings({"a": {"odd": array(2)}}, (ShardingRule("w", "f"),), mesh())


def test_a_rule_for_another_number_of_axes_is_refused():
  with pytest.raises(ValueError, match=r"'w' of shape \(2, 3\) has 2 axes, but .* reads 'f'"):
    shardings({"w": array(2, 3)}, (ShardingRule("w", "f"),), mesh())


@pytest.mark.parametrize("axes", ["f f", "tf t", ". ff"])
def test_a_mesh_axis_named_twice_is_refused(axes):
  with pytest.raises(ValueError, match=r"names mesh axis '(fsdp|tensor)' twice"):
    shardings({}, (ShardingRule("w", axes),), mesh())


def test_an_unknown_letter_is_refused():
  with pytest.raises(ValueError, match=r"has letter 'x' in '\. x': the letters are f, t, e"):
    shardings({}, (ShardingRule("w", ". x"),), mesh())


def test_optimizer_states_lie_as_their_parameters(params):
  devices = mesh(fsdp=2, tensor=2)
  place = param_shardings(params, devices)
  optimizer = backbone_optimizer(Config().train.optimizer, optax.constant_schedule(1e-3), params)
  state = jax.eval_shape(optimizer.init, params)
  placed = state_shardings(state, params, place, devices)
  assert jax.tree.structure(placed) == jax.tree.structure(state)
  leaves = list(zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True))
  divided = sum(x.size for x, sharding in leaves if sharding.spec != P())
  assert divided > 0.95 * sum(x.size for x, _ in leaves)
  muon = placed[0].inner_states["muon"].inner_state[0].mu
  assert muon["blocks"][0]["attention"]["w_out"].spec == P("tensor", "fsdp", None)
  adam = placed[0].inner_states["adam"].inner_state[0]
  assert adam.nu["embedding"].spec == P(("tensor", "fsdp"), None)
  assert adam.count.spec == P()


def test_the_batch_is_divided_over_all_axes_but_tensor():
  devices = mesh(data=2, fsdp=3, expert=4, tensor=5)
  assert batch_sharding(devices).spec == P(("data", "fsdp", "expert"))
  assert batch_shards(devices) == 24
