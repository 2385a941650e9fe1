"""Speculative decoding changes the number of passes and nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_model import make_small_model, random_tokens, with_nan_params

from engram_jax.errors import NonFiniteError
from engram_jax.inference.decoder import Decoder, generate_tokens
from engram_jax.inference.row_sources import DeviceRowSource
from engram_jax.inference.sampling import Sampling
from engram_jax.inference.speculative import generate_tokens_speculatively, prompt_lookup

LOOP = [7, 8, 9] * 4


@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=20), max_tokens=st.integers(0, 5))
def test_a_draft_is_the_tokens_that_followed_the_same_ngram(tokens, max_tokens):
  draft = prompt_lookup(tokens, max_tokens)
  assert len(draft) <= max_tokens
  for n in (3, 2, 1):
    earlier = [i for i in range(n, len(tokens)) if tokens[i - n : i] == tokens[-n:]]
    if len(tokens) > n and earlier:
      assert draft == tokens[earlier[-1] : earlier[-1] + max_tokens]
      return
  assert draft == []


@pytest.fixture(scope="module")
def decoder():
  model = make_small_model()
  w = model.weights
  return Decoder(w, DeviceRowSource(w.layout, w.compressor.table, model.tables), 64, chunk=8)


@pytest.mark.parametrize(
  "sampling",
  [Sampling(), Sampling(temperature=0.5, seed=5, top_k=3, repetition_penalty=0.8)],
  ids=["greedy", "sampled"],
)
def test_the_tokens_are_those_of_plain_decoding(decoder, sampling):
  """For requests that go on at different speeds, to the last token and not one more; some drafts
  are right in both (a penalty below 1 makes a text repeat itself)."""
  prompts = [LOOP, random_tokens(1, 5), random_tokens(2, 12)]
  plain = np.stack(list(generate_tokens(decoder, prompts, [sampling] * 3, 20)), axis=1).tolist()
  texts, longest = [[], [], []], 0
  for step in generate_tokens_speculatively(decoder, prompts, [sampling] * 3, 20, draft_tokens=3):
    for tokens, new in zip(texts, step, strict=True):
      assert bool(new) == (len(tokens) < 20)
      longest, tokens[:] = max(longest, len(new)), tokens + new
  assert texts == plain
  assert longest > 1


def test_a_model_that_repeats_itself_takes_fewer_passes(decoder):
  """Greedy text of a small model ends in a loop, which the lookup finds."""
  steps = list(generate_tokens_speculatively(decoder, [LOOP], [Sampling()], 40, draft_tokens=3))
  assert sum(len(step[0]) for step in steps) == 40
  assert len(steps) < 40


@pytest.mark.parametrize("generate", [generate_tokens, generate_tokens_speculatively])
def test_a_diverged_model_gives_no_token(decoder, generate):
  with pytest.raises(NonFiniteError, match="not finite"):
    next(iter(generate(with_nan_params(decoder), [LOOP], [Sampling()], 3)))
