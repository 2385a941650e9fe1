"""Caches return exactly the rows of the store below, and keep the most frequent ones."""

import concurrent.futures

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engram_jax.errors import StorageError
from engram_jax.inference.row_sources import StoreRowSource
from engram_jax.inference.stores import device_cache
from engram_jax.inference.stores.cache import WAYS, HostCache, Sketch
from engram_jax.inference.stores.device_cache import (
  MIN_SENT_ROWS,
  DeviceCache,
  IdCounts,
  assemble,
  count_ids,
  hot_ids,
)
from engram_jax.inference.stores.file import FileRows
from engram_jax.inference.stores.host import HostRows
from engram_jax.inference.stores.write import write_table_file
from engram_jax.memory.compress import TokenCompressor
from engram_jax.memory.hash_layout import HashLayout
from engram_jax.memory.vocabulary import stacked_row_ids

WIDTH = 8
LAYOUT = HashLayout.build("engram", [1, 3], [101, 103], 3, 2, 200, 2)
TOKENS = TokenCompressor.identity(200)
LAYERS = len(LAYOUT.layers)
ROWS = [LAYOUT.rows[x] for x in LAYOUT.layers]
ENTRY_BYTES = WIDTH * 4 + 41  # bytes of a row in the host cache, with its id and counts

reproducible = settings(deadline=None, derandomize=True, database=None)
ANY_IDS = st.lists(
  hnp.arrays(
    np.int64, st.tuples(st.just(LAYERS), st.integers(0, 40)), elements=st.integers(0, 1000)
  ),
  min_size=1,
  max_size=8,
).map(lambda batches: [b % np.array(ROWS)[:, None] for b in batches])


@pytest.fixture(scope="module")
def store():
  rng = np.random.default_rng(0)
  tables = [rng.normal(size=(rows, WIDTH)).astype(np.float32) for rows in ROWS]
  return HostRows.from_tables(tables, LAYOUT, TOKENS.digest)


def zipf(batches: int, size: int, seed: int = 0) -> np.ndarray:
  """Ids [batches, L, size] whose frequency falls as 1 / rank."""
  rng = np.random.default_rng(seed)
  rank = np.stack([rng.zipf(1.3, (batches, size)) for _ in ROWS], 1)
  return rank * 7919 % np.array(ROWS)[:, None]


# --- in host memory -------------------------------------------------------------------------


@reproducible
@given(ANY_IDS, st.integers(1, 40))
def test_a_host_cache_of_any_size_changes_no_row(store, batches, sets):
  cache = HostCache(store, sets * WAYS * ENTRY_BYTES)
  assert cache.entries == sets * WAYS
  for ids in batches:
    assert np.array_equal(cache.fetch(ids), store.fetch(ids))
    by_layer = [s.fetch_by_layer(list(ids)) for s in (cache, store)]  # some ids more than once
    for actual, expected in zip(*by_layer, strict=True):
      assert np.array_equal(actual, expected)


def test_a_host_cache_over_a_file_of_bf16_rows_changes_no_row(store, tmp_path):
  blocks = lambda layer: [store.fetch_layer(layer, np.arange(LAYOUT.rows[layer]))]
  path = tmp_path / "t"
  write_table_file(path, blocks, LAYOUT, TOKENS.digest, kind="fp8_e4m3", width=WIDTH)
  dtype = np.dtype(ml_dtypes.bfloat16)
  with FileRows(path, dtype=dtype) as plain, HostCache(FileRows(path, dtype=dtype), 4096) as cache:
    assert (cache.digest, cache.dtype, cache.rows) == (plain.digest, dtype, plain.rows)
    for ids in zipf(5, 200):
      assert np.array_equal(cache.fetch(ids), plain.fetch(ids))
    assert cache.levels().keys() == {"host_cache", "file"}
    assert cache.levels()["file"]["hits"] == cache.telemetry.misses
  with pytest.raises(ValueError, match="closed"):
    cache.below.fetch(ids)


def test_rows_that_fit_are_read_once(store):
  cache = HostCache(store, 8 * sum(ROWS) * ENTRY_BYTES)
  ids = zipf(1, 100)[0]
  distinct = sum(len(np.unique(i)) for i in ids)
  for _ in range(WAYS):  # a set takes in one row a fetch
    cache.fetch(ids)
  before = cache.telemetry.as_dict()
  cache.fetch(ids)
  after = cache.telemetry.as_dict()
  assert after["misses"] == before["misses"]
  assert after["hits"] == before["hits"] + distinct
  assert after["bytes"] == after["misses"] * WIDTH * 4
  cache.clear()
  cache.fetch(ids)
  assert cache.telemetry.misses == after["misses"] + distinct


def test_frequent_rows_stay_when_many_others_are_fetched(store):
  """Half of the fetched rows are eight frequent ones, the others hundreds in turns."""
  cache = HostCache(store, 5 * WAYS * ENTRY_BYTES)
  frequent = np.arange(8) * 3
  turn = np.arange(ROWS[1]) % ROWS[0]
  for part in np.array_split(np.tile(turn, 4), 200):
    for _ in range(2):
      cache.fetch(np.stack([frequent, frequent]))
    cache.fetch(np.stack([part, part]))
  cache.telemetry.reset()
  cache.fetch(np.stack([frequent, frequent]))
  assert cache.telemetry.hits >= 12  # of 16


