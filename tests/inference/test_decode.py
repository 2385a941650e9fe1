"""Decoding gives what one full forward pass gives, however a sequence is cut and batched."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speaker import V, make_speaker, some_tokens

from engram_jax.errors import ConfigError
from engram_jax.inference.decoder import Decoder, continuations
from engram_jax.inference.row_sources import DeviceRows
from engram_jax.inference.sampling import Sampling
from engram_jax.inference.state import insert, rewind

pytestmark = pytest.mark.usefixtures("quick")
TOKENS = some_tokens(0, 24)


@functools.cache
def decoder_of(speaker, chunk=8, **options):
  """One for all tests that want it so: each compiles its own stages."""
  w = speaker.weights
  source = DeviceRows(w.layout, w.compressor.table, speaker.tables) if w.layout else None
  return Decoder(w, source, 32, chunk=chunk, **options)


@pytest.fixture(scope="module")
def speaker(quick):
  return make_speaker()


@pytest.fixture(scope="module")
def decoder(quick, speaker):
  """One whose states all stay good."""
  return decoder_of(speaker, donate=False)


def close(actual, expected):
  np.testing.assert_allclose(np.asarray(actual), expected, rtol=1e-5, atol=1e-5)


def extend(decoder, state, tokens, **options):
  """One token, or up to 8 and padding: two shapes to compile."""
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
  speaker = make_speaker(**VARIANTS[variant])
  decoder, expected_TV = decoder_of(speaker), speaker.logits(TOKENS)
  logits_BV, state = decoder.prefill([TOKENS[:5]])
  close(logits_BV[0], expected_TV[4])
  for t in range(5, len(TOKENS)):
    out = extend(decoder, state, TOKENS[t : t + 1])
    state = out.state
    close(out.logits[0], expected_TV[t])


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(1, 8), min_size=3, max_size=12))
def test_any_split_into_pieces(sizes):
  """Every position's logits, with pieces of any length after any left context."""
  speaker = make_speaker()
  decoder = decoder_of(speaker)
  state, parts, rest = decoder.empty(1), [], TOKENS
  for size in sizes:
    piece, rest = rest[:size], rest[size:]
    if piece:
      out = extend(decoder, state, piece, every=True)
      state = out.state
      parts.append(out.logits[0, : len(piece)])
  parts = np.concatenate(parts)
  close(parts, speaker.logits(TOKENS)[: len(parts)])


@pytest.mark.parametrize("chunk", [1, 8, 7])
def test_prefill_in_chunks(speaker, chunk):
  logits_BV, state = decoder_of(speaker, chunk=chunk).prefill([TOKENS])
  close(logits_BV[0], speaker.logits(TOKENS)[-1])
  assert state.length_B.tolist() == [len(TOKENS)]


def test_prompts_of_different_lengths_in_any_order(speaker):
  """What a request says does not depend on the others, nor on its place among them."""
  prompts = [some_tokens(i, n) for i, n in enumerate((3, 11, 1, 20))]
  decoder = decoder_of(speaker)
  for order in ([0, 1, 2], [2, 3, 1], [3, 0, 2]):
    logits_BV, state = decoder.prefill([prompts[i] for i in order])
    tokens_BT = np.array([[7]] * len(order))
    after = decoder.extend(state, tokens_BT, np.ones(len(order)))
    for b, i in enumerate(order):
      close(logits_BV[b], speaker.logits(prompts[i])[-1])
      close(after.logits[b], speaker.logits([*prompts[i], 7])[-1])


def test_padding_leaves_no_trace(speaker, decoder):
  """A request that gets no token stays as it was, to the bit, where it can be read."""
  _, state = decoder.prefill([TOKENS[:6], TOKENS[:8], TOKENS[:3]])
  out = decoder.extend(state, np.full((3, 8), 9), np.array([0, 2, 8]))
  for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(out.state), strict=True):
    chex.assert_trees_all_equal(before[0], after[0])


def test_a_snapshot_is_the_old_state(speaker, decoder):
  _, state = decoder.prefill([TOKENS[:9]])
  kept = jax.tree.map(np.asarray, state)
  one = extend(decoder, state, [3, 4, 5])
  other = extend(decoder, state, TOKENS[9:12])
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, state), kept)
  close(one.logits[0], speaker.logits([*TOKENS[:9], 3, 4, 5])[-1])
  close(other.logits[0], speaker.logits(TOKENS[:12])[-1])


