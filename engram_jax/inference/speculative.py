"""Speculative decoding: draft tokens are verified by the model itself, so the text stays the same.

A draft token costs a position in a pass that is made anyway. After each new token, the request's
text is searched for an earlier position that ended in the same n-gram, and the tokens that follow
it there are the draft (prompt lookup; Leviathan et al., arXiv 2211.17192, for the verification).
One pass samples a token after every draft token; those up to the first that differs from its draft
are what plain decoding would have sampled, and the state is rolled back to them.
"""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from engram_jax.errors import ConfigError
from engram_jax.inference.decoder import Decoder, mask_unknown_ids, seen_tokens
from engram_jax.inference.sampling import (
  Sampling,
  SamplingBatch,
  require_finite,
  sample_each_position,
)
from engram_jax.inference.state import rollback


def prompt_lookup(tokens: Sequence[int], max_tokens: int, max_ngram: int = 3) -> list[int]:
  """At most `max_tokens` tokens that followed the latest earlier occurrence of the end of `tokens`.

  The end is its last n tokens, for the largest n <= `max_ngram` that occurs before; [] if none
  does.
  """
  text = np.asarray(tokens)
  for n in range(min(max_ngram, len(text) - 1), 0, -1):
    ngrams = np.lib.stride_tricks.sliding_window_view(text[:-1], n)
    matches = np.flatnonzero((ngrams == text[-n:]).all(1))
    if matches.size:
      start = matches[-1] + n
      return text[start : start + max_tokens].tolist()
  return []


def generate_tokens_speculatively(
  decoder: Decoder,
  prompts: Sequence[Sequence[int]],
  samplings: Sequence[Sampling],
  max_new: int,
  *,
  draft_tokens: int = 4,
) -> Iterator[list[list[int]]]:
  """Yields the tokens of `generate_tokens`, several at a time: one list a request and step, until
  each request has `max_new`. A request that is done gets empty lists.

  draft_tokens: the most that are drafted for a request in one step.

  Raises like `generate_tokens`, and ConfigError unless `draft_tokens` is an integer of at least 0.
  """
  if not isinstance(draft_tokens, int | np.integer) or draft_tokens < 0:
    raise ConfigError(f"draft_tokens={draft_tokens!r} must be an integer of at least 0")
  B, vocabulary = len(prompts), len(decoder.model.compressor.table)
  decoder.check_prompts(prompts, max_new)
  batch = SamplingBatch.of(samplings)
  logits_BV, state = decoder.prefill(prompts)
  seen_BV = jnp.asarray(seen_tokens(prompts, logits_BV.shape[1]))
  texts = [list(prompt) for prompt in prompts]
  generated_B = np.zeros(B, np.int32)
  logits_BTV, drafts = logits_BV[:, None], [[] for _ in prompts]
  rollback_info = None
  while True:
    next_BT = _padded(drafts, logits_BTV.shape[1])
    sampled_BT, seen_TBV = sample_each_position(
      mask_unknown_ids(logits_BTV, vocabulary), seen_BV, next_BT, generated_B, batch
    )
    new = [
      _accept(sampled, draft, max_new - n)
      for sampled, draft, n in zip(
        np.asarray(sampled_BT).tolist(), drafts, generated_B, strict=True
      )
    ]
    for tokens in new:
      require_finite(np.array(tokens, np.int32))
    yield new
    count_B = np.array([len(tokens) for tokens in new], np.int32)
    generated_B = generated_B + count_B
    for text, tokens in zip(texts, new, strict=True):
      text += tokens
    if (generated_B == max_new).all():
      return
    if rollback_info is not None:
      state = rollback(state, rollback_info, jnp.asarray(count_B))
    seen_BV = jnp.where(count_B[:, None] > 0, seen_TBV[count_B - 1, np.arange(B)], seen_BV)
    remaining_B = max_new - generated_B
    drafts = [
      prompt_lookup(text, min(draft_tokens, remaining - 1)) if remaining > 1 else []
      for text, remaining in zip(texts, remaining_B, strict=True)
    ]
    inputs = [[text[-1], *draft] for text, draft in zip(texts, drafts, strict=True)]
    count_B = np.array([len(i) if r else 0 for i, r in zip(inputs, remaining_B, strict=True)])
    out = decoder.extend(state, _padded(inputs, draft_tokens + 1), count_B, all_logits=True)
    state, rollback_info, logits_BTV = out.state, out.rollback_info, out.logits


def _accept(sampled: list[int], draft: list[int], max_tokens: int) -> list[int]:
  """The sampled tokens up to and with the first that differs from its draft."""
  differs = (i for i, (s, d) in enumerate(zip(sampled, draft, strict=False)) if s != d)
  return sampled[: next(differs, len(draft)) + 1][:max_tokens]


def _padded(lists: Sequence[Sequence[int]], width: int) -> np.ndarray:
  """int32 [len(lists), width], zeros after the end of each list."""
  out = np.zeros((len(lists), width), np.int32)
  for row, values in zip(out, lists, strict=True):
    row[: len(values)] = values
  return out
