"""A model that continues token sequences: prefill in chunks, then a token or a few at a time.

decoder = Decoder(model, source, capacity)
logits_BV, state = decoder.prefill(prompts)
for tokens_B in continuations(decoder, prompts, samplings, max_new): ...
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.config import ModelConfig
from engram_jax.errors import ConfigError
from engram_jax.inference.extend import Extended, Rows, Stages
from engram_jax.inference.sampling import Sampling, Settings, choose_each, require_finite
from engram_jax.inference.state import DecodeState, empty_state
from engram_jax.memory.compress import TokenCompressor
from engram_jax.memory.hashing import HashLayout


class RowSource(Protocol):
  """Where a decoder's rows come from.

  Both methods give `i, x -> rows [B, T, J, C]` of memory i, as `Stages.run` wants it, for
  tokens_BT: int32 raw ids, of which the first `count_B` of each request matter; history_BH: the
  canonical ids before them. NumPy or JAX arrays.
  """

  def start(self, tokens_BT: Any, count_B: Any, history_BH: Any) -> Rows:
    """Begins to fetch at once, ahead of the time when they are asked for."""

  def on_demand(self, tokens_BT: Any, count_B: Any, history_BH: Any) -> Rows:
    """Fetches when asked, in the caller's thread: by then the stages before are on their way, and
    the caller has nothing else to do."""


class Weights(NamedTuple):
  """A trained model without its tables."""

  cfg: ModelConfig
  graphdef: Any
  params: Any
  biases: Any
  layout: HashLayout | None
  compressor: TokenCompressor


class Decoder:
  """capacity: tokens a request can hold, prompt and continuation. chunk: tokens of a prompt that
  go through the model at once. donate: see `Stages`; the loops here never go back further than the
  last trail, so they may."""

  def __init__(
    self,
    model: Weights,
    source: RowSource | None,
    capacity: int,
    *,
    chunk: int = 128,
    donate: bool = True,
  ):
    self.model, self.source, self.capacity, self.chunk = model, source, capacity, chunk
    self._stages = Stages(model.graphdef, model.cfg, model.compressor.table, donate=donate)

  def with_source(self, source: RowSource | None) -> "Decoder":
    """The same decoder, compiled stages included, with rows from elsewhere."""
    other = copy.copy(self)
    other.source = source
    return other

  def empty(self, batch: int) -> DecodeState:
    """The state of `batch` requests that hold nothing."""
    return empty_state(self.model.cfg, self.model.layout, batch, self.capacity)

  def extend(
    self,
    state: DecodeState,
    tokens_BT: Any,
    count_B: Any,
    *,
    rows: Rows | None = None,
    every: bool = False,
  ) -> Extended:
    """`Stages.run` with the decoder's parameters; rows: of these tokens, if already started."""
    tokens_BT, count_B = jnp.asarray(tokens_BT, jnp.int32), jnp.asarray(count_B, jnp.int32)
    if rows is None and self.source is not None:
      rows = self.source.on_demand(tokens_BT, count_B, state.history_BH)
    model = self.model
    return self._stages.run(
      model.params, model.biases, state, tokens_BT, count_B, rows, every=every
    )

  def prefill(
    self, prompts: Sequence[Sequence[int]], state: DecodeState | None = None
  ) -> tuple[jax.Array, DecodeState]:
    """float32 [B, V] after each prompt, and the state that holds it.

    Rows of the next chunk are fetched while this one runs. state: what the prompts follow; nothing
    if left out. Raises ConfigError for an empty prompt, an id outside the vocabulary or more
    tokens than the capacity, those in the state included.
    """
    if state is None:
      self.check(prompts)
      state = self.empty(len(prompts))
    else:
      self.check(prompts, held=np.asarray(state.length_B).tolist())
    plan = _Chunks(prompts, self.chunk, self.model.compressor.table, np.asarray(state.history_BH))
    logits_BV, rows = None, self._started(plan, 0)
    for i in range(len(plan)):
      tokens_BT, count_B, _ = plan[i]
      following = self._started(plan, i + 1)
      out = self.extend(state, tokens_BT, count_B, rows=rows)
      state, rows = out.state, following
      logits_BV = out.logits if logits_BV is None else _newer(logits_BV, out.logits, count_B)
    return logits_BV, state

  def check(
    self, prompts: Sequence[Sequence[int]], new: int = 0, held: Sequence[int] | None = None
  ) -> None:
    """Raises ConfigError unless each prompt is sound and has room for `new` tokens after it.

    held: tokens that each request holds already; none if left out.
    """
    ids = len(self.model.compressor.table)
    held = [0] * len(prompts) if held is None else held
    if len(held) != len(prompts):
      raise ConfigError(f"prompt: {len(prompts)} prompts for a state of {len(held)} requests")
    for prompt, before in zip(prompts, held, strict=True):
      if len(prompt) == 0:
        raise ConfigError(
          "prompt: an empty prompt has nothing to continue; give at least one token"
        )
      for i in (min(prompt), max(prompt)):
        if not 0 <= i < ids:
          raise ConfigError(f"prompt: token id {i} is outside the vocabulary: 0..{ids - 1}")
      if before + len(prompt) + new > self.capacity:
        after = f" after {before}" if before else ""
        raise ConfigError(
          f"prompt: {len(prompt)} tokens{after} and {new} new ones do not fit in the "
          f"{self.capacity} that a request can hold"
        )

  def _started(self, plan: "_Chunks", i: int) -> Rows | None:
    return self.source.start(*plan[i]) if self.source is not None and i < len(plan) else None


