"""What is no id is refused where it enters, in one line that names it and says what would be valid.

JAX clamps, wraps or gives NaN for an index outside an array, without a word; so every function that
takes ids on the host looks at them, and jitted ones refuse the dtypes and shapes that they see.

python -m pytest -m slow tests/faults/test_token_ids.py            ten thousand cases and more
"""

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
import traceback
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bad_ids import (
  Bad,
  another_rank,
  bad_dtypes,
  bad_floats,
  bad_ids,
  bad_masks,
  bad_prompts,
  bad_token_files,
  no_integers,
  outside,
  traceable,
)
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_model import V, make_small_model
from small_server import Client, make_request, small_decoder, small_engine, small_tokenizer

import engram_jax
from engram_jax.config import Config, EngramConfig
from engram_jax.data.corpus import Corpus
from engram_jax.data.packing import PackedExamples, RowIdEncoder
from engram_jax.data.pipeline import Pipeline
from engram_jax.errors import EngramError, StorageError
from engram_jax.inference.decoder import generate_tokens, seen_tokens
from engram_jax.inference.row_sources import StoreRowSource
from engram_jax.inference.sampling import Sampling
from engram_jax.inference.speculative import generate_tokens_speculatively
from engram_jax.inference.stores.device_cache import DeviceCache, count_ids
from engram_jax.inference.stores.host import HostRows
from engram_jax.memory.compress import TokenCompressor
from engram_jax.memory.engram import Engram
from engram_jax.memory.hash_layout import HashLayout
from engram_jax.memory.hashing import hash_ids, hash_ids_numpy, invalid_ids, row_ids
from engram_jax.memory.table import init_table, lookup
from engram_jax.memory.vocabulary import Vocabulary, stacked_row_ids
from engram_jax.model.counts import table_layout
from engram_jax.model.lm import LM
from engram_jax.serve.api import Service
from engram_jax.serve.prompts import PromptEncoder
from engram_jax.tables import Tables, adam
from engram_jax.training.evaluate import evaluate
from engram_jax.training.sample import generate
from engram_jax.training.state import make_setup

PACKAGE = pathlib.Path(engram_jax.__file__).parent
CASES = 10_000  # of the long form, over all entrances
B, T, J = 2, 5, 4
LAYERS = (1, 2)
LAYOUT = HashLayout.build("engram", LAYERS, [53, 61], 3, 2, V, 2)
ROWS = LAYOUT.rows
MOST, H = max(ROWS.values()), LAYOUT.max_ngram - 1
COMPRESSOR = TokenCompressor.identity(V)
ZEROS = np.zeros((B, T), np.int32)
ROW_IDS = np.zeros((B, T, J), np.int32)


class Entrance(NamedTuple):
  """A function of one argument, and bad values of it."""

  call: Callable[[Any], Any]
  bad: st.SearchStrategy[Bad]


def trace(function: Callable[..., Any], *args: Any) -> Any:
  """Traces a function of NumPy arrays, as jit would, and compiles nothing."""
  return jax.eval_shape(function, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args))


def never(*_: Any) -> Any:
  """A model that must not be called."""
  pytest.fail("the model was called")


# --- hashing and tables -------------------------------------------------------------------------


def hash_with(hash_function: Callable[..., Any], **changed: Any) -> Any:
  history = {} if "mask_BT" in changed else {"history_BH": np.zeros((B, H), int)}
  return hash_function(LAYOUT, 1, **({"ids_BT": ZEROS} | history | changed))


