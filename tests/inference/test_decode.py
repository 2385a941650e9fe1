"""Decoding gives the logits of one full forward pass, however a sequence is cut and batched."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import V, make_small_model, random_tokens

from engram_jax.errors import ConfigError
from engram_jax.inference.decoder import Decoder, generate_tokens
from engram_jax.inference.row_sources import DeviceRowSource
from engram_jax.inference.sampling import Sampling
from engram_jax.inference.state import insert, rollback

TOKENS = random_tokens(0, 24)


@functools.cache
def make_decoder(model, chunk=8, **options):
  """One decoder for all tests with the same arguments: each compiles its own stages."""
  w, row_source = model.weights, None
  if w.layout:
    row_source = DeviceRowSource(w.layout, w.compressor.table, model.tables)
  return Decoder(w, row_source, 32, chunk=chunk, **options)


@pytest.fixture(scope="module")
def model():
  return make_small_model()


@pytest.fixture(scope="module")
def decoder(model):
  """A decoder whose states all stay good."""
  return make_decoder(model, donate=False)


def assert_close(actual, expected):
  np.testing.assert_allclose(np.asarray(actual), expected, rtol=1e-5, atol=1e-5)


def extend(decoder, state, tokens, **options):
  """Adds one token, or up to 8 and padding: two shapes to compile."""
  padding = 8 - len(tokens) if len(tokens) > 1 else 0
  return decoder.extend(state, [[*tokens, *[0] * padding]], [len(tokens)], **options)


VARIANTS = {
  "default": {},
  "blocked experts": {"dispatch": "blocked"},
  "no memory": {"memory": False},
  "no convolution": {"conv_kernel": 0, "gate": "sigmoid", "bias": True},
  "first block, one layer": {"layers": (0,), "max_ngram": 2, "rows_per_head": 53},
  "released V4.1": {"dialect": "deepseek_v41", "max_ngram": 4, "conv_kernel": 0},
  "released Qwen": {"dialect": "qwen_ple", "pad_id": 5, "merged_ids": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_token_by_token_is_the_full_forward(variant):
  model = make_small_model(**VARIANTS[variant])
  decoder, expected_TV = make_decoder(model), model.logits(TOKENS)
  logits_BV, state = decoder.prefill([TOKENS[:5]])
  assert_close(logits_BV[0], expected_TV[4])
  for t in range(5, len(TOKENS)):
    out = extend(decoder, state, TOKENS[t : t + 1])
    state = out.state
    assert_close(out.logits[0], expected_TV[t])


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(1, 8), min_size=3, max_size=12))
def test_any_split_into_chunks_gives_the_same_logits(sizes):
  """Every position's logits, with chunks of any length after any left context."""
  model = make_small_model()
  decoder = make_decoder(model)
  state, parts, rest = decoder.empty_state(1), [], TOKENS
  for size in sizes:
    chunk, rest = rest[:size], rest[size:]
    if chunk:
      out = extend(decoder, state, chunk, all_logits=True)
      state = out.state
      parts.append(out.logits[0, : len(chunk)])
  parts = np.concatenate(parts)
  assert_close(parts, model.logits(TOKENS)[: len(parts)])


@pytest.mark.parametrize("chunk", [1, 8, 7])
def test_prefill_in_chunks_is_the_full_forward(model, chunk):
  logits_BV, state = make_decoder(model, chunk=chunk).prefill([TOKENS])
  assert_close(logits_BV[0], model.logits(TOKENS)[-1])
  assert state.length_B.tolist() == [len(TOKENS)]


def test_prompts_of_different_lengths_do_not_depend_on_their_order(model):
  """The logits of a request depend neither on the others nor on its position in the batch."""
  prompts = [random_tokens(i, n) for i, n in enumerate((3, 11, 1, 20))]
  decoder = make_decoder(model)
  for order in ([0, 1, 2], [2, 3, 1], [3, 0, 2]):
    logits_BV, state = decoder.prefill([prompts[i] for i in order])
    tokens_BT = np.array([[7]] * len(order))
    after = decoder.extend(state, tokens_BT, np.ones(len(order), int))
    for b, i in enumerate(order):
      assert_close(logits_BV[b], model.logits(prompts[i])[-1])
      assert_close(after.logits[b], model.logits([*prompts[i], 7])[-1])


def test_padding_changes_no_request(model, decoder):
  """A request that gets no token keeps its state, bit for bit, up to its length."""
  _, state = decoder.prefill([TOKENS[:6], TOKENS[:8], TOKENS[:3]])
  out = decoder.extend(state, np.full((3, 8), 9), np.array([0, 2, 8]))
  for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(out.state), strict=True):
    chex.assert_trees_all_equal(before[0], after[0])


def test_a_snapshot_is_the_old_state(model, decoder):
  _, state = decoder.prefill([TOKENS[:9]])
  copy = jax.tree.map(np.asarray, state)
  one = extend(decoder, state, [3, 4, 5])
  other = extend(decoder, state, TOKENS[9:12])
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, state), copy)
  assert_close(one.logits[0], model.logits([*TOKENS[:9], 3, 4, 5])[-1])
  assert_close(other.logits[0], model.logits(TOKENS[:12])[-1])