def test_a_host_cache_comes_near_the_best_fixed_set(store):
  batches = zipf(400, 64)
  cache = HostCache(store, 12 * WAYS * ENTRY_BYTES)
  fixed = hot_ids(count_ids(batches, LAYERS), cache.entries)
  best = hits = rows = 0
  for n, ids in enumerate(batches):
    before = cache.telemetry.hits
    cache.fetch(ids)
    if n >= 200:
      distinct = [np.unique(i) for i in ids]
      best += sum(np.isin(d, hot).sum() for d, hot in zip(distinct, fixed, strict=True))
      rows += sum(map(len, distinct))
      hits += cache.telemetry.hits - before
  assert hits / rows > 0.9 * best / rows > 0.3


@reproducible
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=300))
def test_a_sketch_counts_no_key_too_low(keys):
  sketch, keys = Sketch(64), np.array(keys)
  for key in keys:
    sketch.add(key[None])
  distinct_keys, times = np.unique(keys, return_counts=True)
  assert (sketch.uses(distinct_keys) >= np.minimum(times, 255)).all()
  assert (sketch.uses(distinct_keys) - times.astype(int)).mean() < 0.2 * len(keys)


def test_a_sketch_forgets_by_halves_and_stops_at_255():
  sketch, key = Sketch(8), np.array([7])
  counts = [sketch.add(key) for _ in range(801)]
  assert [int(uses[0]) for uses, _ in counts[:300:100]] == [1, 101, 201]
  assert int(counts[299][0][0]) == 255
  assert [n for n, (_, halved) in enumerate(counts) if halved] == [800]
  assert int(counts[800][0][0]) == 128


def test_threads_share_a_host_cache(store):
  cache, batches = HostCache(store, 6 * WAYS * ENTRY_BYTES), zipf(60, 64)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    for rows, ids in zip(pool.map(cache.fetch, batches), batches, strict=True):
      assert np.array_equal(rows, store.fetch(ids))
  keys = cache._keys_SW[cache._keys_SW >= 0]
  assert len(np.unique(keys)) == len(keys)


def test_a_failed_read_below_caches_no_row(store, monkeypatch):
  cache, ids = HostCache(store, 4096), np.array([[1, 2, 3], [4, 5, 6]])

  def fail(*_):
    raise StorageError("the disk has gone")

  with monkeypatch.context() as patch:
    patch.setattr(store, "_fetch_by_layer", fail)
    with pytest.raises(StorageError, match="gone"):
      cache.fetch(ids)
  assert np.array_equal(cache.fetch(ids), store.fetch(ids))


def test_too_small_budgets_and_ids_outside_are_refused(store):
  with pytest.raises(ValueError, match=f"budget_bytes=100 holds no 8 rows of {ENTRY_BYTES} bytes"):
    HostCache(store, 100)
  with pytest.raises(ValueError, match=f"layer 3: row id {ROWS[1]} at"):
    HostCache(store, 4096).fetch(np.array([[0], [ROWS[1]]]))


# --- on the device --------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["none", "some", "one layer", "all"])
def cache(request, store):
  hot = {
    "none": [np.zeros(0, int)] * 2,
    "some": [np.arange(0, rows, 3)[::-1] for rows in ROWS],
    "one layer": [np.zeros(0, int), np.array([0, ROWS[1] - 1])],
    "all": [np.arange(rows) for rows in ROWS],
  }
  return DeviceCache(store, hot[request.param])


@given(ANY_IDS)
@settings(reproducible, max_examples=30)
def test_a_device_cache_changes_no_row(store, cache, batches):
  for ids in batches[:2]:
    ids = np.resize(ids, (LAYERS, 5, 3)) if ids.size else np.zeros((LAYERS, 5, 3), int)
    ids %= np.array(ROWS)[:, None, None]
    rows = cache.fetch(ids)
    assert isinstance(rows, jax.Array)
    assert np.array_equal(rows, store.fetch(ids))


