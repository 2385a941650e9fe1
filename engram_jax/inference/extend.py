"""New tokens through the model, given what came before: prefill, decode and verify are this.

The blocks are cut where a memory enters. A stage is the blocks from one memory up to the next, so
whoever brings rows from far away can start the earlier stages first and need not have a stage's
rows before its turn: `Stages.run` asks for them one at a time.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engram_jax.config import ModelConfig
from engram_jax.inference.state import DecodeState, Trail, window
from engram_jax.memory.engram import ConvCache
from engram_jax.model.lm import LM
from engram_jax.model.mla import LatentCache, attend_cached

Rows = Callable[[int, jax.Array], jax.Array]


class Extended(NamedTuple):
  """logits: float32 [B, V] after each request's last new token, or [B, T, V] after every one.
  state: with all new tokens. trail: for `rewind`. gates: one [B, T, G] a memory."""

  logits: jax.Array
  state: DecodeState
  trail: Trail
  gates: tuple[jax.Array, ...]


class Stages:
  """The model as jitted stages: `bounds[i]` are the blocks of stage i. Stage 0 has no memory and
  may be empty; stage i + 1 begins with memory i.

  token_map: int32 [V], canonical id of each raw id.
  donate: the caches given to `run` are reused for those returned, so the old state is lost (its
    trail still leads back). Without it every call copies them and every state stays good.
  """

  def __init__(
    self, graphdef: Any, cfg: ModelConfig, token_map: np.ndarray, *, donate: bool = False
  ):
    cuts = (0, *cfg.engram.layers, cfg.layers)
    self.bounds = list(itertools.pairwise(cuts))
    self.token_map = jnp.asarray(token_map)
    merge = lambda params, biases: nnx.merge(graphdef, nnx.State(params), nnx.State(biases))
    self._begin = jax.jit(
      lambda params, biases, tokens_BT: merge(params, biases).streams(tokens_BT)
    )
    donated = ("caches",) if donate else ()
    self._stages = [
      jax.jit(_stage(merge, start, stop), donate_argnames=donated) for start, stop in self.bounds
    ]
    self._end = jax.jit(_end(merge), static_argnames="every")

  def run(
    self,
    params: Any,
    biases: Any,
    state: DecodeState,
    tokens_BT: jax.Array,
    count_B: jax.Array,
    rows_of: Rows | None,
    *,
    every: bool = False,
  ) -> Extended:
    """The first `count_B` of T tokens added to each request; those after them are padding.

    Args:
      tokens_BT: int32 raw ids, in the vocabulary on padding too.
      rows_of: `i, x -> [B, T, J, C]`, the rows of memory i; called once each, in order, when the
        stages before it have been dispatched. x is what these give, ready when they are done. None
        for a model without.
      every: logits after each new token instead of after the last.

    The caller keeps length + count within the state's capacity.
    """
    places_BT = _places(state.length_B, tokens_BT, count_B, state.capacity)
    length_B, history_BH, history_BX = _remember(
      state.length_B, state.history_BH, self.token_map, tokens_BT, count_B
    )
    x_BTGD = self._begin(params, biases, tokens_BT)
    caches, columns, trails, gates = [], [], [], []
    for i, ((start, stop), stage) in enumerate(zip(self.bounds, self._stages, strict=True)):
      past, rows = (state.columns[i - 1], rows_of(i - 1, x_BTGD)) if i else (None, None)
      x_BTGD, new, seen = stage(
        params, biases, x_BTGD, places_BT, count_B, rows, past, caches=state.caches[start:stop]
      )
      caches += new
      for each, value in zip((columns, trails, gates), seen, strict=True):
        each += value
    logits = self._end(params, biases, x_BTGD, count_B, every=every)
    new = DecodeState(length_B, tuple(caches), history_BH, tuple(columns))
    return Extended(logits, new, Trail(state.length_B, history_BX, tuple(trails)), tuple(gates))


@jax.jit(static_argnames="capacity")
def _places(length_B, tokens_BT, count_B, capacity: int) -> jax.Array:
  """Position of each new token in its request; `capacity`, which is none, on padding."""
  at_T = jnp.arange(tokens_BT.shape[1])
  return jnp.where(at_T < count_B[:, None], length_B[:, None] + at_T, capacity)


@jax.jit
def _remember(length_B, history_BH, token_map, tokens_BT, count_B) -> tuple:
  # Apart from the stages: a host that hashes the next tokens waits for this and for nothing else.
  H = history_BH.shape[1]
  history_BX = jnp.concatenate([history_BH, token_map[tokens_BT]], axis=1)
  return length_B + count_B, window(history_BX, count_B, H), history_BX


def _stage(merge: Callable[..., LM], start: int, stop: int) -> Callable[..., tuple]:
  def run(
    params: Any,
    biases: Any,
    x_BTGD: jax.Array,
    places_BT: jax.Array,
    count_B: jax.Array,
    rows: jax.Array | None,
    past: ConvCache | None,
    caches: Sequence[LatentCache],
  ) -> tuple:
    model, new, wide, gates = merge(params, biases), [], [], []

    def recall(x_BTGD):  # only the stage's first block has a memory
      delta, probes, columns = model.blocks[start].engram.extend(x_BTGD, rows, past)
      wide.append(columns)
      return delta, probes

    for layer, cache in zip(range(start, stop), caches, strict=True):
      block = model.blocks[layer]

      def attend(normed_BTD, block=block, cache=cache):
        y_BTD, cache = attend_cached(block.attention, normed_BTD, places_BT, cache)
        new.append(cache)
        return y_BTD

      x_BTGD, probes = block.around(x_BTGD, recall, attend)
      gates += [probes["gate"]] if "gate" in probes else []
    kept = [
      ConvCache(*(window(x, count_B, p.shape[1]) for x, p in zip(w, past, strict=True)))
      for w in wide
    ]
    return x_BTGD, new, (kept, wide, gates)

  return run


def _end(merge: Callable[..., LM]) -> Callable[..., jax.Array]:
  def run(params, biases, x_BTGD, count_B, every: bool):
    model = merge(params, biases)
    if every:
      return model.logits(model.final(x_BTGD))
    last_B = jnp.maximum(count_B - 1, 0)
    x_B1GD = jnp.take_along_axis(x_BTGD, last_B[:, None, None, None], axis=1)
    return model.logits(model.final(x_B1GD))[:, 0]

  return run
