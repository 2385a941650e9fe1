"""Guessing ahead changes the number of passes and nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from speaker import diverged, make_speaker, some_tokens

from engram_jax.errors import NonFiniteError
from engram_jax.inference.decoder import Decoder, continuations
from engram_jax.inference.row_sources import DeviceRows
from engram_jax.inference.sampling import Sampling
from engram_jax.inference.speculative import prompt_lookup, speculative_continuations

pytestmark = pytest.mark.usefixtures("quick")
LOOP = [7, 8, 9] * 4


@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=20), most=st.integers(0, 5))
def test_a_guess_is_what_followed_the_same_words(tokens, most):
  guess = prompt_lookup(tokens, most)
  assert len(guess) <= most
  for n in (3, 2, 1):
    earlier = [i for i in range(n, len(tokens)) if tokens[i - n : i] == tokens[-n:]]
    if len(tokens) > n and earlier:
      assert guess == tokens[earlier[-1] : earlier[-1] + most]
      return
  assert guess == []


@pytest.fixture(scope="module")
def decoder(quick):
  speaker = make_speaker()
  w = speaker.weights
  return Decoder(w, DeviceRows(w.layout, w.compressor.table, speaker.tables), 64, chunk=8)


@pytest.mark.parametrize(
  "how",
  [Sampling(), Sampling(temperature=0.5, seed=5, top_k=3, repetition_penalty=0.8)],
  ids=["greedy", "sampled"],
)
def test_the_tokens_are_those_of_plain_decoding(decoder, how):
  """For requests that go on at different speeds, to the last token and not one more; some guesses
  are right in both (a penalty below 1 makes a text repeat itself)."""
  prompts = [LOOP, some_tokens(1, 5), some_tokens(2, 12)]
  plain = np.stack(list(continuations(decoder, prompts, [how] * 3, 20)), axis=1).tolist()
  guessed, most = [[], [], []], 0
  for step in speculative_continuations(decoder, prompts, [how] * 3, 20, guesses=3):
    for tokens, new in zip(guessed, step, strict=True):
      assert bool(new) == (len(tokens) < 20)
      most, tokens[:] = max(most, len(new)), tokens + new
  assert guessed == plain
  assert most > 1


def test_a_model_that_repeats_itself_takes_fewer_passes(decoder):
  """Greedy text of a small model ends in a loop, which the lookup foresees."""
  steps = list(speculative_continuations(decoder, [LOOP], [Sampling()], 40, guesses=3))
  assert sum(len(step[0]) for step in steps) == 40
  assert len(steps) < 40


@pytest.mark.parametrize("continued", [continuations, speculative_continuations])
def test_a_diverged_model_says_nothing(decoder, continued):
  with pytest.raises(NonFiniteError, match="not finite"):
    next(iter(continued(diverged(decoder), [LOOP], [Sampling()], 3)))
