"""Sampled tokens have the probabilities asked for, and drafts change none of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_jax.errors import ConfigError, NonFiniteError
from engram_jax.inference.sampling import (
  Sampling,
  SamplingBatch,
  require_finite,
  sample_each_position,
  sample_tokens,
)

LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))
NONE = np.zeros((1, 5), bool)
_sample = jax.jit(sample_tokens)


def sample(sampling, count=400, seen=NONE, logits=LOGITS):
  """The first `count` samples of one request, each from the same logits."""
  B = len(logits) if logits.ndim == 2 else count
  logits_BV = np.broadcast_to(logits, (B, 5))
  return np.asarray(
    _sample(
      logits_BV, np.broadcast_to(seen, (B, 5)), np.arange(B), SamplingBatch.of([sampling] * B)
    )
  )


def test_temperature_zero_is_the_argmax():
  assert set(sample(Sampling(seed=3))) == {0}


def test_frequencies_are_the_softmax():
  counts = np.bincount(sample(Sampling(temperature=1.0), 20_000), minlength=5) / 20_000
  np.testing.assert_allclose(counts, np.exp(LOGITS), atol=0.015)


def test_frequencies_are_the_softmax_at_a_temperature():
  counts = np.bincount(sample(Sampling(temperature=0.5), 20_000), minlength=5) / 20_000
  np.testing.assert_allclose(counts, jax.nn.softmax(LOGITS / 0.5), atol=0.015)


def test_the_smallest_temperature_is_nearly_greedy():
  for temperature in (1e-4, 1e-38, 1e-45):
    assert set(sample(Sampling(temperature=temperature), 100, logits=LOGITS + 50)) == {0}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_give_no_token(temperature):
  logits = np.stack([LOGITS, np.where(LOGITS < -2, np.nan, LOGITS), np.full(5, -np.inf)])
  sampled = sample(Sampling(temperature), logits=logits.astype(np.float32))
  assert (sampled >= 0).tolist() == [True, False, False]
  require_finite(sampled[:1])
  with pytest.raises(NonFiniteError, match="not finite"):
    require_finite(sampled)


@pytest.mark.parametrize(
  ("options", "allowed"),
  [
    ({"top_k": 2}, {0, 1}),
    ({"top_k": 99}, {0, 1, 2, 3, 4}),
    ({"top_p": 0.69}, {0, 1}),
    ({"top_p": 0.71}, {0, 1, 2}),
    ({"top_p": 1e-6}, {0}),
    ({"top_k": 4, "top_p": 0.5}, {0, 1}),
  ],
)
def test_top_k_and_top_p_leave_the_likeliest_tokens(options, allowed):
  assert set(sample(Sampling(temperature=1.0, **options), 2000)) == allowed


def test_a_repetition_penalty_makes_seen_tokens_less_likely():
  """Logits that are negative are multiplied, positive ones divided."""
  seen = np.array([[True, False, False, False, False]])
  for logits in (LOGITS, LOGITS + 5):
    assert sample(Sampling(repetition_penalty=2.0), 1, seen, logits)[0] == 1
    assert sample(Sampling(repetition_penalty=1.0), 1, seen, logits)[0] == 0


def test_each_request_has_its_parameters_and_seed():
  samplings = [Sampling(), Sampling(temperature=3.0, seed=1), Sampling(temperature=3.0, seed=2)]
  logits = np.broadcast_to(LOGITS, (3, 5))
  together = [
    np.asarray(_sample(logits, np.zeros((3, 5), bool), np.full(3, i), SamplingBatch.of(samplings)))
    for i in range(30)
  ]
  greedy, one, two = np.stack(together, 1)
  assert set(greedy) == {0}
  assert one.tolist() != two.tolist()
  assert one.tolist() == [int(sample(samplings[1], 30)[i]) for i in range(30)]


@pytest.mark.parametrize("other", [Sampling(), Sampling(0.7, top_p=0.3), Sampling(0.7, top_k=1)])
@pytest.mark.parametrize(
  "sampling", [Sampling(), Sampling(1.0, seed=5), Sampling(1.0, top_k=3, top_p=0.9, seed=5)]
)
def test_a_sample_does_not_depend_on_the_rest_of_the_batch(sampling, other):
  """Noise and order are computed only if a request of the batch needs them."""
  logits = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
  logits_BV = np.repeat(logits, 2, axis=0)
  index_B = np.repeat(np.arange(64), 2)
  sampled = _sample(
    logits_BV, np.zeros((128, 5), bool), index_B, SamplingBatch.of([sampling, other] * 64)
  )
  np.testing.assert_array_equal(np.asarray(sampled)[::2], sample(sampling, logits=logits))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), drafts=st.lists(st.integers(0, 4), min_size=4, max_size=4))
def test_samples_along_a_right_draft_are_those_made_one_by_one(seed, drafts):
  """With a penalty and random logits, nothing differs up to the first wrong draft token."""
  rng = np.random.default_rng(seed)
  logits_BTV = rng.normal(size=(1, 4, 5)).astype(np.float32)
  samplings = SamplingBatch.of([Sampling(temperature=1.0, repetition_penalty=1.7, seed=seed)])
  sampled, seen_TBV = sample_each_position(
    logits_BTV, NONE, np.array([drafts]), np.array([7]), samplings
  )
  seen = jnp.asarray(NONE)
  for t in range(4):
    alone, after = sample_each_position(
      logits_BTV[:, t : t + 1], seen, np.zeros((1, 1), int), np.array([7 + t]), samplings
    )
    assert int(sampled[0, t]) == int(alone[0, 0])
    seen = after[0]
    np.testing.assert_array_equal(seen, seen_TBV[t])
    if int(alone[0, 0]) != drafts[t]:
      break


@pytest.mark.parametrize(
  "bad",
  [
    {"temperature": -0.5},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"top_k": -1},
    {"top_p": 0.0},
    {"top_p": 1.5},
    {"repetition_penalty": 0.0},
    {"seed": -1},
    {"seed": 2**32},
  ],
)
def test_values_outside_their_range_are_refused(bad):
  (name,) = bad
  with pytest.raises(ConfigError, match=f"{name}=") as caught:
    Sampling(**bad)
  assert caught.value.exit_code == 2
