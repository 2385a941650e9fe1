"""The engine's state on the device: a fixed number of requests, one token further a step.

Local letter: K, likeliest tokens found at a position.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.inference.decoder import Decoder, PromptChunks, mask_unknown_ids, seen_tokens
from engram_jax.inference.extend import RowsFn
from engram_jax.inference.sampling import Sampling, SamplingBatch, sample_each_position
from engram_jax.inference.state import DecodeState, insert

MAX_TOP = 20  # likeliest tokens that are found at once, if any request asks for some


class Scores(NamedTuple):
  """Scores of B requests at T positions.

  logprobs: float32 [B, T], of the token that follows. top_ids, top_logprobs: int32 and float32
  [B, T, K], the likeliest tokens to follow, best first. gates: float32 [B, T] of each memory, the
  mean over branches, of the token itself.
  """

  logprobs: Any
  top_ids: Any
  top_logprobs: Any
  gates: tuple[Any, ...]


class Slots:
  """`count` requests side by side. A free slot costs its share of a step and changes nothing."""

  def __init__(self, decoder: Decoder, count: int):
    cfg, self.decoder, self.count = decoder.model.cfg, decoder, count
    self.vocabulary = len(decoder.model.compressor.table)
    self.chunk_sizes = (max(decoder.chunk // 8, 1), decoder.chunk)  # few shapes to compile
    self._state = decoder.empty_state(count)
    self._logits_BV = jnp.zeros((count, cfg.vocab_size), jnp.float32)
    self._seen_BV = jnp.zeros((count, cfg.vocab_size), bool)
    self._index_B = np.zeros(count, np.int32)
    self._samplings = [Sampling()] * count
    self._batch = SamplingBatch.of(self._samplings)

  def prefill_chunk(
    self,
    state: DecodeState,
    chunks: PromptChunks,
    i: int,
    rows_fn: RowsFn | None,
    *,
    score: bool,
    top: bool,
  ) -> tuple[jax.Array, DecodeState, Scores | None]:
    """Adds chunk i of a prompt to a single request's state.

    Args:
      state: of the request; lost if the decoder donates.
      rows_fn: of the chunk, as `Decoder.prefetch` returns it.
      score: scores the tokens. top: finds the likeliest tokens too.

    Returns:
      logits [1, V] after the chunk, the state with it, and the scores without padding, NumPy
      arrays without the leading axis of requests.
    """
    tokens_BT, count_B, _ = chunks[i]
    out = self.decoder.extend(state, tokens_BT, count_B, rows_fn=rows_fn, all_logits=score)
    if not score:
      return out.logits, out.state, None
    count = int(count_B[0])
    scores = _score(out.logits, chunks.next_tokens(i), self.vocabulary, self._num_top(top))
    scores = jax.device_get(scores._replace(gates=_branch_means(out.gates)))
    return out.logits[:, count - 1], out.state, jax.tree.map(lambda x: x[0, :count], scores)

  def insert(
    self,
    slot: int,
    state: DecodeState,
    logits_BV: jax.Array,
    prompt: Sequence[int],
    sampling: Sampling,
  ) -> None:
    """Puts a single request, its prompt prefilled in `state`, into a slot."""
    seen_BV = seen_tokens([prompt], self._seen_BV.shape[1])
    index = jnp.int32(slot)
    self._state = _insert(self._state, index, state)
    self._logits_BV = _set_row(self._logits_BV, index, logits_BV)
    self._seen_BV = _set_row(self._seen_BV, index, seen_BV)
    self._index_B = np.where(np.arange(self.count) == slot, 0, self._index_B)
    self._samplings = [*self._samplings[:slot], sampling, *self._samplings[slot + 1 :]]
    self._batch = SamplingBatch.of(self._samplings)

  def step(self, busy_B: np.ndarray, top: bool) -> tuple[np.ndarray, Scores]:
    """Samples the next token of every busy slot and adds it to the slot's state.

    Returns the tokens, int32 [B] with -1 for logits that are not finite, and their scores, both
    NumPy, the latter without the axis T.
    """
    count_B = busy_B.astype(np.int32)
    tokens_BT, inputs_BT, self._seen_BV, scores = _sample(
      self._logits_BV,
      self._seen_BV,
      self._index_B,
      self._batch,
      self.vocabulary,
      self._num_top(top),
    )
    out = self.decoder.extend(self._state, inputs_BT, count_B)
    self._state, self._logits_BV = out.state, out.logits
    self._index_B = self._index_B + count_B
    scores = scores._replace(gates=_branch_means(out.gates))
    return jax.tree.map(lambda x: x[:, 0], jax.device_get((tokens_BT, scores)))

  def _num_top(self, top: bool) -> int:
    return min(MAX_TOP, self.vocabulary) if top else 0


# Nothing refers to the old arrays once these have run: they are reused.
_insert = jax.jit(insert, donate_argnums=0)
_set_row = jax.jit(lambda x_BV, slot, y_BV: x_BV.at[slot].set(y_BV[0]), donate_argnums=0)
_branch_means = jax.jit(lambda gates: tuple(gate_BTG.mean(-1) for gate_BTG in gates))


@functools.partial(jax.jit, static_argnames=("vocabulary", "top"))
def _sample(
  logits_BV: jax.Array,
  seen_BV: jax.Array,
  index_B: jax.Array,
  batch: SamplingBatch,
  vocabulary: int,
  top: int,
) -> tuple:
  """Samples like `generate_tokens`: int32 [B, 1], -1 included, the same tokens without -1 as the
  next inputs, the tokens seen, and the scores."""
  logits_BTV = mask_unknown_ids(logits_BV, vocabulary)[:, None]
  unused_BT = jnp.ones((len(logits_BV), 1), jnp.int32)
  tokens_BT, seen_TBV = sample_each_position(logits_BTV, seen_BV, unused_BT, index_B, batch)
  inputs_BT = jnp.maximum(tokens_BT, 0)
  return tokens_BT, inputs_BT, seen_TBV[0], _score(logits_BTV, inputs_BT, vocabulary, top)


@functools.partial(jax.jit, static_argnames=("vocabulary", "top"))
def _score(logits_BTV: jax.Array, next_BT: Any, vocabulary: int, top: int) -> Scores:
  """Scores of the tokens that follow each position, without gates."""
  logprobs_BTV = jax.nn.log_softmax(mask_unknown_ids(logits_BTV, vocabulary).astype(jnp.float32))
  next_BT1 = jnp.asarray(next_BT)[:, :, None]
  top_logprobs_BTK, top_ids_BTK = jax.lax.top_k(logprobs_BTV, top)
  logprobs_BT = jnp.take_along_axis(logprobs_BTV, next_BT1, axis=-1)[..., 0]
  return Scores(logprobs_BT, top_ids_BTK, top_logprobs_BTK, ())