HASHING = {
  "compressor": Entrance(COMPRESSOR, bad_ids((B, T), V)),
  "token map": Entrance(TokenCompressor, bad_ids((9,), 2**31, "rank")),
  "row_ids": Entrance(lambda x: row_ids(LAYOUT, 1, x), bad_ids((B, T), V, "rank")),
  "invalid_ids": Entrance(lambda x: invalid_ids(LAYOUT, x), no_integers((B, T), V)),
  "vocabulary": Entrance(
    lambda x: stacked_row_ids(LAYOUT, COMPRESSOR, x), bad_ids((B, T), V, "rank")
  ),
  "vocabulary without a memory": Entrance(
    lambda x: stacked_row_ids(None, COMPRESSOR, x), bad_ids((B, T), V, "rank")
  ),
  "row id encoder": Entrance(
    lambda x: RowIdEncoder(LAYOUT, COMPRESSOR, True)(x, ZEROS), bad_ids((B, T), V, "rank")
  ),
}
for where, function in {"hash": hash_ids_numpy, "hash in jit": hash_ids}.items():
  with_ = functools.partial(hash_with, function)
  bad = bad_ids if function is hash_ids_numpy else bad_dtypes
  HASHING |= {
    f"{where}: ids": Entrance(lambda x, f=with_: f(ids_BT=x), bad((B, T), V, "rank")),
    f"{where}: history": Entrance(lambda x, f=with_: f(history_BH=x), bad((B, H), V, "rank")),
    f"{where}: segments": Entrance(
      lambda x, f=with_: f(segments_BT=x),
      st.one_of(no_integers((B, T), V), bad_dtypes((B, T), V, "length")),
    ),
    f"{where}: mask": Entrance(lambda x, f=with_: f(mask_BT=x), bad_masks((B, T))),
  }


@functools.cache
def tables_on(placement: str) -> tuple[Tables, Any]:
  """(tables, state) by placement."""
  cfg = EngramConfig(layers=LAYERS, heads=2, row_width=4, rows_per_head=53, placement=placement)
  tables = Tables(cfg, LAYOUT, adam(1e-2))
  return tables, tables.init(jax.random.key(0))


@pytest.fixture(scope="module", autouse=True)
def closed_tables():
  """Files of tables end with the tests."""
  yield
  for placement in ("host", "file"):
    tables_on(placement)[0].__exit__()
  tables_on.cache_clear()


def fetch(placement: str, ids: Any) -> Any:
  tables, state = tables_on(placement)
  return tables.fetch(state, {1: ROW_IDS, 2: ids})


def look_up(placement: str, ids: Any) -> Any:
  tables, state = tables_on(placement)
  return tables.lookup(state, {2: ids})


def prefetch(placement: str, ids: Any) -> Any:
  tables, state = tables_on(placement)
  try:
    return list(tables.prefetch(state, [{"row_ids": ids}]))
  finally:
    state.host._next = state.host._ready = None


def trace_on_tables(function: Callable[..., Any], ids: np.ndarray) -> Any:
  tables_on("device")  # made before anything is traced
  return trace(functools.partial(function, "device"), ids)


def update(d_rows: np.ndarray) -> Any:
  tables, state = tables_on("device")
  touched = fetch("device", ROW_IDS)
  return trace(lambda d: tables.update(state, touched, {1: touched.rows[1], 2: d}), d_rows)


@functools.cache
def table() -> jax.Array:
  return init_table(jax.random.key(0), 900, 4, std=1.0)


TABLES = {
  "lookup": Entrance(lambda x: lookup(table(), x), bad_ids((B, T, J), 1024)),
  "lookup in jit": Entrance(
    lambda x: trace(lambda x: lookup(table(), x), x), bad_dtypes((B, T, J), 1024)
  ),
  "tables in jit: fetch": Entrance(
    lambda x: trace_on_tables(fetch, x), bad_dtypes((B, T, J), ROWS[2], "rank")
  ),
  "tables in jit: lookup": Entrance(
    lambda x: trace_on_tables(look_up, x), bad_dtypes((B, T, J), ROWS[2])
  ),
  "tables: gradients": Entrance(update, traceable(bad_floats((B * T * J, 4)))),
}
for placement in ("device", "host", "file"):
  TABLES |= {
    f"tables, {placement}: fetch": Entrance(
      functools.partial(fetch, placement), bad_ids((B, T, J), ROWS[2], "rank")
    ),
    f"tables, {placement}: lookup": Entrance(
      functools.partial(look_up, placement), bad_ids((B, T, J), ROWS[2])
    ),
  }
  if placement != "device":
    TABLES[f"tables, {placement}: prefetch"] = Entrance(
      functools.partial(prefetch, placement), bad_ids((2, B, T, J), MOST, "rank")
    )


