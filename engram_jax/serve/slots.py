"""What the engine holds on the device: a fixed number of requests, one token further a step."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.inference.decoder import Decoder, known_ids, seen_tokens
from engram_jax.inference.extend import Rows
from engram_jax.inference.sampling import Sampling, Settings, choose_each
from engram_jax.inference.state import DecodeState, insert

TOP = 20  # likeliest tokens that are found at once, where any request asks for some


class Step(NamedTuple):
  """NumPy, of all slots. top ids and logprobs: the likeliest. gates: one [B] a memory."""

  token_B: np.ndarray
  logprob_B: np.ndarray
  top_BK: np.ndarray
  top_logprob_BK: np.ndarray
  gates: tuple[np.ndarray, ...]


class Scores(NamedTuple):
  """NumPy, of a piece of a prompt: logprobs [T] of the tokens that follow each, the likeliest
  [T, K] in their place, gates [T] of each token itself."""

  logprob_T: np.ndarray
  top_TK: np.ndarray
  top_logprob_TK: np.ndarray
  gates: tuple[np.ndarray, ...]


class Slots:
  """`count` requests side by side. A free slot costs its share of a step and changes nothing."""

  def __init__(self, decoder: Decoder, count: int):
    cfg, self.decoder, self.count = decoder.model.cfg, decoder, count
    self.vocabulary = len(decoder.model.compressor.table)
    self.sizes = (max(decoder.chunk // 8, 1), decoder.chunk)  # of pieces: few shapes to compile
    self._state = decoder.empty(count)
    self._logits_BV = jnp.zeros((count, cfg.vocab_size), jnp.float32)
    self._seen_BV = jnp.zeros((count, cfg.vocab_size), bool)
    self._index_B = np.zeros(count, np.int32)
    self._samplings = [Sampling()] * count
    self._settings = Settings.of(self._samplings)

  def ahead(self, ids: Sequence[int], start: int) -> Rows | None:
    """Begins to fetch the rows of a prompt's piece that begins at `start`, if there is one."""
    model, source = self.decoder.model, self.decoder.source
    if source is None or start >= len(ids):
      return None
    H = model.layout.max_ngram - 1
    past = model.compressor(np.array(ids[max(start - H, 0) : start], np.int32))
    history_BH = np.full((1, H), model.layout.pad_id, np.int32)
    history_BH[0, H - len(past) :] = past
    return source.start(*self._padded(ids[start : start + self.sizes[-1]]), history_BH)

  def read(
    self,
    one: DecodeState,
    piece: Sequence[int],
    rows: Rows | None,
    following: Sequence[int] | None,
    top: bool,
  ) -> tuple[jax.Array, DecodeState, Scores | None]:
    """A piece of a prompt into a request's own state.

    Args:
      one: of a single request; lost where the decoder donates.
      rows: of the piece, as `ahead` gives them.
      following: the token after each of the piece's, if they are to be scored; any at the end.
      top: whether to find the likeliest tokens too.

    Returns:
      logits [1, V] after the piece, the state with it, and the scores.
    """
    tokens_BT, count_B = self._padded(piece)
    out = self.decoder.extend(one, tokens_BT, count_B, rows=rows, every=following is not None)
    if following is None:
      return out.logits, out.state, None
    last_BV = out.logits[:, len(piece) - 1]
    next_BT, _ = self._padded(following)
    scored = _score(out.logits, next_BT, self.vocabulary, self._top(top))
    scored, gates = jax.device_get((scored, [_mean(g) for g in out.gates]))
    return last_BV, out.state, Scores(*(x[0] for x in scored), tuple(g[0] for g in gates))

  def put(
    self,
    slot: int,
    one: DecodeState,
    logits_BV: jax.Array,
    prompt: Sequence[int],
    sampling: Sampling,
  ) -> None:
    """The request of `one`, its prompt read, into a slot."""
    seen_BV = seen_tokens([prompt], self._seen_BV.shape[1])
    place = jnp.int32(slot)
    self._state = _insert(self._state, place, one)
    self._logits_BV = _set(self._logits_BV, place, logits_BV)
    self._seen_BV = _set(self._seen_BV, place, seen_BV)
    self._index_B = np.where(np.arange(self.count) == slot, 0, self._index_B)
    self._samplings = [*self._samplings[:slot], sampling, *self._samplings[slot + 1 :]]
    self._settings = Settings.of(self._samplings)

  def step(self, busy_B: np.ndarray, top: bool) -> Step:
    """The next token of every busy slot, also put into its state."""
    count_B = busy_B.astype(np.int32)
    tokens_BT, fed_BT, self._seen_BV, scored = _choose(
      self._logits_BV, self._seen_BV, self._index_B, self._settings, self.vocabulary, self._top(top)
    )
    out = self.decoder.extend(self._state, fed_BT, count_B)
    self._state, self._logits_BV = out.state, out.logits
    self._index_B = self._index_B + count_B
    tokens_BT, scored, gates = jax.device_get((tokens_BT, scored, [_mean(g) for g in out.gates]))
    return Step(tokens_BT[:, 0], *(x[:, 0] for x in scored), tuple(g[:, 0] for g in gates))

  def _padded(self, piece: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    size = next(size for size in self.sizes if size >= len(piece))
    tokens_BT = np.zeros((1, size), np.int32)
    tokens_BT[0, : len(piece)] = piece
    return tokens_BT, np.array([len(piece)], np.int32)

  def _top(self, wanted: bool) -> int:
    return min(TOP, self.vocabulary) if wanted else 0


# Nothing refers to the old arrays once these have run: they are reused.
_insert = jax.jit(insert, donate_argnums=0)
_set = jax.jit(lambda x_BV, slot, y_BV: x_BV.at[slot].set(y_BV[0]), donate_argnums=0)
_mean = jax.jit(lambda gate_BTG: gate_BTG.mean(-1))


@functools.partial(jax.jit, static_argnames=("vocabulary", "top"))
def _choose(logits_BV, seen_BV, index_B, settings: Settings, vocabulary: int, top: int) -> Any:
  """As `continuations` chooses, -1 included, the tokens to go on with, and their scores."""
  logits_BTV = known_ids(logits_BV, vocabulary)[:, None]
  unused_BT = jnp.ones((len(logits_BV), 1), jnp.int32)
  tokens_BT, seen_TBV = choose_each(logits_BTV, seen_BV, unused_BT, index_B, settings)
  fed_BT = jnp.maximum(tokens_BT, 0)
  return tokens_BT, fed_BT, seen_TBV[0], _score(logits_BTV, fed_BT, vocabulary, top)


@functools.partial(jax.jit, static_argnames=("vocabulary", "top"))
def _score(logits_BTV: jax.Array, next_BT: jax.Array, vocabulary: int, top: int) -> tuple:
  """Log-probabilities of the tokens that follow [B, T], likeliest ids [B, T, K] and theirs."""
  logprobs_BTV = jax.nn.log_softmax(known_ids(logits_BTV, vocabulary).astype(jnp.float32))
  next_BT1 = jnp.asarray(next_BT)[:, :, None]
  best_BTK, ids_BTK = jax.lax.top_k(logprobs_BTV, top)
  return jnp.take_along_axis(logprobs_BTV, next_BT1, axis=-1)[..., 0], ids_BTK, best_BTK
