"""Rows from the host or a file give the tokens of rows on the device; failed reads are errors."""

import threading
import time

import numpy as np
import pytest
from small_model import make_small_model, random_tokens

from engram_jax.errors import StorageError
from engram_jax.inference.decoder import Decoder, generate_tokens
from engram_jax.inference.row_sources import DeviceRowSource, StoreRowSource
from engram_jax.inference.sampling import Sampling
from engram_jax.inference.speculative import generate_tokens_speculatively
from engram_jax.inference.stores.cache import HostCache
from engram_jax.inference.stores.device_cache import DeviceCache
from engram_jax.inference.stores.file import FileRows
from engram_jax.inference.stores.host import HostRows
from engram_jax.inference.stores.write import write_table_file

PROMPTS = [random_tokens(0, 13), random_tokens(1, 5)]
SAMPLINGS = [Sampling(), Sampling(temperature=1.0, seed=3)]


@pytest.fixture(scope="module")
def model():
  return make_small_model()


@pytest.fixture(scope="module")
def decoder(model):
  """A decoder whose stages are compiled once; tests give it other row sources."""
  w = model.weights
  return Decoder(w, DeviceRowSource(w.layout, w.compressor.table, model.tables), 32, chunk=8)


@pytest.fixture(scope="module")
def expected(decoder):
  """Tokens with the tables on the device."""
  return np.stack(list(generate_tokens(decoder, PROMPTS, SAMPLINGS, 6)), axis=1).tolist()


def host_store(model):
  w = model.weights
  return HostRows.from_tables([np.asarray(t) for t in model.tables], w.layout, w.compressor.digest)


def file_store(model, path):
  w = model.weights
  tables = dict(zip(w.layout.layers, model.tables, strict=True))
  write_table_file(
    path,
    lambda layer: iter([np.asarray(tables[layer])[: w.layout.rows[layer]]]),
    w.layout,
    w.compressor.digest,
    kind="f32",
    width=tables[w.layout.layers[0]].shape[1],
    source={},
  )
  return FileRows(path)


@pytest.mark.parametrize("overlap", [True, False], ids=["prefetched", "synchronous"])
@pytest.mark.parametrize("placement", ["host", "file", "host cache", "device cache"])
def test_tokens_are_those_of_tables_on_the_device(
  model, decoder, expected, tmp_path, placement, overlap
):
  store = host_store(model) if placement == "host" else file_store(model, tmp_path / "t.engram")
  if placement == "host cache":
    store = HostCache(store, 5000)
  if placement == "device cache":
    store = DeviceCache(store, [np.arange(0, 300, 2), np.arange(150)])
  with store, StoreRowSource(store, model.weights.compressor, overlap=overlap) as rows:
    hosted = decoder.with_row_source(rows)
    assert (
      np.stack(list(generate_tokens(hosted, PROMPTS, SAMPLINGS, 6)), axis=1).tolist() == expected
    )
    seen = rows.telemetry.as_dict()
  layers, hash_heads = len(store.layers), model.weights.layout.hash_heads
  passes = 2 + 5  # two chunks of prompts, then every token but the last
  assert seen["fetches"] == layers * passes
  assert seen["rows"] == layers * hash_heads * (2 * 8 + 2 * 8 + 5 * 2)
  assert seen["bytes"] == seen["rows"] * store.width * 4
  if not overlap:
    assert seen["waited_seconds"] >= seen["busy_seconds"]
  assert seen["busy_seconds"] > 0


def test_draft_tokens_do_not_change_the_tokens(model, decoder, expected):
  with host_store(model) as store, StoreRowSource(store, model.weights.compressor) as rows:
    texts = [[], []]
    for step in generate_tokens_speculatively(
      decoder.with_row_source(rows), PROMPTS, SAMPLINGS, 6, draft_tokens=7
    ):
      for text, new in zip(texts, step, strict=True):
        text += new
  assert texts == expected


def test_rows_of_the_next_chunk_are_prefetched_while_this_one_runs(model, decoder):
  """When a chunk's rows are first asked for, the prefetch of the next chunk's has begun."""
  with host_store(model) as store, StoreRowSource(store, model.weights.compressor) as rows:
    log, prefetch = [], rows.prefetch

    def logged_prefetch(*args):
      chunk = sum(entry[0] == "prefetch" for entry in log)
      log.append(("prefetch", chunk))
      rows_fn = prefetch(*args)
      return lambda i, x: (log.append(("fetch", chunk)), rows_fn(i, x))[1]

    rows.prefetch = logged_prefetch
    decoder.with_row_source(rows).prefill([random_tokens(4, 24)])
  assert log.index(("prefetch", 1)) < log.index(("fetch", 0))
  assert log.index(("prefetch", 2)) < log.index(("fetch", 1))


class SlowRows(HostRows):
  """A store whose reads wait for an event."""

  def _read(self, ids_by_layer, outs, until):
    assert self.gate.wait(10)
    super()._read(ids_by_layer, outs, until)


def slow_store(model):
  store = host_store(model)
  store.__class__, store.gate = SlowRows, threading.Event()
  return store


def test_a_late_read_gives_the_right_rows(model, decoder, expected):
  with slow_store(model) as store, StoreRowSource(store, model.weights.compressor) as rows:
    threading.Timer(0.3, store.gate.set).start()
    begin = time.perf_counter()
    hosted = decoder.with_row_source(rows)
    assert (
      np.stack(list(generate_tokens(hosted, PROMPTS, SAMPLINGS, 6)), axis=1).tolist() == expected
    )
    waited = rows.telemetry.waited_seconds
    assert 0.05 < waited < time.perf_counter() - begin


def test_a_read_past_its_deadline_is_an_error(model, decoder):
  with slow_store(model) as store:
    rows = StoreRowSource(store, model.weights.compressor, deadline=0.05)
    threading.Timer(0.3, store.gate.set).start()
    with rows, pytest.raises(StorageError, match="deadline") as caught:
      decoder.with_row_source(rows).prefill(PROMPTS)
  assert caught.value.exit_code == 5


def test_a_file_that_changes_is_an_error(model, decoder, tmp_path):
  path = tmp_path / "t.engram"
  store = file_store(model, path)
  with store, StoreRowSource(store, model.weights.compressor) as rows:
    hosted = decoder.with_row_source(rows)
    hosted.prefill(PROMPTS)
    with open(path, "ab") as file:
      file.write(b"more")
    with pytest.raises(StorageError, match="has changed"):
      hosted.prefill(PROMPTS)