# --- modules ------------------------------------------------------------------------------------

CFG = make_small_model().weights.cfg
G, D, M = CFG.residual.branches, CFG.width, CFG.engram.memory_width


def run_memory(*, hidden: Any = None, rows: Any = None, segments: Any = None) -> Any:
  call = lambda *args: Engram(CFG.engram, D, G, rngs=nnx.Rngs(0))(*args)[0]
  return trace(
    call,
    np.zeros((B, T, G, D), np.float32) if hidden is None else hidden,
    np.zeros((B, T, M), np.float32) if rows is None else rows,
    ZEROS if segments is None else segments,
  )


def run_model(*, tokens=ZEROS, segments=ZEROS, positions=ZEROS, rows=None) -> Any:
  memory = np.zeros((B, T, M), np.float32)

  def call(tokens, segments, positions, first, second):
    model = LM(CFG, rngs=nnx.Rngs(0))
    return model(tokens, (first, second), segments_BT=segments, positions_BT=positions)[0]

  return trace(call, tokens, segments, positions, memory, memory if rows is None else rows)


def run_model_eagerly(tokens: Any) -> Any:
  rows = (np.zeros((B, T, M), np.float32),) * 2
  return jax.eval_shape(lambda: LM(CFG, rngs=nnx.Rngs(0))(tokens, rows)[0])


MODULES = {
  "memory: hidden": Entrance(lambda x: run_memory(hidden=x), traceable(bad_floats((B, T, G, D)))),
  "memory: rows": Entrance(lambda x: run_memory(rows=x), traceable(bad_floats((B, T, M)))),
  "memory: segments": Entrance(lambda x: run_memory(segments=x), bad_dtypes((B, T), V, "length")),
  "model: tokens": Entrance(lambda x: run_model(tokens=x), bad_dtypes((B, T), V, "rank")),
  "model: tokens of NumPy": Entrance(run_model_eagerly, bad_ids((B, T), V, "rank")),
  "model: segments": Entrance(lambda x: run_model(segments=x), bad_dtypes((B, T), V, "length")),
  "model: positions": Entrance(lambda x: run_model(positions=x), bad_dtypes((B, T), V, "length")),
  "model: rows": Entrance(lambda x: run_model(rows=x), traceable(bad_floats((B, T, M)))),
}

# --- data and evaluation ------------------------------------------------------------------------


def corpus_of(tokens: Any, offsets: Any = None, sources: Any = None) -> Corpus:
  """A corpus as it is opened from files."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "offsets.npy", np.array([0, np.size(tokens)]) if offsets is None else offsets)
    np.save(folder / "sources.npy", np.zeros(1, np.int32) if sources is None else sources)
    return Corpus.open(folder)


@functools.cache
def model_of_300() -> tuple[Any, Any, Vocabulary]:
  """(setup, state without arrays, vocabulary): of the model's 300 ids the tokenizer has 290."""
  engram = {"layers": [1], "heads": 2, "row_width": 4, "rows_per_head": 101}
  model = {"vocab_size": 300, "width": 16, "layers": 2, "engram": engram}
  cfg = Config.model_validate({"model": model, "data": {"source": "text", "path": "unread"}})
  layout = table_layout(cfg.model)
  setup = make_setup(cfg, layout)
  compressor = TokenCompressor.identity(290)
  vocabulary = Vocabulary(small_tokenizer(), compressor, layout)
  return setup, types.SimpleNamespace(tables=None), vocabulary


