"""Gathers of parameters divided over `fsdp`, and constraints on activations divided by batch.

Heads, hidden widths and the vocabulary are divided over `tensor`, experts over `expert`, and one
other large axis over `fsdp` (model/params.py): what `fsdp` divides is stored in parts and gathered
for the layer that uses it. Activations are divided by sequence over the batch's axes.
"""

import functools
from typing import Any, TypeGuard

import jax
from jax import lax
from jax.lax import with_sharding_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engram_jax.core.mesh import BATCH_AXES
from engram_jax.model.params import is_gathered_by_dispatch, param_shardings


def constrain_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
  """Constrains the leading axis of `x` to be divided over the batch's mesh axes, no other."""
  if not is_sharded(mesh):
    return x
  return with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))


def is_sharded(mesh: Mesh | None) -> TypeGuard[Mesh]:
  """Says whether arrays are divided: a mesh of more than one device."""
  return mesh is not None and mesh.size > 1


def gather_params(params: Any, mesh: Mesh | None) -> Any:
  """All-gathers the parameters that `fsdp` divides; gradients arrive divided again."""
  if not is_sharded(mesh):
    return params

  def gather(path: Any, w: jax.Array, stored: NamedSharding) -> jax.Array:
    return w if is_gathered_by_dispatch(path) else _gather(w, stored, _without_fsdp(stored))

  return jax.tree_util.tree_map_with_path(gather, params, param_shardings(params, mesh))


def all_gather_param(w: jax.Array, spec: PartitionSpec) -> jax.Array:
  """All-gathers an array of which each device has the part that `spec` says; inside `shard_map`.

  Its gradient returns to the parts by a reduce-scatter.
  """
  for axis, names in enumerate(spec):
    if names is not None:
      w = lax.all_gather(w, names, axis=axis, tiled=True)
  return w


def constrain_stack(stacked: Any, layer: Any, mesh: Mesh | None) -> Any:
  """Constrains stacked arrays to the sharding of one `layer`, undivided along the layers."""
  if not is_sharded(mesh):
    return stacked
  over = lambda s: NamedSharding(mesh, PartitionSpec(None, *s.spec))
  return jax.tree.map(
    lambda x, s: with_sharding_constraint(x, over(s)), stacked, param_shardings(layer, mesh)
  )


def is_param_gather(primitive: Any, params: dict[str, Any]) -> bool:
  """Says whether an equation, as a policy of `jax.checkpoint` meets it, gathers a parameter."""
  if primitive.name == "custom_vjp_call":
    inner = params["call_jaxpr"].eqns
    return bool(inner) and all(eqn.primitive.name == "sharding_constraint" for eqn in inner)
  return primitive.name == "all_gather"


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(w: jax.Array, stored: NamedSharding, full: NamedSharding) -> jax.Array:
  # Constrained as stored first, or the partitioner may gather the array from before the cast.
  return with_sharding_constraint(with_sharding_constraint(w, stored), full)


def _gather_forward(w, stored, full):
  return _gather(w, stored, full), None


def _gather_backward(stored, full, _, dw):
  # An automatic transpose would ask for the full gradient everywhere: an all-reduce where a
  # reduce-scatter does.
  return (with_sharding_constraint(dw, stored),)


_gather.defvjp(_gather_forward, _gather_backward)


def _without_fsdp(sharding: NamedSharding) -> NamedSharding:
  rest = lambda axes: tuple(axis for axis in axes if axis != "fsdp") or None
  spec = (rest(_axes(entry)) for entry in sharding.spec)
  return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _axes(entry: Any) -> tuple[str, ...]:
  return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
