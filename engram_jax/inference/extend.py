"""New tokens through the model, given those before them: prefill, decode and verify are this.

The blocks are cut where a memory enters. A stage is the blocks from one memory up to the next, so
rows from far away can be fetched while the earlier stages run: `StagedModel.run` asks for the rows
of each memory when its stage is next.

Local letters: H, canonical ids of history; X, those and the canonical ids of the new tokens.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engram_jax.config import ModelConfig
from engram_jax.inference.state import DecodeState, RollbackInfo, slice_conv_cache, slice_each
from engram_jax.memory.engram import ConvCache
from engram_jax.model.lm import LM
from engram_jax.model.mla import LatentCache, attend_cached

RowsFn = Callable[[int, jax.Array], jax.Array | np.ndarray]
"""`i, x -> rows [B, T, J, C]` of memory i; x is ready when the stages before it are done."""


class Extended(NamedTuple):
  """The outcome of new tokens.

  logits: float32 [B, V] after each request's last new token, or [B, T, V] after every one.
  state: with all new tokens. rollback_info: for `rollback`. gates: one [B, T, G] a memory.
  """

  logits: jax.Array
  state: DecodeState
  rollback_info: RollbackInfo
  gates: tuple[jax.Array, ...]


class StagedModel:
  """The model as jitted stages: `bounds[i]` are the first block of stage i and the one after its
  last. Stage 0 has no memory and may be empty; stage i + 1 begins with memory i.

  token_map: int32 [V], canonical id of each raw id.
  donate: the latent caches given to `run` are reused for those returned, so the old state is lost
    (rollback stays possible). Without it every call copies them and every state stays good.
  """

  def __init__(
    self, graphdef: Any, cfg: ModelConfig, token_map: np.ndarray, *, donate: bool = False
  ):
    cuts = (0, *cfg.engram.layers, cfg.layers)
    self.bounds = list(itertools.pairwise(cuts))
    self.token_map = jnp.asarray(token_map)
    merge = lambda params, biases: nnx.merge(graphdef, nnx.State(params), nnx.State(biases))
    self._embed = jax.jit(
      lambda params, biases, tokens_BT: merge(params, biases).streams(tokens_BT)
    )
    donated = ("latent_caches",) if donate else ()
    self._stages = [
      jax.jit(_make_stage(merge, start, stop), donate_argnames=donated)
      for start, stop in self.bounds
    ]
    self._head = jax.jit(_make_head(merge), static_argnames="all_logits")

  def run(
    self,
    params: Any,
    biases: Any,
    state: DecodeState,
    tokens_BT: jax.Array,
    count_B: jax.Array,
    rows_fn: RowsFn | None,
    *,
    all_logits: bool = False,
  ) -> Extended:
    """Adds the first `count_B` of T tokens to each request; those after them are padding.

    The caller keeps length + count within the state's capacity and ids within the vocabulary:
    nothing here sees values, and an id outside would read another's embedding (`Decoder.extend`
    checks them).

    Args:
      tokens_BT: int32 raw ids, in the vocabulary on padding too.
      rows_fn: called once for each memory, in order, when the stages before it have been
        dispatched. None for a model without a memory.
      all_logits: logits after each new token instead of after the last.
    """
    positions_BT = _positions(state.length_B, tokens_BT, count_B, state.capacity)
    length_B, history_BH, history_BX = _advance(
      state.length_B, state.history_BH, self.token_map, tokens_BT, count_B
    )
    x_BTGD = self._embed(params, biases, tokens_BT)
    latent_caches, memories = [], []
    for i, ((start, stop), stage) in enumerate(zip(self.bounds, self._stages, strict=True)):
      rows = conv_cache = None
      if i:
        assert rows_fn is not None, "a model with a memory needs rows"
        rows, conv_cache = rows_fn(i - 1, x_BTGD), state.conv_caches[i - 1]
      x_BTGD, caches, *memory = stage(
        params,
        biases,
        x_BTGD,
        positions_BT,
        count_B,
        rows,
        conv_cache,
        latent_caches=state.latent_caches[start:stop],
      )
      latent_caches += caches
      if i:
        memories.append(memory)
    logits = self._head(params, biases, x_BTGD, count_B, all_logits=all_logits)
    conv_caches, conv_inputs, gates = zip(*memories, strict=True) if memories else ((), (), ())
    return Extended(
      logits,
      DecodeState(length_B, tuple(latent_caches), history_BH, conv_caches),
      RollbackInfo(state.length_B, history_BX, conv_inputs),
      gates,
    )


@jax.jit(static_argnames="capacity")
def _positions(length_B, tokens_BT, count_B, capacity: int) -> jax.Array:
  """int32 [B, T], the position of each new token in its request; `capacity` on padding."""
  offset_T = jnp.arange(tokens_BT.shape[1])
  return jnp.where(offset_T < count_B[:, None], length_B[:, None] + offset_T, capacity)


@jax.jit
def _advance(length_B, history_BH, token_map, tokens_BT, count_B) -> tuple:
  # Apart from the stages: a host that hashes the next tokens waits for this and for nothing else.
  history_BX = jnp.concatenate([history_BH, token_map[tokens_BT]], axis=1)
  return length_B + count_B, slice_each(history_BX, count_B, history_BH.shape[1]), history_BX


def _make_stage(merge: Callable[..., LM], start: int, stop: int) -> Callable[..., tuple]:
  def run(
    params: Any,
    biases: Any,
    x_BTGD: jax.Array,
    positions_BT: jax.Array,
    count_B: jax.Array,
    rows: jax.Array | None,
    conv_cache: ConvCache | None,
    latent_caches: Sequence[LatentCache],
  ) -> tuple:
    """Returns x, the latent caches and, with a memory, its convolution's cache, that convolution's
    inputs and the gates."""
    model, new_caches, memory = merge(params, biases), [], []

    def remember(x_BTGD):  # only the stage's first block has a memory
      engram = model.blocks[start].engram
      assert engram is not None
      assert rows is not None
      assert conv_cache is not None
      delta_BTGD, probes, conv_inputs = engram.extend(x_BTGD, rows, conv_cache)
      memory.extend((slice_conv_cache(conv_inputs, count_B, conv_cache), conv_inputs))
      memory.append(probes["gate"])
      return delta_BTGD, probes

    for layer, cache in zip(range(start, stop), latent_caches, strict=True):
      block = model.blocks[layer]

      def attend(normed_BTD, block=block, cache=cache):
        y_BTD, cache = attend_cached(block.attention, normed_BTD, positions_BT, cache)
        new_caches.append(cache)
        return y_BTD

      x_BTGD, _ = block.around(x_BTGD, remember, attend)
    return x_BTGD, new_caches, *memory

  return run


def _make_head(merge: Callable[..., LM]) -> Callable[..., jax.Array]:
  def run(params, biases, x_BTGD, count_B, all_logits: bool):
    model = merge(params, biases)
    if all_logits:
      return model.logits(model.final(x_BTGD))
    last_B = jnp.maximum(count_B - 1, 0)
    x_B1GD = jnp.take_along_axis(x_BTGD, last_B[:, None, None, None], axis=1)
    return model.logits(model.final(x_B1GD))[:, 0]

  return run