def evaluate_with(**changed: Any) -> Any:
  setup, state, _ = model_of_300()
  names = ("tokens", "targets", "segments", "positions", "source")
  batch = dict.fromkeys(names, ZEROS) | {"mask": np.ones((B, T), bool), "row_ids": ROW_IDS[None]}
  return evaluate(never, setup, state, [batch | changed], np.ones(290, np.int32), ["a"])


DATA = {
  "token file": Entrance(
    lambda x: PackedExamples(corpus_of(x), 4, None, V)(np.array([0, 1])), bad_token_files(9, V)
  ),
  "token file: offsets": Entrance(
    lambda x: corpus_of(np.zeros(9, np.uint16), offsets=x),
    st.one_of(outside((3,), 10), no_integers((3,), 10), another_rank((3,), 10)),
  ),
  "token file: sources": Entrance(
    lambda x: corpus_of(np.zeros(9, np.uint16), sources=x),
    st.one_of(no_integers((1,), 10), another_rank((1,), 10)),
  ),
  "evaluate: mask": Entrance(lambda x: evaluate_with(mask=x), bad_masks((B, T))),
  "evaluate: row ids": Entrance(
    lambda x: evaluate_with(row_ids=x), bad_ids((1, B, T, J), 434, "length")
  ),
  "sample": Entrance(lambda x: generate(never, *model_of_300(), x, 3), bad_prompts(290)),
}
for key, size in {"tokens": 300, "targets": 290, "source": 1}.items():
  DATA[f"evaluate: {key}"] = Entrance(
    lambda x, key=key: evaluate_with(**{key: x}),
    bad_ids((B, T), size, "rank" if key == "tokens" else "length"),
  )
for key in ("segments", "positions"):
  DATA[f"evaluate: {key}"] = Entrance(
    lambda x, key=key: evaluate_with(**{key: x}),
    st.one_of(no_integers((B, T), V), bad_dtypes((B, T), V, "length")),
  )

# --- inference and the server -------------------------------------------------------------------


@functools.cache
def decoder():
  return small_decoder()


@functools.cache
def engine():
  return small_engine(decoder())


@functools.cache
def store() -> HostRows:
  tables = [np.ones((R, 4), np.float32) for R in ROWS.values()]
  return HostRows.from_tables(tables, LAYOUT, COMPRESSOR.digest)


@functools.cache
def device_cache() -> DeviceCache:
  return DeviceCache(store(), [np.arange(5), np.arange(3)])


def extend(tokens: Any = ZEROS, count: Any = None) -> Any:
  count = np.ones(B, int) if count is None else count
  return decoder().extend(decoder().empty_state(B), tokens, count)


def read(source: Any, tokens: Any) -> Any:
  rows_fn = source.on_demand(tokens, np.full(B, T), np.zeros((B, H), np.int32))
  return rows_fn(0, jnp.zeros(()))


def speculate(prompts: Any, **options: Any) -> Any:
  samplings = [Sampling()] * len(prompts)
  return next(generate_tokens_speculatively(decoder(), prompts, samplings, 3, **options))


def submit(prompts: Any) -> Any:
  requests = [dataclasses.replace(make_request([1]), ids=ids) for ids in prompts]
  return engine().submit(requests, never)


