"""Hash layouts: the constants of the paper's demo and of the released models."""

import copy
import dataclasses
import itertools
import json
import pathlib
import pickle

import pytest

from engram_jax.memory.hash_layout import HashLayout, is_prime, primes_from

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
DEMO = ("engram", [1, 15], 646_400, 3, 8, 98_627, 2)
V41 = ("deepseek_v41", [1, 14], 16_000_000, 4, 8, 99_092, 2)
QWEN = ("qwen_ple", [1], 20_000_000, 3, 8, 248_320, 248_044)


def test_primes_are_those_of_the_sieve():
  sieve = [n for n in range(2, 3000) if all(n % d for d in range(2, int(n**0.5) + 1))]
  assert [n for n in range(3000) if is_prime(n)] == sieve
  assert list(itertools.takewhile(lambda p: p < 3000, primes_from(0))) == sieve
  assert next(primes_from(101)) == 101


@pytest.mark.parametrize("composite", [2047, 1_373_653, 25_326_001, 46_337**2, 2**31 - 3])
def test_strong_pseudoprimes_are_told_from_primes(composite):
  assert not is_prime(composite)
  assert is_prime(2**31 - 1)


def test_demo_constants_with_the_v3_tokenizer():
  layout = HashLayout.build(*DEMO)
  assert layout.multipliers[1] == (76993395940407, 4862694818241, 36129212583461)
  assert layout.primes[1][0][:3] == (646403, 646411, 646421)
  assert layout.hash_heads == 16


def test_golden_constants_with_a_start_per_order():
  golden = json.loads((GOLDEN / "tiny_config.json").read_text())
  layout = HashLayout.build(
    "engram",
    golden["layer_ids"],
    golden["engram_vocab_size"],
    golden["max_ngram_size"],
    golden["n_head_per_ngram"],
    golden["num_new_token"],
    golden["pad_id_compressed"],
    golden["seed"],
  )
  for layer in golden["layer_ids"]:
    assert list(layout.multipliers[layer]) == golden["multipliers"][str(layer)]
    assert [list(heads) for heads in layout.primes[layer]] == golden["primes"][str(layer)]


def test_deepseek_v41_constants():
  layout = HashLayout.build(*V41)
  assert layout.multipliers == {
    1: (76632096046245, 4839876093313, 35959672319349, 73987337458391),
    14: (67716810739261, 51510806800915, 30921347202721, 82619226485591),
  }
  ends = {layer: [(h[0], h[-1]) for h in layout.primes[layer]] for layer in layout.layers}
  assert ends == {
    1: [(16000057, 16000183), (16000189, 16000321), (16000339, 16000463)],
    14: [(16000477, 16000627), (16000667, 16000769), (16000781, 16000889)],
  }
  assert layout.rows == {1: 384_006_168, 14: 384_016_682}


@pytest.mark.parametrize("seed", [0, 1234])
def test_qwen_constants(seed):
  layout = HashLayout.build(*QWEN, seed=seed)
  assert layout.multipliers[1] == (23703573157769, 20109073645365, 8052911324071)
  primes = [*itertools.chain(*layout.primes[1])]
  assert primes == list(itertools.islice(primes_from(20_000_003), 16))
  assert layout.rows[1] == 320_001_446


@pytest.mark.parametrize(
  "arguments", [DEMO, V41, QWEN, ("engram", [0, 3, 7], [40, 11], 3, 5, 9, 0)]
)
def test_primes_are_distinct_and_tables_lie_end_to_end(arguments):
  layout = HashLayout.build(*arguments)
  everything = [p for layer in layout.layers for heads in layout.primes[layer] for p in heads]
  assert len(set(everything)) == len(everything)
  assert all(map(is_prime, everything))
  for layer in layout.layers:
    flat = list(itertools.chain(*layout.primes[layer]))
    assert len(flat) == layout.hash_heads
    assert layout.offsets[layer][0] == 0
    assert [b - a for a, b in itertools.pairwise(layout.offsets[layer])] == flat[:-1]
    assert layout.offsets[layer][-1] + flat[-1] == layout.rows[layer] == sum(flat)


@pytest.mark.parametrize("dialect", ["engram", "qwen_ple"])
@pytest.mark.parametrize("vocab", [1, 2, 3, 100, 1023, 99_092, 250_000, 2**31 - 1])
def test_no_product_reaches_2_to_63(dialect, vocab):
  layout = HashLayout.build(dialect, range(20), 97, 4, 1, vocab, 0)
  for multipliers in layout.multipliers.values():
    assert all(m % 2 == 1 and m > 0 and m * (vocab - 1) < 2**63 for m in multipliers)