@pytest.mark.parametrize("donate", [False, True])
def test_a_rollback_reaches_any_position(model, donate):
  """After wrong tokens and a rollback, the right ones give the logits of the full forward."""
  decoder = make_decoder(model, donate=donate)
  expected_TV = model.logits(TOKENS)
  for accepted in (0, 1, 3, 4):
    _, state = decoder.prefill([TOKENS[:9]])
    wrong = [*TOKENS[9 : 9 + accepted], *[1] * (4 - accepted)]
    out = extend(decoder, state, wrong, all_logits=True)
    back = rollback(out.state, out.rollback_info, jnp.array([accepted]))
    assert back.length_B.tolist() == [9 + accepted]
    rest = extend(decoder, back, TOKENS[9 + accepted : 15], all_logits=True)
    assert_close(rest.logits[0, : 6 - accepted], expected_TV[9 + accepted : 15])


def test_a_request_can_be_inserted_into_a_slot(model, decoder):
  _, many = decoder.prefill([TOKENS[:6], TOKENS[:8], TOKENS[:3]])
  _, one = decoder.prefill([TOKENS[:10]])
  state = insert(many, jnp.int32(1), one)
  out = decoder.extend(state, np.array([[2], [4], [6]]), np.ones(3, int))
  for b, (length, token) in enumerate(((6, 2), (10, 4), (3, 6))):
    assert_close(out.logits[b], model.logits([*TOKENS[:length], token])[-1])


def test_gates_do_not_depend_on_the_chunks(model, decoder):
  full = extend(decoder, decoder.empty_state(1), TOKENS[:8])
  first = extend(decoder, decoder.empty_state(1), TOKENS[:5])
  second = extend(decoder, first.state, TOKENS[5:8])
  assert len(full.gates) == len(model.weights.layout.layers)
  for gate, a, b in zip(full.gates, first.gates, second.gates, strict=True):
    assert_close(jnp.concatenate([a[:, :5], b[:, :3]], 1), gate)
    assert np.ptp(np.asarray(gate)) > 0.1


def test_greedy_continuations_are_the_argmax_of_the_full_forward(model):
  prompts = [random_tokens(i, n) for i, n in enumerate((3, 11, 6))]
  steps = generate_tokens(make_decoder(model), prompts, [Sampling()] * 3, 8)
  new_BT = np.stack(list(steps), axis=1)
  assert len({tuple(new) for new in new_BT.tolist()}) > 1
  for prompt, new_T in zip(prompts, new_BT, strict=True):
    argmax_T = model.logits([*prompt, *new_T.tolist()]).argmax(-1)
    assert new_T.tolist() == argmax_T[len(prompt) - 1 : -1].tolist()


def test_a_sampled_continuation_does_not_depend_on_the_batch(model):
  prompts = [random_tokens(i, n) for i, n in enumerate((3, 11, 6))]
  samplings = [
    Sampling(temperature=1.5, seed=i, top_k=20, repetition_penalty=1.2) for i in range(3)
  ]
  together = np.stack(list(generate_tokens(make_decoder(model), prompts, samplings, 6)), axis=1)
  for prompt, sampling, expected in zip(prompts, samplings, together, strict=True):
    alone = np.stack(list(generate_tokens(make_decoder(model), [prompt], [sampling], 6)), axis=1)[0]
    assert alone.tolist() == expected.tolist()
  other = generate_tokens(make_decoder(model), prompts[:1], [Sampling(temperature=1.5, seed=9)], 6)
  assert np.concatenate(list(other)).tolist() != together[0].tolist()


@pytest.mark.parametrize("bad", [-1, V])
def test_ids_outside_the_vocabulary_are_refused(decoder, bad):
  with pytest.raises(ConfigError, match=rf"token id {bad} .* 0\.\.{V - 1}") as caught:
    decoder.prefill([[1, 2], [3, bad]])
  assert caught.value.exit_code == 2


def test_empty_and_too_long_prompts_are_refused(decoder):
  with pytest.raises(ConfigError, match="empty"):
    decoder.prefill([[1], []])
  with pytest.raises(ConfigError, match="33 tokens and 0 new ones do not fit in the 32"):
    decoder.prefill([[1] * 33])
  with pytest.raises(ConfigError, match="30 tokens and 5 new ones"):
    next(generate_tokens(decoder, [[1] * 30], [Sampling()], 5))


def test_the_tokens_of_a_state_count_when_a_prompt_follows_it(model, decoder):
  _, state = decoder.prefill([TOKENS[:3], TOKENS[:8]])
  with pytest.raises(ConfigError, match="25 tokens after 8 and 0 new ones do not fit in the 32"):
    decoder.prefill([[1] * 25, [1] * 25], state)
  with pytest.raises(ConfigError, match="1 prompts for a state of 2 requests"):
    decoder.prefill([[1]], state)
  logits_BV, after = decoder.prefill([TOKENS[3:24], TOKENS[8:24]], state)
  assert after.length_B.tolist() == [24, 24]
  for logits_V in logits_BV:
    assert_close(logits_V, model.logits(TOKENS)[-1])