INFERENCE = {
  "prefill": Entrance(lambda x: decoder().prefill(x), bad_prompts(V)),
  "generate": Entrance(
    lambda x: next(generate_tokens(decoder(), x, [Sampling()] * 2, 3)), bad_prompts(V)
  ),
  "generate speculatively": Entrance(speculate, bad_prompts(V)),
  "draft tokens": Entrance(
    lambda x: speculate([[1]], draft_tokens=x),
    st.sampled_from([Bad(x, (repr(x),)) for x in (-1, -(2**63), 1.5, "a", None, [1])]),
  ),
  "seen tokens": Entrance(lambda x: seen_tokens(x, V), bad_prompts(V, empty=False)),
  "extend: tokens": Entrance(extend, bad_ids((B, T), V, "rank")),
  "extend: tokens in jit's arrays": Entrance(
    lambda x: extend(jnp.asarray(x)), bad_dtypes((B, T), V, "rank")
  ),
  "extend: count": Entrance(lambda x: extend(count=x), bad_ids((B,), T + 1, "length")),
  "rows of a decoder, on the device": Entrance(
    lambda x: read(decoder().row_source, x), bad_ids((B, T), V, "rank")
  ),
  "rows of a decoder, from a store": Entrance(
    lambda x: read(StoreRowSource(store(), COMPRESSOR, overlap=False), x),
    bad_ids((B, T), V, "rank"),
  ),
  "store: fetch": Entrance(lambda x: store().fetch(x), bad_ids((2, B, T), MOST)),
  "store: fetch_layer": Entrance(lambda x: store().fetch_layer(2, x), bad_ids((B, T), ROWS[2])),
  "store: fetch_by_layer": Entrance(
    lambda x: store().fetch_by_layer([[1], x]), bad_ids((7,), ROWS[2])
  ),
  "device cache: fetch": Entrance(lambda x: device_cache().fetch(x), bad_ids((2, B, T), MOST)),
  "device cache: lookup": Entrance(lambda x: device_cache().lookup(x), bad_ids((2, B, T), MOST)),
  "device cache: hot ids": Entrance(
    lambda x: DeviceCache(store(), [[1], x]), bad_ids((7,), ROWS[2], "rank")
  ),
  "count_ids": Entrance(lambda x: count_ids([x], 2), bad_ids((2, B, T), 2**63)),
  "engine": Entrance(submit, bad_prompts(V)),
  "engine: stop ids": Entrance(
    lambda x: small_engine(decoder(), stop_ids=x),
    st.one_of(outside((3,), V), traceable(no_integers((3,), V))),
  ),
}

# --- truths -------------------------------------------------------------------------------------

ENTRANCES: dict[str, Entrance] = HASHING | TABLES | MODULES | DATA | INFERENCE


def assert_refused(name: str, bad: Bad) -> None:
  """The entrance answers with one line of this package that names what is wrong."""
  try:
    ENTRANCES[name].call(bad.value)
  except (EngramError, ValueError, TypeError) as error:
    found = error
  else:
    pytest.fail(f"{name} took {bad.value!r}")
  where = pathlib.Path(traceback.extract_tb(found.__traceback__)[-1].filename)
  message = str(found)
  context = f"{bad.value!r}: {type(found).__name__} of {where}: {message}"
  assert where.is_relative_to(PACKAGE), context
  assert "\n" not in message, context
  assert len(message) < 400, context
  assert any(part in message for part in bad.names), context


def fuzz(name: str, examples: int) -> None:
  @settings(
    max_examples=examples,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
  )
  @given(ENTRANCES[name].bad)
  def run(bad: Bad) -> None:
    assert_refused(name, bad)

  run()


@pytest.mark.parametrize("name", ENTRANCES)
def test_what_is_no_id_is_refused(name):
  fuzz(name, 2 if name in MODULES else 6)  # a module is traced each time


