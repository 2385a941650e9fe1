"""The language model: embedding, blocks over G residual streams, norm, head.

Rows are an argument, whether they were read from a sharded table, host memory or a file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from engram_jax.config import ModelConfig
from engram_jax.core.mesh import batch_shards, compute_dtype, platform
from engram_jax.memory.compress import check_visible_ids
from engram_jax.model.block import Block
from engram_jax.model.fsdp import (
  constrain_batch,
  constrain_stack,
  gather_params,
  is_param_gather,
  is_sharded,
)
from engram_jax.model.layers import rms_norm
from engram_jax.model.params import to_compute_dtype
from engram_jax.model.router import ROUTING, RouterBias


class LM(nnx.Module):
  """The language model. Parameters beside those of its blocks, float32: embedding [V, D], g_final
  [D], and head [D, V] unless tied.

  Streams start as copies of the embedding and are averaged at the end, so that with mixing at its
  start the model is the one with a single stream.
  """

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    self.cfg = cfg
    normal = lambda *shape: nnx.Param(cfg.init_std * jax.random.normal(rngs.params(), shape))
    self.embedding = normal(cfg.vocab_size, cfg.width)
    self.blocks = nnx.List([Block(cfg, layer, rngs=rngs) for layer in range(cfg.layers)])
    self.g_final = nnx.Param(jnp.ones(cfg.width))
    self.head = None if cfg.tie_embeddings else normal(cfg.width, cfg.vocab_size)

  def __call__(
    self,
    tokens_BT: jax.Array,
    rows: Sequence[jax.Array] = (),
    *,
    segments_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    mesh: Mesh | None = None,
  ) -> tuple[jax.Array, dict[str, tuple[jax.Array, ...]]]:
    """Returns the final hidden state and probes of its computation.

    Args:
      tokens_BT: int32 token ids in [0, V). Those of a NumPy array are checked; inside jit there are
        no values to check, and an id outside reads another's embedding: `memory.compress.check_ids`
        refuses such before they enter.
      rows: one [B, T, M] (or [B, T, J, C]) array per entry of `cfg.engram.layers`, in order.
      segments_BT: int32 document of each position in a packed window; default: one document.
      positions_BT: int32 position within the document; default: 0, 1, ... along T.
      mesh: the devices to run on, which also choose kernels and the dtype of "auto"; B is divided
        over the batch's axes, parameters as `model.params.param_shardings` says. Default: one
        device of this process.

    Returns:
      hidden_BTD after the final norm, in the compute dtype, and probes: "gate", a float32
      [B, T, G] per memory; "load", a float32 array per MoE block, each expert's share of the
      assignments; "hidden", a [B, T, D] per block, the mean of the streams after it.

    Raises:
      ValueError: another number of rows arrays than memories; B that does not divide by the mesh;
        other dtypes or shapes than these.
    """
    tokens_BT = check_visible_ids(tokens_BT, self.cfg.vocab_size, "token id", "BT")
    B, T = tokens_BT.shape
    if len(rows) != len(self.cfg.engram.layers):
      raise ValueError(
        f"{len(rows)} arrays of rows for {len(self.cfg.engram.layers)} memories "
        f"(engram.layers={list(self.cfg.engram.layers)}): give one each"
      )
    if mesh is not None and B % batch_shards(mesh):
      raise ValueError(
        f"a batch of {B} does not divide by the {batch_shards(mesh)} devices of mesh axes "
        "data x fsdp x expert: give a multiple"
      )
    for what, array in (("segment id", segments_BT), ("position", positions_BT)):
      if array is not None and check_visible_ids(array, None, what).shape != (B, T):
        raise ValueError(f"{what}s are [B={B}, T={T}], not of shape {array.shape}")
    if segments_BT is None:
      segments_BT = jnp.zeros((B, T), jnp.int32)
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    rows_of = dict(zip(self.cfg.engram.layers, rows, strict=True))

    x_BTGD = self.streams(tokens_BT, mesh)
    x_BTGD, probes = run_blocks(
      self.cfg, self.blocks, x_BTGD, rows_of, segments_BT, positions_BT, mesh
    )
    hidden_BTD = self.final(x_BTGD)
    return hidden_BTD, {name: tuple(values) for name, values in probes.items()}

  @jax.named_scope("embedding")
  def streams(self, tokens_BT: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """Residual streams [B, T, G, D], copies of each token's embedding, in the compute dtype."""
    dtype = compute_dtype(self.cfg.dtype, platform(mesh))
    params = to_compute_dtype({"embedding": self.embedding[...]}, dtype)
    embedding_VD = gather_params(params, mesh)["embedding"]
    x_BTD = constrain_batch(embedding_VD[tokens_BT], mesh)
    streams = (*tokens_BT.shape, self.cfg.residual.branches, self.cfg.width)
    return jnp.broadcast_to(x_BTD[:, :, None], streams)

  @jax.named_scope("final_norm")
  def final(self, x_BTGD: jax.Array) -> jax.Array:
    """The hidden state [B, T, D]: the streams after the last block, averaged and normalised."""
    return rms_norm(x_BTGD.mean(2), self.g_final[...], self.cfg.norm_eps)

  @property
  def head_DV(self) -> jax.Array:
    """The output matrix [D, V], float32; the embedding's transpose when tied."""
    return self.embedding[...].T if self.head is None else self.head[...]

  def logits(self, hidden_BTD: jax.Array) -> jax.Array:
    """Logits, float32 [B, T, V], of a hidden state that this model returned."""
    with jax.named_scope("head"):
      head_DV = self.head_DV.astype(hidden_BTD.dtype)
      return jnp.einsum("btd,dv->btv", hidden_BTD, head_DV, preferred_element_type=jnp.float32)


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
  """Returns the streams after all blocks, and every block's probes by name, in the order of layers.

  With `cfg.scan_layers` each run of equal blocks without a memory is one `lax.scan`: its parameters
  are stacked here, in the compute dtype where their use would cast them.

  Args:
    rows_of: rows [B, T, M] of each memory, by layer.
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
    if is_sharded(mesh):
      params = gather_params(to_compute_dtype(params, x_BTGD.dtype), mesh)
    block = nnx.merge(graphdef, nnx.State(params), nnx.State(biases))
    x_BTGD, seen = block(x_BTGD, rows_BTM, segments_BT, positions_BT, mesh)
    x_BTGD = constrain_batch(x_BTGD, mesh)
    return x_BTGD, seen | {"hidden": x_BTGD.mean(2)}

  saved, routing = jax.checkpoint_policies, jax.checkpoint_policies.save_only_these_names(ROUTING)
  dots = saved.save_from_both_policies(saved.dots_with_no_batch_dims_saveable, routing)
  policies = {"block": routing, "dots": dots}
  if cfg.remat == "none" and not (is_sharded(mesh) and mesh.shape["fsdp"] > 1):
    return call
  policy = policies.get(cfg.remat, _all_but_gathered)
  return jax.checkpoint(call, policy=policy, prevent_cse=not scanned)


def _all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
  # The backward pass gathers a layer's weights again; saved, they would be the full model.
  return not is_param_gather(primitive, params)


def _runs(split: Sequence[tuple], rows_of: Mapping[int, jax.Array]) -> list[list[int]]:
  """Layers in order, consecutive ones together where their blocks are equal and have no memory."""
  runs: list[list[int]] = []
  for layer in range(len(split)):
    last = runs[-1][-1] if runs else None
    starts_run = last is None or last in rows_of or layer in rows_of
    if starts_run or _signature(split[last]) != _signature(split[layer]):
      runs.append([])
    runs[-1].append(layer)
  return runs


def _signature(split: tuple) -> Any:
  leaves, tree = jax.tree.flatten(split[1:])
  return split[0], tree, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _stack(weights: Sequence[tuple], dtype: Any, mesh: Mesh | None) -> tuple:
  params = [to_compute_dtype(params, dtype) for params, _ in weights]
  stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
  biases = stack([biases for _, biases in weights])
  return constrain_stack(stack(params), params[0], mesh), biases
