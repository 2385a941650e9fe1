"""Where the model's arrays lie on a mesh, and how a layer's parameters come together for use.

Heads, hidden widths and the vocabulary are divided over `tensor`, experts over `expert`, and one
other large axis over `fsdp`: what `fsdp` divides is stored in parts and gathered for the layer that
uses it. Activations are divided by sequence over the batch's axes.
"""

import functools
import re
from typing import Any

import jax
from jax import lax
from jax.lax import with_sharding_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engram_jax.core.mesh import BATCH_AXES
from engram_jax.core.rules import Rule, path_name, shardings

# `fsdp` divides no last axis where another will do: a reduce-scatter along the lanes of a TPU is
# lowered to an all-reduce unless the parts fill them, which costs twice the bytes.
RULES = (
  Rule("embedding", "tf ."),
  Rule("head", "f t"),
  Rule("attention/w_query", "f t ."),
  Rule("attention/w_(query|key|value)_up", "f t ."),
  Rule("attention/w_(query_down|latent|key_rope)", "f ."),
  Rule("attention/w_out", "t f ."),
  Rule("(feed_forward|shared)/w_(gate|up)", "f t"),
  Rule("(feed_forward|shared)/w_down", "tf ."),
  Rule("moe/w_experts_(gate|up)", "e f t"),
  Rule("moe/w_experts_down", "e tf ."),
  Rule("moe/w_router", "f ."),
  Rule("engram/w_key", "f . ."),
  Rule("engram/w_value", "f ."),
  Rule("(attention|feed_forward)_residual/w_mix", ". . f"),
  Rule(r"moe/bias|engram/w_conv|[abg]_\w+"),
)

# What its use casts to the compute dtype: it may travel, and be stacked, in that dtype.
_CAST = r"(attention|feed_forward|shared)/w_\w+|moe/w_experts_\w+|engram/w_(key|value)|embedding"
# Expert dispatch takes these as they are stored and gathers them itself.
_GATHERED_LATER = r"moe/w_experts_\w+"


def param_shardings(params: Any, mesh: Mesh) -> Any:
  """The NamedSharding of each parameter (or its ShapeDtypeStruct); see `core.rules.shardings`."""
  return shardings(params, RULES, mesh)


def expert_specs(weights: Any, mesh: Mesh) -> tuple[PartitionSpec, ...]:
  """Where w_experts_gate, w_experts_up and w_experts_down lie."""
  names = ("gate", "up", "down")
  named = {f"moe/w_experts_{name}": w for name, w in zip(names, weights, strict=True)}
  placed = param_shardings(named, mesh)
  return tuple(placed[name].spec for name in named)


def constrain_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
  """`x`, its leading axis divided over the batch's mesh axes and the others whole."""
  if not spread(mesh):
    return x
  return with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))


def spread(mesh: Mesh | None) -> bool:
  """Whether there is more than one device to think of."""
  return mesh is not None and mesh.size > 1


def cast(params: Any, dtype: Any) -> Any:
  """The parameters, those whose use would cast them in the compute dtype."""

  def one(path: Any, w: jax.Array) -> jax.Array:
    return w.astype(dtype) if _matches(_CAST, path) else w

  return jax.tree_util.tree_map_with_path(one, params)


def gather(params: Any, mesh: Mesh | None) -> Any:
  """The parameters with what `fsdp` divides put together; their gradients arrive divided again."""
  if not spread(mesh):
    return params

  def one(path: Any, w: jax.Array, stored: NamedSharding) -> jax.Array:
    return w if _matches(_GATHERED_LATER, path) else _gather(w, stored, _without_fsdp(stored))

  return jax.tree_util.tree_map_with_path(one, params, param_shardings(params, mesh))


def put_together(w: jax.Array, spec: PartitionSpec) -> jax.Array:
  """The whole of an array of which each device has the part that `spec` says; inside `shard_map`.

  Its gradient returns to the parts by a reduce-scatter.
  """
  for axis, names in enumerate(spec):
    if names is not None:
      w = lax.all_gather(w, names, axis=axis, tiled=True)
  return w


def constrain_stack(stacked: Any, layer: Any, mesh: Mesh | None) -> Any:
  """`stacked`, each array lying as the equal array of one `layer` does, whole along the layers."""
  if not spread(mesh):
    return stacked
  over = lambda s: NamedSharding(mesh, PartitionSpec(None, *s.spec))
  return jax.tree.map(
    lambda x, s: with_sharding_constraint(x, over(s)), stacked, param_shardings(layer, mesh)
  )


def gathered(primitive: Any, params: dict[str, Any]) -> bool:
  """Whether an equation, as a policy of `jax.checkpoint` meets it, puts a parameter together."""
  if primitive.name == "custom_vjp_call":
    inner = params["call_jaxpr"].eqns
    return bool(inner) and all(eqn.primitive.name == "sharding_constraint" for eqn in inner)
  return primitive.name == "all_gather"


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(w: jax.Array, stored: NamedSharding, whole: NamedSharding) -> jax.Array:
  # Held where it is stored first, or the partitioner may gather what came before the cast.
  return with_sharding_constraint(with_sharding_constraint(w, stored), whole)


def _gather_forward(w, stored, whole):
  return _gather(w, stored, whole), None


def _gather_backward(stored, whole, _, dw):
  # An automatic transpose would ask for the whole gradient everywhere: an all-reduce where a
  # reduce-scatter does.
  return (with_sharding_constraint(dw, stored),)


_gather.defvjp(_gather_forward, _gather_backward)


def _without_fsdp(sharding: NamedSharding) -> NamedSharding:
  rest = lambda axes: tuple(axis for axis in axes if axis != "fsdp") or None
  spec = (rest(_axes(entry)) for entry in sharding.spec)
  return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _axes(entry: Any) -> tuple[str, ...]:
  return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _matches(pattern: str, path: Any) -> bool:
  return re.fullmatch(rf"(.*/)?({pattern})", path_name(path)) is not None
