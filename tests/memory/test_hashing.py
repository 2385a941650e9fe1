"""Hashing: NumPy == jit == plain Python integers, in every dialect and at every edge."""

import itertools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_jax.config import DIALECTS
from engram_jax.memory import hashing_jit
from engram_jax.memory.compress import TokenCompressor
from engram_jax.memory.hash_layout import primes_from
from engram_jax.memory.hashing import HashLayout, hash_ids, hash_ids_numpy, invalid_ids

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
LARGEST_PRIME = 2**31 - 1
reproducible = settings(deadline=None, derandomize=True, database=None)


def hash_ids_plain(layout, layer, ids, segments=None, history=None, mask=None):
  """The definition, with Python's integers; segments and mask are [B, T] or [B, H+T]."""
  B, T = ids.shape
  text = ids if history is None else np.concatenate([history, ids], axis=1)
  H = text.shape[1] - T
  if segments is not None and segments.shape[1] == T:
    segments = np.concatenate([np.repeat(segments[:, :1], H, axis=1), segments], axis=1)
  if mask is not None and mask.shape[1] == T:
    mask = np.concatenate([np.zeros((B, H), bool), mask], axis=1)

  def reads(b, t, i):
    """Whether position t sees the token i before it."""
    if t - i < 0 or (mask is not None and mask[b, t - i]):
      return False
    if segments is not None and segments[b, t - i] != segments[b, t]:
      return False
    return i == 0 or layout.dialect != "qwen_ple" or text[b, t - i] != layout.pad_id

  out = np.empty((B, T, layout.hash_heads), np.int32)
  for b, t in np.ndindex(B, T):
    steps = range(layout.max_ngram)
    reached = list(itertools.takewhile(lambda i, b=b, t=t: reads(b, H + t, i), steps))
    seen = [int(text[b, H + t - i]) for i in reached]
    seen += [layout.pad_id] * (layout.max_ngram - len(seen))
    mix, column = 0, 0
    for i, (token, multiplier) in enumerate(zip(seen, layout.multipliers[layer], strict=True)):
      mix ^= token * multiplier
      for prime in layout.primes[layer][i - 1] if i else ():
        out[b, t, column] = mix % prime
        column += 1
  return out


