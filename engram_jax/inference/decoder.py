"""A model that continues token sequences: prefill in chunks, then a token or a few at a time.

decoder = Decoder(model, row_source, capacity)
logits_BV, state = decoder.prefill(prompts)
for tokens_B in generate_tokens(decoder, prompts, samplings, max_new): ...

Local letters: H, canonical ids of history; X, tokens of all chunks (in canonical_BX after H).
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import ModelConfig
from engram_jax.errors import ConfigError
from engram_jax.inference.extend import Extended, RowsFn, StagedModel
from engram_jax.inference.sampling import (
  Sampling,
  SamplingBatch,
  require_finite,
  sample_each_position,
)
from engram_jax.inference.state import DecodeState, empty_state
from engram_jax.memory.compress import TokenCompressor, check_ids, check_visible_ids
from engram_jax.memory.hash_layout import HashLayout
from engram_jax.memory.vocabulary import check_prompt


class RowSource(Protocol):
  """A source of the rows that a decoder's tokens look up.

  Both methods take tokens_BT, int32 raw ids of which the first `count_B` of each request matter,
  and history_BH, the canonical ids before them; NumPy or JAX arrays.
  """

  def prefetch(self, tokens_BT: Any, count_B: Any, history_BH: Any) -> RowsFn:
    """Begins to fetch at once, ahead of the time when the rows are asked for."""
    ...

  def on_demand(self, tokens_BT: Any, count_B: Any, history_BH: Any) -> RowsFn:
    """Fetches when asked, in the caller's thread: by then the stages before are on their way, and
    the caller has nothing else to do."""
    ...


class Weights(NamedTuple):
  """A trained model without its tables."""

  cfg: ModelConfig
  graphdef: Any
  params: Any
  biases: Any
  layout: HashLayout | None
  compressor: TokenCompressor


class Decoder:
  """A model, the rows it reads, and the number of tokens that a request can hold.

  Args:
    row_source: None for a model without a memory.
    capacity: tokens of a request, prompt and continuation.
    chunk: tokens of a prompt that go through the model at once.
    donate: see `StagedModel`; the loops here never go back further than the last rollback info, so
      they may.
  """

  def __init__(
    self,
    model: Weights,
    row_source: RowSource | None,
    capacity: int,
    *,
    chunk: int = 128,
    donate: bool = True,
  ):
    self.model, self.row_source, self.capacity, self.chunk = model, row_source, capacity, chunk
    self._stages = StagedModel(model.graphdef, model.cfg, model.compressor.table, donate=donate)

  def with_row_source(self, row_source: RowSource | None) -> "Decoder":
    """A copy of the decoder that shares its compiled stages and reads rows from `row_source`."""
    other = copy.copy(self)
    other.row_source = row_source
    return other

  def empty_state(self, batch: int) -> DecodeState:
    """The state of `batch` requests that hold nothing."""
    return empty_state(self.model.cfg, self.model.layout, batch, self.capacity)

  def extend(
    self,
    state: DecodeState,
    tokens_BT: Any,
    count_B: Any,
    *,
    rows_fn: RowsFn | None = None,
    all_logits: bool = False,
  ) -> Extended:
    """`StagedModel.run` with the decoder's parameters; rows_fn: of these tokens, if prefetched.

    Raises ValueError for shapes that do not fit the state, for what is no integer, and for a value
    in a NumPy array that is no token id or no count. The values of jax arrays are not looked at:
    the caller has sampled or checked them.
    """
    vocabulary, B = len(self.model.compressor.table), state.length_B.shape[0]
    tokens_BT = check_visible_ids(tokens_BT, vocabulary, "token id", "BT")
    count_B = check_visible_ids(count_B, tokens_BT.shape[1] + 1, "token count", "B")
    if tokens_BT.shape[0] != B or count_B.shape != (B,):
      raise ValueError(
        f"tokens and counts of the {B} requests of the state are [{B}, T] and [{B}], not of shapes "
        f"{tokens_BT.shape} and {count_B.shape}"
      )
    tokens_BT, count_B = jnp.asarray(tokens_BT, jnp.int32), jnp.asarray(count_B, jnp.int32)
    if rows_fn is None and self.row_source is not None:
      rows_fn = self.row_source.on_demand(tokens_BT, count_B, state.history_BH)
    params, biases = self.model.params, self.model.biases
    return self._stages.run(
      params, biases, state, tokens_BT, count_B, rows_fn, all_logits=all_logits
    )

  def prefill(
    self, prompts: Sequence[Sequence[int]], state: DecodeState | None = None
  ) -> tuple[jax.Array, DecodeState]:
    """Logits after each prompt, float32 [B, V], and the state that holds the prompts.

    Rows of the next chunk are fetched while this one runs. state: the prompts follow its tokens;
    nothing if left out. Raises ConfigError for an empty prompt, an id outside the vocabulary or
    more tokens than the capacity, those in the state included.
    """
    if state is None:
      self.check_prompts(prompts)
      state = self.empty_state(len(prompts))
    else:
      self.check_prompts(prompts, lengths=np.asarray(state.length_B).tolist())
    sizes = [*(1 << n for n in range((self.chunk - 1).bit_length())), self.chunk]  # few to compile
    chunks = self.make_chunks(prompts, state, sizes)
    logits_BV = jnp.zeros((len(prompts), self.model.cfg.vocab_size), jnp.float32)
    rows_fn = self.prefetch(chunks, 0)
    for i in range(len(chunks)):
      tokens_BT, count_B, _ = chunks[i]
      next_rows_fn = self.prefetch(chunks, i + 1)
      out = self.extend(state, tokens_BT, count_B, rows_fn=rows_fn)
      state, rows_fn = out.state, next_rows_fn
      logits_BV = _update_logits(logits_BV, out.logits, count_B)
    return logits_BV, state

  def check_prompts(
    self,
    prompts: Sequence[Sequence[int]],
    max_new: int = 0,
    lengths: Sequence[int] | None = None,
  ) -> None:
    """Raises ConfigError unless each prompt is sound and has room for `max_new` tokens after it.

    lengths: tokens that each request holds already; none if left out.
    """
    vocabulary = len(self.model.compressor.table)
    lengths = [0] * len(prompts) if lengths is None else lengths
    if len(lengths) != len(prompts):
      raise ConfigError(f"prompt: {len(prompts)} prompts for a state of {len(lengths)} requests")
    for prompt, length in zip(prompts, lengths, strict=True):
      check_prompt(prompt, vocabulary)
      if length + len(prompt) + max_new > self.capacity:
        after = f" after {length}" if length else ""
        raise ConfigError(
          f"prompt: {len(prompt)} tokens{after} and {max_new} new ones do not fit in the "
          f"{self.capacity} that a request can hold"
        )

  def make_chunks(
    self, prompts: Sequence[Sequence[int]], state: DecodeState, sizes: Sequence[int]
  ) -> "PromptChunks":
    """The chunks of prompts that follow the tokens of `state`."""
    history_BH = np.asarray(state.history_BH)
    return PromptChunks(prompts, sizes, self.model.compressor.table, history_BH)

  def prefetch(self, chunks: "PromptChunks", i: int) -> RowsFn | None:
    """Begins to fetch the rows of chunk i, if there is one and the model has a memory."""
    if self.row_source is None or i >= len(chunks):
      return None
    return self.row_source.prefetch(*chunks[i])


def generate_tokens(
  decoder: Decoder,
  prompts: Sequence[Sequence[int]],
  samplings: Sequence[Sampling],
  max_new: int,
) -> Iterator[np.ndarray]:
  """Yields the next token of each request, int32 [B], `max_new` times; the caller may stop earlier.

  Raises like `Decoder.prefill`, and NonFiniteError where the model gives no finite logits.
  """
  decoder.check_prompts(prompts, max_new)
  batch = SamplingBatch.of(samplings)
  logits_BV, state = decoder.prefill(prompts)
  seen_BV = seen_tokens(prompts, logits_BV.shape[1])
  vocabulary = len(decoder.model.compressor.table)
  one_B = np.ones(len(prompts), np.int32)
  for i in range(max_new):
    logits_BTV = mask_unknown_ids(logits_BV, vocabulary)[:, None]
    tokens_BT, seen_TBV = sample_each_position(
      logits_BTV, seen_BV, one_B[:, None], i * one_B, batch
    )
    seen_BV = seen_TBV[0]
    if i + 1 < max_new:
      out = decoder.extend(state, jnp.maximum(tokens_BT, 0), one_B)
      logits_BV, state = out.logits, out.state
    yield require_finite(np.asarray(tokens_BT)[:, 0])


def seen_tokens(prompts: Sequence[Sequence[int]], vocabulary: int) -> np.ndarray:
  """bool [B, V], True for the tokens that each prompt holds; ValueError for one outside [0, V)."""
  seen_BV = np.zeros((len(prompts), vocabulary), bool)
  for seen_V, prompt in zip(seen_BV, prompts, strict=True):
    seen_V[check_ids(prompt, vocabulary, "token id", "T")] = True
  return seen_BV


def mask_unknown_ids(logits: jax.Array, vocabulary: int) -> jax.Array:
  """Logits [..., V], -inf where the tokenizer has no id: an embedding may have some to spare."""
  return jnp.where(jnp.arange(logits.shape[-1]) < vocabulary, logits, -jnp.inf)


class PromptChunks:
  """Prompts side by side, cut into chunks: [i] is (tokens_BT, count_B, history_BH) of chunk i.

  sizes: lengths of chunks, rising. All chunks have the largest but the last, which has the smallest
  that holds its tokens. history_BH: canonical ids before the prompts.
  """

  def __init__(
    self,
    prompts: Sequence[Sequence[int]],
    sizes: Sequence[int],
    token_map: np.ndarray,
    history_BH: np.ndarray,
  ):
    self.lengths_B = np.array([len(p) for p in prompts], np.int32)
    longest = int(self.lengths_B.max())
    self.starts = list(range(0, longest, sizes[-1]))
    last = next(size for size in sizes if size >= longest - self.starts[-1])
    self.stops = [*self.starts[1:], self.starts[-1] + last]
    self.tokens_BX = np.zeros((len(prompts), self.stops[-1] + 1), np.int32)
    for row, prompt in zip(self.tokens_BX, prompts, strict=True):
      row[: len(prompt)] = prompt
    self.canonical_BX = np.concatenate([history_BH, token_map[self.tokens_BX]], 1)
    self.H = history_BH.shape[1]

  def __len__(self) -> int:
    return len(self.starts)

  def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    start, stop = self.starts[i], self.stops[i]
    count_B = np.clip(self.lengths_B - start, 0, stop - start)
    return self.tokens_BX[:, start:stop], count_B, self.canonical_BX[:, start : start + self.H]

  def next_tokens(self, i: int) -> np.ndarray:
    """int32 [B, T], the token after each of chunk i; 0 after the last of a prompt."""
    return self.tokens_BX[:, self.starts[i] + 1 : self.stops[i] + 1]


@jax.jit
def _update_logits(old_BV: jax.Array, new_BV: jax.Array, count_B: jax.Array) -> jax.Array:
  return jnp.where(count_B[:, None] > 0, new_BV, old_BV)