@pytest.mark.slow
@pytest.mark.parametrize("name", ENTRANCES)
def test_ten_thousand_cases(name):
  fuzz(name, -(-CASES // len(ENTRANCES)))


INTEGERS = st.sampled_from(["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 3), st.integers(0, 4), INTEGERS, st.booleans())
def test_ids_of_any_integer_dtype_and_number_are_taken(batch, length, dtype, as_list):
  """Also none at all; what is found is what int32 finds."""
  ids = np.random.default_rng(length).integers(0, V, (batch, length)).astype(np.int32)
  given_ids = ids.astype(dtype).tolist() if as_list else ids.astype(dtype)
  if as_list and not batch:
    given_ids = ids  # such a list has no second axis
  np.testing.assert_array_equal(COMPRESSOR(given_ids), ids)
  options = {"segments_BT": ids, "mask_BT": ids > 30, "history_BH": np.ones((batch, H), int)}
  hashed = hash_ids_numpy(LAYOUT, 1, ids, **options)
  assert hashed.shape == (batch, length, J)
  np.testing.assert_array_equal(hash_ids_numpy(LAYOUT, 1, given_ids, **options), hashed)
  np.testing.assert_array_equal(store().fetch_layer(1, given_ids), np.ones((batch, length, 4)))
  assert tables_on("device")[0].lookup(tables_on("device")[1], {1: given_ids})[1].shape[:2] == (
    batch,
    length,
  )


def test_ids_on_a_device_are_not_looked_at_and_give_nan():
  """Reading them would wait for the device: `fetch` and `lookup` say so, and give no other row."""
  tables, state = tables_on("device")
  ids = jnp.asarray(ROW_IDS).at[1, 2].set(jnp.array([-1, 1024, 2**31 - 1, 3]))
  touched = tables.fetch(state, {1: ROW_IDS, 2: ids})
  for rows in (touched.expand(touched.rows)[2], tables.lookup(state, {2: ids})[2]):
    is_nan = np.isnan(rows).all(-1)
    assert is_nan[1, 2].tolist() == [True, True, True, False]
    assert is_nan.sum() == np.isnan(rows).any(-1).sum() == 3


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_pipeline_ends_with_the_damaged_token_file(tmp_path, workers):
  tokens = np.arange(40, dtype=np.uint16) % V
  tokens[21] = 61
  np.save(tmp_path / "tokens.npy", tokens)
  np.save(tmp_path / "offsets.npy", np.array([0, 40]))
  np.save(tmp_path / "sources.npy", np.zeros(1, np.int32))
  corpus = Corpus.open(tmp_path)
  pipeline = Pipeline(PackedExamples(corpus, 4, None, V), 2, None, workers=workers)
  message = rf"{tmp_path}: .* token id 61 of token 21 is outside the vocabulary: 0\.\.59; delete"
  with pytest.raises(StorageError, match=message):
    pipeline.batch_at(2)
  with contextlib.closing(pipeline.iterate()) as batches:
    assert next(batches)["tokens"].max() < V
    with pytest.raises(StorageError, match=message):
      list(batches)


@pytest.fixture(scope="module")
def client():
  with small_engine(decoder()) as running:
    yield Client(Service(running, PromptEncoder(small_tokenizer()), "small"))


ID = st.sampled_from([-1, V, 2**31, 2**32, 2**63, 2**64, 10**30, 1.0, 0.5, True, None, "a", [1]])
BAD_FIELDS = st.one_of(
  st.builds(lambda x: {"prompt": [1, x, 2]}, ID),
  st.builds(lambda x: {"prompt": [[1, 2], [x]]}, ID),
  st.builds(lambda x: {"prompt": "ab", "logit_bias": {str(x): 1}}, ID),
  st.builds(lambda x: {"prompt": "ab", "stop": [x]}, ID.filter(lambda x: x != "a")),
  st.builds(lambda x: {"prompt": "ab", "stop_token_ids": [x]}, ID),
  st.just({"prompt": [[], [1]]}),
)


def assert_answered_with_400(client: Client, examples: int) -> None:
  @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
  @given(BAD_FIELDS)
  def run(fields: dict[str, Any]) -> None:
    response = client.post("/v1/completions", {"max_tokens": 1} | fields)
    assert response.status_code == 400, (fields, response.text)
    message = response.json()["error"]["message"]
    field = next(name for name in reversed(fields))
    assert field.split("_")[0] in message, (fields, message)
    assert "\n" not in message

  run()


def test_ids_in_bodies_of_requests_are_refused(client):
  assert_answered_with_400(client, 20)


@pytest.mark.slow
def test_many_bodies_of_requests(client):
  assert_answered_with_400(client, 500)