@st.composite
def layouts(draw):
  max_ngram, heads = draw(st.integers(2, 5)), draw(st.integers(1, 4))
  most = min(2**31 - 2**12, (2**31 - 2**16) // ((max_ngram - 1) * heads))
  bits = draw(st.integers(1, most.bit_length()))
  rows = draw(st.lists(st.integers(2 ** (bits - 1), min(2**bits, most)), min_size=1, max_size=1))
  vocab = draw(st.one_of(st.integers(2, 40), st.integers(2, 250_000)))
  pad = draw(st.integers(0, vocab - 1))
  seed = draw(st.integers(0, 2**32))
  dialect = draw(st.sampled_from(DIALECTS))
  return HashLayout.build(dialect, [3], rows * (max_ngram - 1), max_ngram, heads, vocab, pad, seed)


def random_text(layout, seed, shape=(3, 9), *, segments, history, mask, whole):
  """ids and the optional arguments of hash_ids, full of pads and of the largest id."""
  rng = np.random.default_rng(seed)
  B, T = shape
  H = 0 if history is None else history
  top = layout.compressed_vocab
  text = rng.integers(0, top, (B, H + T))
  text = np.where(rng.random(text.shape) < 0.2, layout.pad_id, text)
  text = np.where(rng.random(text.shape) < 0.1, top - 1, text).astype(np.int32)
  width = H + T if whole else T
  return text[:, H:], {
    "segments_BT": np.sort(rng.integers(0, 4, (B, width)), axis=1) if segments else None,
    "history_BH": None if history is None else text[:, :H],
    "mask_BT": rng.random((B, width)) < 0.2 if mask else None,
  }


options = st.fixed_dictionaries(
  {
    "segments": st.booleans(),
    "history": st.sampled_from([None, 0, 1, 2, 7]),
    "mask": st.booleans(),
    "whole": st.booleans(),
  }
)


def assert_plain(got, layout, ids, context):
  assert got.dtype == np.int32
  plain = hash_ids_plain(layout, 3, ids, *context.values())
  np.testing.assert_array_equal(got, plain)


@settings(reproducible, max_examples=60)
@given(layouts(), st.integers(0, 2**32), st.integers(1, 9), options)
def test_numpy_is_the_definition(layout, seed, length, chosen):
  ids, context = random_text(layout, seed, (2, length), **chosen)
  assert_plain(hash_ids_numpy(layout, 3, ids, **context), layout, ids, context)


@settings(reproducible, max_examples=8)
@given(layouts(), st.integers(0, 2**32), st.sampled_from([1, 2, 9]), options)
def test_jit_is_the_definition(layout, seed, length, chosen):
  ids, context = random_text(layout, seed, (2, length), **chosen)
  assert_plain(np.asarray(hash_ids(layout, 3, ids, **context)), layout, ids, context)


@pytest.mark.parametrize(
  "arguments",
  [
    ("engram", [1, 15], 646_400, 3, 8, 99_092, 2),
    ("engram", [1, 15], (97, 5003), 3, 8, 2, 1),
    ("deepseek_v41", [1, 14], 16_000_000, 4, 8, 99_092, 2),
    ("qwen_ple", [1], 20_000_000, 3, 8, 248_320, 248_044),
  ],
)
def test_jit_equals_numpy_on_millions_of_ids(arguments):
  layout = HashLayout.build(*arguments)
  rng = np.random.default_rng(7)
  ids = rng.integers(0, layout.compressed_vocab, (32, 8192)).astype(np.int32)
  segments = np.sort(rng.integers(0, 99, ids.shape), axis=1).astype(np.int32)
  for layer in layout.layers:
    on_host = hash_ids_numpy(layout, layer, ids, segments)
    primes = np.array(layout.primes[layer]).reshape(-1)
    assert on_host.size >= 4_000_000
    assert on_host.min() >= 0
    assert np.all(on_host < primes)
    assert np.array_equal(on_host, hash_ids(layout, layer, ids, segments))


@settings(reproducible, max_examples=12)
@given(
  st.lists(st.integers(2, LARGEST_PRIME), min_size=7, max_size=7),
  st.booleans(),
  st.integers(0, 2**32),
)
def test_remainders_are_exact_beside_every_kind_of_multiple(starts, three_divisions, seed):
  """Random mixes, and those next to multiples and half multiples of the primes, to 2^63 - 1."""
  rng = np.random.default_rng(seed)
  starts = [s >> 4 * i if three_divisions else max(s, 2**21) for i, s in enumerate(starts)]
  primes = np.array([*(next(primes_from(s)) for s in starts), LARGEST_PRIME], np.uint32)
  some = rng.integers(0, 2**63, 2048, np.uint64) >> rng.integers(0, 63, 2048, np.uint64)
  prime = primes[rng.integers(0, 8, 2048)].astype(np.uint64)
  near = some - some % prime + rng.integers(0, 3, 2048, np.uint64) - np.uint64(1)
  half = some - some % prime + prime // np.uint64(2) + rng.integers(0, 2, 2048, np.uint64)
  top = np.uint64(2**63 - 1) - np.arange(2048, dtype=np.uint64)
  mix = np.concatenate([some, np.minimum(near, top), np.minimum(half, top), top])
  high = (mix >> np.uint64(32)).astype(np.uint32)[:, None]
  got = hashing_jit._remainder(
    (jnp.asarray(high), jnp.asarray(mix.astype(np.uint32))[:, None]), primes
  )
  np.testing.assert_array_equal(got, mix[:, None] % primes.astype(np.uint64))


@pytest.mark.parametrize("primes", [(2, 3, 5, 7, 11, 13), (2097143, 2097169, 16777213, 16777259)])
def test_remainders_are_exact_where_the_proof_changes_case(primes):
  """The smallest, beside 2^21 and beside 2^24, alone and together."""
  rng = np.random.default_rng(1)
  mix = rng.integers(0, 2**63, 100_000, np.uint64)
  limbs = [x.astype(np.uint32)[:, None] for x in (mix >> np.uint64(32), mix)]
  remainder = jax.jit(lambda *limbs: [hashing_jit._remainder(limbs, p) for p in sets])
  sets = [np.array([p], np.uint32) for p in primes] + [np.array(primes, np.uint32)]
  for got, some in zip(remainder(*limbs), sets, strict=True):
    assert np.array_equal(got, mix[:, None] % some.astype(np.uint64))


@pytest.fixture(scope="module")
def golden():
  config = json.loads((GOLDEN / "tiny_config.json").read_text())
  tokens = json.loads((GOLDEN / "tiny_tokenizer.json").read_text())
  compressor = TokenCompressor.from_texts(tokens["texts"], tokens["raws"])
  pad = int(compressor(config["pad_id"]))
  rows = config["engram_vocab_size"]
  layout = HashLayout.build("engram", config["layer_ids"], rows, 3, 2, compressor.size, pad)
  return compressor, layout, np.load(GOLDEN / "tiny_hash.npz")


@pytest.mark.parametrize("batch", ["b4x33", "b2x1", "b2x2", "b1x3", "b3x64zipf", "leftpad"])
def test_golden_ids_give_the_golden_hashes(golden, batch):
  compressor, layout, arrays = golden
  ids = compressor(arrays[f"ids/{batch}"])
  np.testing.assert_array_equal(ids, arrays[f"compressed/{batch}"])
  for layer in layout.layers:
    want = arrays[f"hash/{batch}/layer{layer}"]
    np.testing.assert_array_equal(hash_ids_numpy(layout, layer, ids), want)
    np.testing.assert_array_equal(hash_ids(layout, layer, ids), want)


def test_negative_golden_ids_are_refused(golden):
  compressor, layout, arrays = golden
  with pytest.raises(ValueError, match=r"token id -\d+ at position"):
    compressor(arrays["ids/neg"])
  with pytest.raises(ValueError, match=r"canonical id -\d+ at position"):
    hash_ids_numpy(layout, 0, arrays["compressed/neg"])


@pytest.fixture
def layout():
  return HashLayout.build("deepseek_v41", [1, 4], 1009, 4, 2, 500, 7)


@pytest.mark.parametrize("hashed", [hash_ids_numpy, hash_ids])
def test_decoding_in_chunks_with_history_equals_the_whole(layout, hashed):
  chosen = {"segments": True, "history": None, "mask": True, "whole": False}
  ids, context = random_text(layout, 0, (2, 12), **chosen)
  segments, mask = context["segments_BT"], context["mask_BT"]
  whole = hashed(layout, 4, ids, segments, None, mask)
  chunks = [whole[:, :3]]
  for t in range(3, 12):
    now, with_history = slice(t, t + 1), slice(t - 3, t + 1)
    history = ids[:, t - 3 : t]
    chunks.append(
      hashed(layout, 4, ids[:, now], segments[:, with_history], history, mask[:, with_history])
    )
  np.testing.assert_array_equal(np.concatenate(chunks, axis=1), whole)


@pytest.mark.parametrize("hashed", [hash_ids_numpy, hash_ids])
def test_a_document_hashes_alike_alone_and_packed(layout, hashed):
  rng = np.random.default_rng(0)
  one, two = rng.integers(0, 500, (2, 1, 8))
  packed = hashed(layout, 1, np.concatenate([one, two], axis=1), np.repeat([[0, 1]], 8, axis=1))
  alone = [hashed(layout, 1, document) for document in (one, two)]
  np.testing.assert_array_equal(packed, np.concatenate(alone, axis=1))
  joined = hashed(layout, 1, np.concatenate([one, two], axis=1))
  assert np.any(np.asarray(joined)[:, 8:11] != np.asarray(packed)[:, 8:11])
  np.testing.assert_array_equal(joined[:, 11:], packed[:, 11:])


def test_look_back_ends_at_a_masked_token_and_its_own_ngrams_are_pads(layout):
  ids = np.random.default_rng(0).integers(0, 500, (1, 8))
  mask = np.zeros((1, 8), bool)
  mask[0, 3] = True
  masked = hash_ids_numpy(layout, 1, ids, mask_BT=mask)
  pads = hash_ids_numpy(layout, 1, np.full((1, 1), layout.pad_id))
  np.testing.assert_array_equal(masked[:, 3:4], pads)
  np.testing.assert_array_equal(masked[:, :3], hash_ids_numpy(layout, 1, ids[:, :3]))
  np.testing.assert_array_equal(masked[:, 4:], hash_ids_numpy(layout, 1, ids[:, 4:]))


def test_qwen_resets_after_end_of_text_and_engram_does_not():
  end = 9
  ids = np.array([[3, 4, end, 5, 6, 8]])
  for dialect, resets in (("qwen_ple", True), ("engram", False)):
    layout = HashLayout.build(dialect, [1], 10007, 3, 2, 10, end)
    whole = hash_ids_numpy(layout, 1, ids)
    assert np.array_equal(whole[:, :3], hash_ids_numpy(layout, 1, ids[:, :3]))
    alone = hash_ids_numpy(layout, 1, ids[:, 3:])
    assert np.array_equal(whole[:, 3:], alone) is resets


def test_ids_outside_the_vocabulary_are_refused_on_the_host(layout):
  ids = np.zeros((2, 3), np.int64)
  for bad in (-1, 500, 2**40):
    ids[1, 2] = bad
    with pytest.raises(ValueError, match=rf"canonical id {bad} at position \[1, 2\] is outside"):
      hash_ids_numpy(layout, 1, ids)
    with pytest.raises(ValueError, match=f"canonical history id {bad}"):
      hash_ids_numpy(layout, 1, ids[:, :1] * 0, history_BH=ids)


def test_ids_outside_the_vocabulary_are_masked_and_counted_in_jit(layout):
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 500, (2, 9))
  bad = rng.random(ids.shape) < 0.3
  spoilt = np.where(
    bad, rng.choice([-1, 500, -(2**31), 2**31 - 1, 2**32 + 5, -(2**40)], ids.shape), ids
  )
  expected = hash_ids_numpy(layout, 1, ids, mask_BT=bad)
  np.testing.assert_array_equal(hash_ids(layout, 1, spoilt), expected)
  with jax.enable_x64(True):
    np.testing.assert_array_equal(hash_ids(layout, 1, jnp.asarray(spoilt)), expected)
  clipped = np.clip(spoilt, -(2**31), 2**31 - 1).astype(np.int32)
  np.testing.assert_array_equal(jax.jit(lambda x: hash_ids(layout, 1, x))(clipped), expected)
  counts = [invalid_ids(layout, spoilt), jax.jit(lambda x: invalid_ids(layout, x))(clipped)]
  assert counts == [bad.sum()] * 2
  history = hash_ids(layout, 1, ids, None, spoilt)
  np.testing.assert_array_equal(
    history, hash_ids_numpy(layout, 1, ids, None, ids, np.concatenate([bad, bad & False], axis=1))
  )