HOSTILE_DESCRIPTIONS = [
  ("dialect", 5),
  ("dialect", "../os"),
  ("layers", "02"),
  ("layers", [0, 0]),
  ("layers", [0, -2]),
  ("layers", [0, 2**80]),
  ("layers", [False, 2]),
  ("rows_per_head", [101, "131"]),
  ("rows_per_head", [101.0, 131]),
  ("rows_per_head", [1, 2**40]),
  ("max_ngram", 10**9),
  ("max_ngram", None),
  ("heads", True),
  ("heads", 0),
  ("seed", "x" * 9999),
  ("pad_id", 100),
  ("pad_id", [2] * 9999),
  ("multipliers", ["5"]),
  ("multipliers", {"0": 5}),
  ("multipliers", {}),
  ("primes", {"0": [[101, 103], [131, 137]], "2": 5}),
  ("primes", {"0": [[101, 103], [131, 137]], "2": [[107, 109], [139, "149"]]}),
  ("primes", {"0": [[101, 103], [131, 137]], "2": [[2**31 - 1] * 2] * 2}),
]


def test_a_billion_primes_are_not_searched_for_a_few_bytes():
  description = HashLayout.build("engram", [0], 1, 2, 1, 100, 2).describe()
  for changes in ({"heads": 10**9}, {"layers": list(range(1000))}):
    with pytest.raises(ValueError, match="primes are not one for each layer"):
      HashLayout.from_description(description | changes)


def test_a_description_survives_json_and_is_checked_against_what_is_rebuilt():
  layout = HashLayout.build("engram", [0, 2], (101, 131), 3, 2, 100, 2, seed=3)
  description = json.loads(json.dumps(layout.describe()))
  assert HashLayout.from_description(description) == layout
  assert any(int(m) > 2**53 for m in description["multipliers"]["0"])
  for name, old, new in (("primes", 101, [103, 107]), ("multipliers", None, "5")):
    damaged = copy.deepcopy(description)
    assert old is None or damaged[name]["0"][0][0] == old
    damaged[name]["0"][0] = new
    with pytest.raises(ValueError, match=f"{name}: stored .* but rebuilt"):
      HashLayout.from_description(damaged)
  for name, value in HOSTILE_DESCRIPTIONS:
    with pytest.raises(ValueError, match=name) as caught:
      HashLayout.from_description(description | {name: value})
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 800
  del description["seed"]
  with pytest.raises(ValueError, match="lacks seed"):
    HashLayout.from_description(description)


def test_a_layout_is_one_hashable_picklable_value():
  layout = HashLayout.build(*DEMO)
  twin = HashLayout.build("engram", (1, 15), (646_400, 646_400), 3, 8, 98_627, 2, seed=0)
  assert layout == twin
  assert hash(layout) == hash(twin)
  assert layout.digest == twin.digest == pickle.loads(pickle.dumps(layout)).digest
  changes = [{"seed": 1}, {"pad_id": 3}, {"compressed_vocab": 98_628}, {"layers": (1, 14)}]
  digests = {dataclasses.replace(layout, **change).digest for change in changes}
  assert len(digests | {layout.digest}) == 5
  with pytest.raises(dataclasses.FrozenInstanceError):
    layout.seed = 1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"dialect": "crc32"}, "dialect='crc32' is none of .*deepseek_v41"),
    ({"max_ngram": 1}, "max_ngram=1 must be at least 2"),
    ({"heads": 0}, "heads=0 must be at least 1"),
    ({"layers": (1, 1)}, r"layers=\[1, 1\] must be distinct"),
    ({"layers": (-1,)}, r"layers=\[-1\] must be distinct and not negative"),
    ({"rows_per_head": (5,)}, r"rows_per_head=\[5\] must be 2 positive numbers"),
    ({"rows_per_head": (5, 0)}, r"rows_per_head=\[5, 0\] must be 2 positive numbers"),
    ({"compressed_vocab": 0}, r"compressed_vocab=0 must be in \[1, 2147483647\]"),
    ({"pad_id": 98_627}, r"pad_id=98627 is outside \[0, compressed_vocab=98627\)"),
    ({"pad_id": -1}, "pad_id=-1 is outside"),
    ({"seed": -1}, "seed=-1 must not be negative"),
    ({"rows_per_head": (2**27, 2**27)}, "a table of 2147483648 rows has no int32 row ids"),
    # 16 x 134,217,727 is 2^31 - 16: the primes themselves are what reaches 2^31.
    ({"rows_per_head": (2**27 - 1, 2**27 - 1)}, r"a table of 21474\d{5} rows has no int32 row ids"),
    ({"rows_per_head": (10**15, 10**15)}, "a table of 16000000000000000 rows"),
  ],
)
def test_what_no_layout_can_be_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(HashLayout.build(*DEMO), **change)