def continuations(
  decoder: Decoder,
  prompts: Sequence[Sequence[int]],
  samplings: Sequence[Sampling],
  max_new: int,
) -> Iterator[np.ndarray]:
  """int32 [B], the next token of each request, `max_new` times; the caller stops when it likes.

  Raises like `Decoder.prefill`, and NonFiniteError where the model gives no finite logits.
  """
  decoder.check(prompts, max_new)
  settings = Settings.of(samplings)
  logits_BV, state = decoder.prefill(prompts)
  seen_BV = seen_tokens(prompts, logits_BV.shape[1])
  vocabulary = len(decoder.model.compressor.table)
  one_B = np.ones(len(prompts), np.int32)
  for i in range(max_new):
    logits_BTV = known_ids(logits_BV, vocabulary)[:, None]
    tokens_BT, seen_TBV = choose_each(logits_BTV, seen_BV, one_B[:, None], i * one_B, settings)
    seen_BV = seen_TBV[0]
    if i + 1 < max_new:
      out = decoder.extend(state, jnp.maximum(tokens_BT, 0), one_B)
      logits_BV, state = out.logits, out.state
    yield require_finite(np.asarray(tokens_BT)[:, 0])


def seen_tokens(prompts: Sequence[Sequence[int]], vocabulary: int) -> np.ndarray:
  """bool [B, V]: which tokens each prompt holds."""
  seen_BV = np.zeros((len(prompts), vocabulary), bool)
  for seen_V, prompt in zip(seen_BV, prompts, strict=True):
    seen_V[list(prompt)] = True
  return seen_BV


def known_ids(logits: jax.Array, vocabulary: int) -> jax.Array:
  """Logits [..., V] at -inf where the tokenizer has no id: an embedding may have some to spare."""
  return jnp.where(jnp.arange(logits.shape[-1]) < vocabulary, logits, -jnp.inf)


class _Chunks:
  """Prompts laid side by side and cut: [i] is (tokens_BT, count_B, history_BH) of chunk i.

  The last chunk is cut to a power of two, so that there are few shapes to compile.
  """

  def __init__(
    self, prompts: Sequence[Sequence[int]], chunk: int, token_map: np.ndarray, history: np.ndarray
  ):
    self.lengths_B = np.array([len(p) for p in prompts], np.int32)
    longest = int(self.lengths_B.max())
    rest = longest % chunk
    last = 1 << (rest - 1).bit_length() if rest else 0
    self.starts = [*range(0, longest, chunk)]
    self.stops = [min(s + chunk, longest - rest + last) for s in self.starts]
    self.tokens_BX = np.zeros((len(prompts), self.stops[-1]), np.int32)
    for row, prompt in zip(self.tokens_BX, prompts, strict=True):
      row[: len(prompt)] = prompt
    self.canonical_BX = np.concatenate([history, token_map[self.tokens_BX]], 1)
    self.context = history.shape[1]

  def __len__(self) -> int:
    return len(self.starts)

  def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    start, stop = self.starts[i], self.stops[i]
    count_B = np.clip(self.lengths_B - start, 0, stop - start)
    return (
      self.tokens_BX[:, start:stop],
      count_B,
      self.canonical_BX[:, start : start + self.context],
    )


@jax.jit
def _newer(old_BV: jax.Array, new_BV: jax.Array, count_B: jax.Array) -> jax.Array:
  return jnp.where(count_B[:, None] > 0, new_BV, old_BV)