@pytest.mark.parametrize("hashed", [hash_ids_numpy, hash_ids])
@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((2, np.zeros((1, 2), int)), r"layer=2 has no hash: the layout has layers \[1, 4\]"),
    ((1, np.zeros(3, int)), r"ids_BT is \[B, T\], not of shape \(3,\)"),
    ((1, np.zeros((1, 2))), "canonical ids are integers, not float"),
    ((1, np.zeros((1, 2), int), np.zeros((1, 3))), r"segments_BT is \[1, 2\] or \[1, 2\], not"),
    ((1, np.zeros((2, 2), int), None, np.zeros((1, 3), int)), r"history_BH is \[2, H\], not"),
    (
      (1, np.zeros((1, 2), int), None, np.zeros((1, 3), int), np.zeros((1, 4), bool)),
      r"mask_BT is \[1, 2\] or \[1, 5\], not of shape \(1, 4\)",
    ),
  ],
)
def test_misuse_is_refused(layout, hashed, arguments, message):
  with pytest.raises(ValueError, match=message):
    hashed(layout, *arguments)


def test_row_ids_stay_inside_the_table(layout):
  ids = np.random.default_rng(0).integers(0, 500, (4, 64))
  rows = hash_ids_numpy(layout, 1, ids) + np.array(layout.offsets[1], np.int32)
  assert rows.dtype == np.int32
  assert rows.min() >= 0
  assert rows.max() < layout.rows[1]


def test_the_host_half_imports_no_jax():
  modules = "compress", "dialects", "hashing"
  script = "import sys\n" + "".join(f"import engram_jax.memory.{name}\n" for name in modules)
  script += "assert not {'jax', 'jaxlib', 'flax'} & set(sys.modules), 'jax was imported'"
  subprocess.run([sys.executable, "-c", script], check=True)