def test_one_layer_of_a_device_cache_changes_no_row(store, cache):
  for layer, count in zip(LAYOUT.layers, ROWS, strict=True):
    ids = np.arange(count)[::-1][: 2 * (count // 2)].reshape(2, -1)
    rows = cache.fetch_layer(layer, ids, deadline=30)
    assert np.array_equal(rows, store.fetch_layer(layer, ids))
    with pytest.raises(ValueError, match=f"layer {layer}: row id {count}"):
      cache.fetch_layer(layer, np.array([count]))


def test_a_device_cache_of_bf16_rows_changes_no_row():
  tables = [np.random.default_rng(0).normal(size=(rows, WIDTH)) for rows in ROWS]
  store = HostRows.from_tables(tables, LAYOUT, TOKENS.digest, kind="bf16", dtype=ml_dtypes.bfloat16)
  with DeviceCache(store, [np.arange(40), np.arange(9)]) as cache:
    ids = zipf(1, 300)[0]
    rows = cache.fetch(ids)
    assert rows.dtype == jnp.bfloat16
    assert np.array_equal(rows, store.fetch(ids))


def test_only_missed_rows_are_sent_in_few_shapes(store):
  hot = [np.arange(50), np.arange(20)]
  cache = DeviceCache(store, hot)
  sizes = set()
  for count in (1, 30, 64, 65, 100, 128):
    ids = np.stack([np.arange(50), 20 + np.arange(50) % count])
    cache.telemetry.reset()
    lookup = cache.lookup(ids)
    sizes.add(lookup.missed_PC.shape[0])
    counts = cache.telemetry.as_dict()
    assert counts["misses"] == min(count, 50)
    assert counts["hits"] == 50
    assert counts["bytes"] == min(count, 50) * WIDTH * 4
    assert np.array_equal(assemble(cache.hot_HC, *lookup), store.fetch(ids))
  assert sizes == {MIN_SENT_ROWS}
  assert cache.lookup(np.arange(50, 250).reshape(2, 100)).missed_PC.shape[0] == 256
  assert cache.levels().keys() == {"device_cache", "host"}


def test_no_copy_of_the_hot_rows_is_made(store):
  cache = DeviceCache(store, [np.arange(ROWS[0]), np.arange(ROWS[1])])
  at = jnp.zeros((2, 4), jnp.int32)
  program = assemble.lower(cache.hot_HC, at, jnp.zeros((64, WIDTH))).compile()
  assert program.memory_analysis().temp_size_in_bytes < cache.hot_HC.nbytes / 2


def test_device_caches_refuse_what_the_store_refuses(store):
  cache = DeviceCache(store, [np.arange(4), np.arange(4)])
  with pytest.raises(ValueError, match=r"layer 1: row id -1 at position \[1\]"):
    cache.fetch(np.array([[0, -1], [0, 0]]))
  with pytest.raises(ValueError, match="integers"):
    cache.fetch(np.zeros((2, 2)))
  with pytest.raises(ValueError, match="among the hot ones twice"):
    DeviceCache(store, [np.array([3, 3]), np.array([1])])
  with pytest.raises(ValueError, match=f"row id {ROWS[0]} "):
    DeviceCache(store, [np.array([ROWS[0]]), np.array([1])])
  with pytest.raises(ValueError, match="hot ids of 1 layers"):
    DeviceCache(store, [np.array([3])])


def test_rows_sent_to_a_decoder_are_the_same_with_caches(store):
  tokens_BT = np.random.default_rng(0).integers(0, 200, (2, 12))
  hot = hot_ids(count_ids([stacked_row_ids(LAYOUT, TOKENS, tokens_BT[:, :6])], LAYERS), 20)
  cached = DeviceCache(HostCache(store, 4096), hot)
  args = (tokens_BT, np.array([12, 9]), np.full((2, 2), 2))
  with (
    StoreRowSource(store, TOKENS) as plain,
    StoreRowSource(cached, TOKENS, deadline=30) as with_caches,
  ):
    for method in ("prefetch", "on_demand"):
      rows_fn, cached_rows_fn = (getattr(source, method)(*args) for source in (plain, with_caches))
      for i in range(LAYERS):
        x = jnp.zeros(())
        assert np.array_equal(rows_fn(i, x), cached_rows_fn(i, x))
  levels = cached.levels()
  assert levels.keys() == {"device_cache", "host_cache", "host"}
  assert levels["device_cache"]["hits"] > 0
  assert levels["host_cache"]["hits"] > 0


# --- frequent ids ---------------------------------------------------------------------------


@pytest.mark.parametrize("merge_ids", [0, 100, 1 << 20])
def test_counts_add_up_over_batches(monkeypatch, merge_ids):
  monkeypatch.setattr(device_cache, "_MERGE_IDS", merge_ids)
  batches = zipf(7, 50)
  for i, (ids, counts) in enumerate(count_ids(iter(batches), LAYERS)):
    distinct_keys, times = np.unique(batches[:, i], return_counts=True)
    assert np.array_equal(ids, distinct_keys)
    assert np.array_equal(counts, times)
  assert [len(c.ids) for c in count_ids([], 2)] == [0, 0]


def test_hot_ids_are_the_most_frequent_of_all_layers():
  counts = [
    IdCounts(np.array([2, 5, 9]), np.array([7, 1, 4])),
    IdCounts(np.array([0, 5]), np.array([4, 9])),
  ]
  hot = [[i.tolist() for i in hot_ids(counts, n)] for n in range(6)]
  assert hot[0] == [[], []]
  assert hot[1] == [[], [5]]
  assert hot[3] == [[2, 9], [5]]  # 9 and 0 of the next layer have one count: the earlier layer's
  assert hot[4] == [[2, 9], [0, 5]]
  assert hot[5] == [[2, 5, 9], [0, 5]] == [i.tolist() for i in hot_ids(counts, 99)]
  with pytest.raises(ValueError, match="budget_rows=-1"):
    hot_ids(counts, -1)
