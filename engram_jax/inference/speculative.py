"""Several tokens a step: guesses are checked by the model itself, so nothing it says changes.

A guess costs a position in a pass that is made anyway. After each new token, the request's own text
is searched for an earlier place that ended in the same n-gram, and what followed there is the guess
(prompt lookup; Leviathan et al., arXiv 2211.17192, for the checking). One pass gives the choice
after every guessed token; those up to the first that differs from its guess are what plain decoding
would have chosen, and the state is rewound to them.
"""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from engram_jax.inference.decoder import Decoder, known_ids, seen_tokens
from engram_jax.inference.sampling import Sampling, Settings, choose_each, require_finite
from engram_jax.inference.state import rewind


def prompt_lookup(tokens: Sequence[int], most: int, longest: int = 3) -> list[int]:
  """At most `most` tokens that followed the latest earlier occurrence of the end of `tokens`.

  The end is its last n tokens, for the largest n <= `longest` that occurs before; [] if none does.
  """
  text = np.asarray(tokens)
  for n in range(min(longest, len(text) - 1), 0, -1):
    windows = np.lib.stride_tricks.sliding_window_view(text[:-1], n)
    places = np.flatnonzero((windows == text[-n:]).all(1))
    if places.size:
      start = places[-1] + n
      return text[start : start + most].tolist()
  return []


def speculative_continuations(
  decoder: Decoder,
  prompts: Sequence[Sequence[int]],
  samplings: Sequence[Sampling],
  max_new: int,
  *,
  guesses: int = 4,
) -> Iterator[list[list[int]]]:
  """The tokens of `continuations`, several at a time: one list a request and step, until each has
  `max_new`. A request that is done gets empty lists.

  guesses: at most so many tokens are guessed a step.
  """
  B, vocabulary = len(prompts), len(decoder.model.compressor.table)
  decoder.check(prompts, max_new)
  settings = Settings.of(samplings)
  logits_BV, state = decoder.prefill(prompts)
  seen_BV = jnp.asarray(seen_tokens(prompts, logits_BV.shape[1]))
  texts = [list(prompt) for prompt in prompts]
  made_B = np.zeros(B, np.int32)
  logits_BTV, drafts = logits_BV[:, None], [[] for _ in prompts]
  trail = None
  while True:
    next_BT = _padded(drafts, logits_BTV.shape[1])
    chosen_BT, seen_TBV = choose_each(
      known_ids(logits_BTV, vocabulary), seen_BV, next_BT, made_B, settings
    )
    new = [
      _accepted(c, draft, max_new - n)
      for c, draft, n in zip(np.asarray(chosen_BT).tolist(), drafts, made_B, strict=True)
    ]
    for tokens in new:
      require_finite(np.array(tokens, np.int32))
    yield new
    count_B = np.array([len(tokens) for tokens in new], np.int32)
    made_B = made_B + count_B
    for text, tokens in zip(texts, new, strict=True):
      text += tokens
    if (made_B == max_new).all():
      return
    if trail is not None:
      state = rewind(state, trail, jnp.asarray(count_B))
    seen_BV = jnp.where(count_B[:, None] > 0, seen_TBV[count_B - 1, np.arange(B)], seen_BV)
    left_B = max_new - made_B
    drafts = [
      prompt_lookup(text, min(guesses, left - 1)) if left > 1 else []
      for text, left in zip(texts, left_B, strict=True)
    ]
    fed = [[text[-1], *draft] for text, draft in zip(texts, drafts, strict=True)]
    fed_B = np.array([len(f) if left else 0 for f, left in zip(fed, left_B, strict=True)])
    out = decoder.extend(state, _padded(fed, guesses + 1), fed_B, every=True)
    state, trail, logits_BTV = out.state, out.trail, out.logits


def _accepted(chosen: list[int], draft: list[int], most: int) -> list[int]:
  """The choices up to and with the first that its guess did not foresee."""
  right = next((i for i, (c, d) in enumerate(zip(chosen, draft, strict=False)) if c != d), None)
  return chosen[: len(draft) + 1 if right is None else right + 1][:most]


def _padded(lists: Sequence[Sequence[int]], width: int) -> np.ndarray:
  out = np.zeros((len(lists), width), np.int32)
  for row, values in zip(out, lists, strict=True):
    row[: len(values)] = values
  return out