@pytest.mark.parametrize("donate", [False, True])
def test_rewinding_to_any_position(speaker, donate):
  """After wrong tokens and going back, the right ones say what they would have said."""
  decoder = decoder_of(speaker, donate=donate)
  expected_TV = speaker.logits(TOKENS)
  for kept in (0, 1, 3, 4):
    _, state = decoder.prefill([TOKENS[:9]])
    wrong = [*TOKENS[9 : 9 + kept], *[1] * (4 - kept)]
    out = extend(decoder, state, wrong, every=True)
    back = rewind(out.state, out.trail, jnp.array([kept]))
    assert back.length_B.tolist() == [9 + kept]
    rest = extend(decoder, back, TOKENS[9 + kept : 15], every=True)
    close(rest.logits[0, : 6 - kept], expected_TV[9 + kept : 15])


def test_a_request_moves_into_a_slot(speaker, decoder):
  _, many = decoder.prefill([TOKENS[:6], TOKENS[:8], TOKENS[:3]])
  _, one = decoder.prefill([TOKENS[:10]])
  state = insert(many, jnp.int32(1), one)
  out = decoder.extend(state, np.array([[2], [4], [6]]), np.ones(3))
  for b, (length, token) in enumerate(((6, 2), (10, 4), (3, 6))):
    close(out.logits[b], speaker.logits([*TOKENS[:length], token])[-1])


def test_the_gate_is_the_full_forwards(speaker, decoder):
  whole = extend(decoder, decoder.empty(1), TOKENS[:8])
  first = extend(decoder, decoder.empty(1), TOKENS[:5])
  second = extend(decoder, first.state, TOKENS[5:8])
  assert len(whole.gates) == len(speaker.weights.layout.layers)
  for gate, a, b in zip(whole.gates, first.gates, second.gates, strict=True):
    close(jnp.concatenate([a[:, :5], b[:, :3]], 1), gate)
    assert np.ptp(np.asarray(gate)) > 0.1


def test_greedy_continuations_are_the_argmax_of_the_full_forward(speaker):
  prompts = [some_tokens(i, n) for i, n in enumerate((3, 11, 6))]
  steps = continuations(decoder_of(speaker), prompts, [Sampling()] * 3, 8)
  new_BT = np.stack(list(steps), axis=1)
  assert len({tuple(new) for new in new_BT.tolist()}) > 1
  for prompt, new_T in zip(prompts, new_BT, strict=True):
    chosen_T = speaker.logits([*prompt, *new_T.tolist()]).argmax(-1)
    assert new_T.tolist() == chosen_T[len(prompt) - 1 : -1].tolist()


def test_a_sampled_continuation_is_its_own_whatever_the_batch(speaker):
  prompts = [some_tokens(i, n) for i, n in enumerate((3, 11, 6))]
  how = [Sampling(temperature=1.5, seed=i, top_k=20, repetition_penalty=1.2) for i in range(3)]
  together = np.stack(list(continuations(decoder_of(speaker), prompts, how, 6)), axis=1)
  for prompt, one, expected in zip(prompts, how, together, strict=True):
    alone = np.stack(list(continuations(decoder_of(speaker), [prompt], [one], 6)), axis=1)[0]
    assert alone.tolist() == expected.tolist()
  other = continuations(decoder_of(speaker), prompts[:1], [Sampling(temperature=1.5, seed=9)], 6)
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
    next(continuations(decoder, [[1] * 30], [Sampling()], 5))


def test_what_a_state_holds_counts_where_a_prompt_follows_it(speaker, decoder):
  _, state = decoder.prefill([TOKENS[:3], TOKENS[:8]])
  with pytest.raises(ConfigError, match="25 tokens after 8 and 0 new ones do not fit in the 32"):
    decoder.prefill([[1] * 25, [1] * 25], state)
  with pytest.raises(ConfigError, match="1 prompts for a state of 2 requests"):
    decoder.prefill([[1]], state)
  logits_BV, after = decoder.prefill([TOKENS[3:24], TOKENS[8:24]], state)
  assert after.length_B.tolist() == [24, 24]
  for logits_V in logits_BV:
    close(logits_V, speaker.logits(TOKENS)[-1])
