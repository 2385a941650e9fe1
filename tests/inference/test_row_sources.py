"""Rows from the host or a file say what rows on the device say; late and broken reads are told."""

import threading
import time

import numpy as np
import pytest
from speaker import make_speaker, some_tokens

from engram_jax.errors import StorageError
from engram_jax.inference.decoder import Decoder, continuations
from engram_jax.inference.row_sources import DeviceRows, StoreRows
from engram_jax.inference.sampling import Sampling
from engram_jax.inference.speculative import speculative_continuations
from engram_jax.inference.stores.cache import HostCache
from engram_jax.inference.stores.device_cache import DeviceCache
from engram_jax.inference.stores.file import FileRows
from engram_jax.inference.stores.host import HostRows
from engram_jax.inference.stores.write import write_table_file

pytestmark = pytest.mark.usefixtures("quick")
PROMPTS = [some_tokens(0, 13), some_tokens(1, 5)]
HOW = [Sampling(), Sampling(temperature=1.0, seed=3)]


@pytest.fixture(scope="module")
def speaker():
  return make_speaker()


@pytest.fixture(scope="module")
def decoder(quick, speaker):
  """Its stages are compiled once; tests give it other sources."""
  w = speaker.weights
  return Decoder(w, DeviceRows(w.layout, w.compressor.table, speaker.tables), 32, chunk=8)


@pytest.fixture(scope="module")
def said(decoder):
  """What the model says with its tables on the device."""
  return np.stack(list(continuations(decoder, PROMPTS, HOW, 6)), axis=1).tolist()


def host_store(speaker):
  w = speaker.weights
  return HostRows.from_tables(
    [np.asarray(t) for t in speaker.tables], w.layout, w.compressor.digest
  )


def file_store(speaker, path):
  w = speaker.weights
  tables = dict(zip(w.layout.layers, speaker.tables, strict=True))
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


@pytest.mark.parametrize("prefetch", [True, False], ids=["prefetched", "synchronous"])
@pytest.mark.parametrize("where", ["host", "file", "host cache", "device cache"])
def test_tokens_are_those_of_tables_on_the_device(
  speaker, decoder, said, tmp_path, where, prefetch
):
  store = host_store(speaker) if where == "host" else file_store(speaker, tmp_path / "t.engram")
  if where == "host cache":
    store = HostCache(store, 5000)
  if where == "device cache":
    store = DeviceCache(store, [np.arange(0, 300, 2), np.arange(150)])
  with store, StoreRows(store, speaker.weights.compressor, prefetch=prefetch) as rows:
    there = decoder.with_source(rows)
    assert np.stack(list(continuations(there, PROMPTS, HOW, 6)), axis=1).tolist() == said
    seen = rows.telemetry.as_dict()
  layers, columns = len(store.layers), speaker.weights.layout.hash_heads
  passes = 2 + 5  # two chunks of prompts, then every token but the last
  assert seen["fetches"] == layers * passes
  assert seen["rows"] == layers * columns * (2 * 8 + 2 * 8 + 5 * 2)
  assert seen["bytes"] == seen["rows"] * store.width * 4
  if not prefetch:
    assert seen["waited_seconds"] >= seen["busy_seconds"]
  assert seen["busy_seconds"] > 0


def test_guessed_tokens_too(speaker, decoder, said):
  with host_store(speaker) as store, StoreRows(store, speaker.weights.compressor) as rows:
    texts = [[], []]
    for step in speculative_continuations(decoder.with_source(rows), PROMPTS, HOW, 6, guesses=7):
      for text, new in zip(texts, step, strict=True):
        text += new
  assert texts == said


def test_the_rows_of_the_next_chunk_are_read_while_this_one_runs(speaker, decoder):
  """By the time a chunk's rows are first asked for, the next chunk's were started."""
  with host_store(speaker) as store, StoreRows(store, speaker.weights.compressor) as rows:
    log, start = [], rows.start

    def spied(*args):
      chunk = sum(entry[0] == "start" for entry in log)
      log.append(("start", chunk))
      ask = start(*args)
      return lambda i, x: (log.append(("ask", chunk)), ask(i, x))[1]

    rows.start = spied
    decoder.with_source(rows).prefill([some_tokens(4, 24)])
  assert log.index(("start", 1)) < log.index(("ask", 0))
  assert log.index(("start", 2)) < log.index(("ask", 1))


class Slow(HostRows):
  """Reads wait until they are let go."""

  def _read(self, ids_by_layer, outs, until):
    assert self.gate.wait(10)
    super()._read(ids_by_layer, outs, until)


def slow_store(speaker):
  store = host_store(speaker)
  store.__class__, store.gate = Slow, threading.Event()
  return store


def test_a_late_read_gives_the_right_rows(speaker, decoder, said):
  with slow_store(speaker) as store, StoreRows(store, speaker.weights.compressor) as rows:
    threading.Timer(0.3, store.gate.set).start()
    begin = time.perf_counter()
    there = decoder.with_source(rows)
    assert np.stack(list(continuations(there, PROMPTS, HOW, 6)), axis=1).tolist() == said
    waited = rows.telemetry.waited_seconds
    assert 0.05 < waited < time.perf_counter() - begin


def test_a_read_past_its_deadline_is_an_error_and_not_old_rows(speaker, decoder):
  with slow_store(speaker) as store:
    rows = StoreRows(store, speaker.weights.compressor, deadline=0.05)
    threading.Timer(0.3, store.gate.set).start()
    with rows, pytest.raises(StorageError, match="deadline") as caught:
      decoder.with_source(rows).prefill(PROMPTS)
  assert caught.value.exit_code == 5


def test_a_file_that_changes_is_an_error(speaker, decoder, tmp_path):
  path = tmp_path / "t.engram"
  store = file_store(speaker, path)
  with store, StoreRows(store, speaker.weights.compressor) as rows:
    there = decoder.with_source(rows)
    there.prefill(PROMPTS)
    with open(path, "ab") as file:
      file.write(b"more")
    with pytest.raises(StorageError, match="has changed"):
      there.prefill(PROMPTS)
