"""The blocks one after the other: unrolled or scanned, rematerialised or not.

Parameters are kept per layer whatever this file does with them, so a checkpoint does not know
whether its layers were scanned, and giving a layer a memory renames nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from engram_jax.config import ModelConfig
from engram_jax.model.block import Block
from engram_jax.model.moe import RouterBias
from engram_jax.model.routing import ROUTING
from engram_jax.model.sharding import (
  cast,
  constrain_batch,
  constrain_stack,
  gather,
  gathered,
  spread,
)

Probes = dict[str, list[jax.Array]]


def run_blocks(
  cfg: ModelConfig,
  blocks: Sequence[Block],
  x_BTGD: jax.Array,
  rows_of: Mapping[int, jax.Array],
  segments_BT: jax.Array,
  positions_BT: jax.Array,
  mesh: Mesh | None,
) -> tuple[jax.Array, Probes]:
  """The streams after all blocks, and every block's probes by name, in the order of layers.

  With `cfg.scan_layers` each run of equal blocks without a memory is one `lax.scan`: its parameters
  are stacked here, in the compute dtype where their use would cast them.

  Args:
    rows_of: [B, T, M] by layer.
  """
  probes: Probes = {"gate": [], "load": [], "hidden": []}
  split = [nnx.split(block, nnx.Param, RouterBias) for block in blocks]
  for run in _runs(split, rows_of) if cfg.scan_layers else ([layer] for layer in range(len(split))):
    graphdef = split[run[0]][0]
    weights = [tuple(map(nnx.to_pure_dict, split[layer][1:])) for layer in run]
    block = _block(cfg, graphdef, segments_BT, positions_BT, mesh, scanned=len(run) > 1)
    if len(run) > 1:
      stacked = _stack(weights, x_BTGD.dtype, mesh)
      with jax.named_scope(f"blocks_{run[0]}_to_{run[-1]}"):
        x_BTGD, seen = lax.scan(block, x_BTGD, stacked)
      each = [jax.tree.map(lambda value, i=i: value[i], seen) for i in range(len(run))]
    else:
      with jax.named_scope(f"block_{run[0]}"):
        x_BTGD, seen = block(x_BTGD, weights[0], rows_of.get(run[0]))
      each = [seen]
    for seen in each:
      for name, value in seen.items():
        probes[name].append(value)
  return x_BTGD, probes


def _block(cfg: ModelConfig, graphdef: Any, segments_BT, positions_BT, mesh, scanned: bool):
  """`(x_BTGD, (params, biases), rows_BTM) -> (x_BTGD, probes)` of one block, as cfg.remat says."""

  def call(x_BTGD, weights, rows_BTM=None):
    params, biases = weights
    if spread(mesh):
      params = gather(cast(params, x_BTGD.dtype), mesh)
    block = nnx.merge(graphdef, nnx.State(params), nnx.State(biases))
    x_BTGD, seen = block(x_BTGD, rows_BTM, segments_BT, positions_BT, mesh)
    x_BTGD = constrain_batch(x_BTGD, mesh)
    return x_BTGD, seen | {"hidden": x_BTGD.mean(2)}

  saved, routing = jax.checkpoint_policies, jax.checkpoint_policies.save_only_these_names(ROUTING)
  dots = saved.save_from_both_policies(saved.dots_with_no_batch_dims_saveable, routing)
  policies = {"block": routing, "dots": dots}
  if cfg.remat == "none" and not (spread(mesh) and mesh.shape["fsdp"] > 1):
    return call
  policy = policies.get(cfg.remat, _all_but_gathered)
  return jax.checkpoint(call, policy=policy, prevent_cse=not scanned)


def _all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
  # The backward pass gathers a layer's weights again; kept, they would be the whole model.
  return not gathered(primitive, params)


def _runs(split: Sequence[tuple], rows_of: Mapping[int, jax.Array]) -> list[list[int]]:
  """Layers in order, consecutive ones together where their blocks are equal and have no memory."""
  runs: list[list[int]] = []
  for layer in range(len(split)):
    last = runs[-1][-1] if runs else None
    apart = last is None or last in rows_of or layer in rows_of
    if apart or _form(split[last]) != _form(split[layer]):
      runs.append([])
    runs[-1].append(layer)
  return runs


def _form(split: tuple) -> Any:
  leaves, tree = jax.tree.flatten(split[1:])
  return split[0], tree, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _stack(weights: Sequence[tuple], dtype: Any, mesh: Mesh | None) -> tuple:
  params = [cast(params, dtype) for params, _ in weights]
  stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
  biases = stack([biases for _, biases in weights])
  return constrain_stack(stack(params), params[0], mesh), biases
