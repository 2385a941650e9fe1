"""Continuous batching: a request gets the tokens it would get alone, and its end frees its slot."""

import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import V, make_small_model, random_tokens, with_nan_params
from small_server import (
  CAPACITY,
  CHUNK,
  QUEUE,
  SLOTS,
  EventLog,
  make_request,
  settle,
  small_decoder,
  small_engine,
)
from small_server import small_tokenizer as make_tokenizer

from engram_jax.errors import ConfigError, StorageError
from engram_jax.inference.decoder import Decoder, generate_tokens
from engram_jax.inference.row_sources import StoreRowSource
from engram_jax.inference.sampling import Sampling
from engram_jax.inference.stores.host import HostRows
from engram_jax.serve import slots
from engram_jax.serve.request import EngineDown, Failed, Finished, QueueFull
from engram_jax.serve.server import warm_up

# Lengths that cut into chunks of 1 and 8, so that there is little to compile.
PROMPTS = [random_tokens(i, n) for i, n in enumerate((8, 1, 17, 9, 16, 8, 24))]
SAMPLINGS = [
  Sampling(),
  Sampling(temperature=1.3, seed=4),
  Sampling(temperature=2.0, top_k=20, seed=5),
  Sampling(repetition_penalty=1.7),
  Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=6),
  Sampling(temperature=1.3, seed=7),
  Sampling(temperature=1.3, seed=2**32 - 1),
]
NEW = [8, 3, 8, 5, 1, 8, 8]


@pytest.fixture(scope="module")
def model():
  return make_small_model()


@pytest.fixture(scope="module")
def decoder():
  return small_decoder()


@pytest.fixture(scope="module")
def engine(decoder):
  with small_engine(decoder) as engine:
    warm_up(engine)
    yield engine


@pytest.fixture(autouse=True)
def _slots_are_free_afterwards(request):
  yield
  if "engine" in request.fixturenames:
    settle(request.getfixturevalue("engine"))


def generate_alone(decoder, prompt, sampling, count):
  return np.concatenate(list(generate_tokens(decoder, [prompt], [sampling], count))).tolist()


def test_every_request_gets_the_tokens_it_would_get_alone(engine, decoder):
  """More requests than slots, of different lengths: they come and go at different times."""
  requests = [make_request(*args) for args in zip(PROMPTS, NEW, SAMPLINGS, strict=True)]
  assert len(requests) > 2 * SLOTS
  log = EventLog(engine, requests).wait()
  for i, (prompt, new, sampling) in enumerate(zip(PROMPTS, NEW, SAMPLINGS, strict=True)):
    assert log.ids(i) == generate_alone(decoder, prompt, sampling, new)
    assert log.events[i][-1].reason == "length"
  count, backwards = len(requests), EventLog(engine, requests[::-1]).wait()
  assert [backwards.ids(i) for i in range(count)][::-1] == [log.ids(i) for i in range(count)]


def test_rows_from_the_host_give_the_same_events(engine, decoder, model):
  """Rows of a prompt's next chunk are prefetched, those of sampled tokens fetched on demand."""
  w = model.weights
  store = HostRows.from_tables(model.tables, w.layout, w.compressor.digest)
  requests = [make_request(PROMPTS[i], 8, SAMPLINGS[i]) for i in (0, 2, 6, 3)]
  expected = EventLog(engine, requests).wait()
  with (
    StoreRowSource(store, w.compressor) as rows,
    small_engine(decoder.with_row_source(rows)) as hosted,
  ):
    log = EventLog(hosted, requests).wait()
  assert log.events == expected.events
  assert rows.telemetry.rows > 0


def test_a_model_without_a_memory_has_no_gates():
  w = make_small_model(memory=False).weights
  plain = Decoder(w, None, CAPACITY, chunk=CHUNK)
  with small_engine(plain, slots=1) as engine:
    log = EventLog(engine, [make_request(PROMPTS[0], 3, score_prompt=True)]).wait()
  assert log.ids() == generate_alone(plain, PROMPTS[0], Sampling(), 3)
  assert {t.gates for t in (*log.prompt(), *log.tokens())} == {()}


def test_scores_and_gates_are_those_of_the_full_forward(engine, decoder, model):
  prompt = PROMPTS[2]
  log = EventLog(engine, [make_request(prompt, 5, SAMPLINGS[1], top=4, score_prompt=True)]).wait()
  tokens = [*log.prompt(), *log.tokens()]
  ids = [t.id for t in tokens]
  assert ids == [*prompt, *log.ids()]
  logprobs_TV = np.asarray(jax.nn.log_softmax(jnp.asarray(model.logits(ids))))
  assert tokens[0].logprob is None
  assert tokens[0].top == ()
  for t in range(1, len(ids)):
    before_V = logprobs_TV[t - 1]
    np.testing.assert_allclose(tokens[t].logprob, before_V[ids[t]], atol=1e-4)
    top_ids, values = zip(*tokens[t].top, strict=True)
    np.testing.assert_allclose(values, np.sort(before_V)[::-1][:4], atol=1e-4)
    np.testing.assert_allclose(before_V[list(top_ids)], values, atol=1e-4)
  # One chunk without padding: the same shape as the engine prefills.
  chunk = decoder.extend(decoder.empty_state(1), [ids[:CHUNK]], [CHUNK])
  for layer, gate_BTG in enumerate(chunk.gates):
    expected = np.asarray(gate_BTG).mean(-1)[0]
    np.testing.assert_allclose([t.gates[layer] for t in tokens[:CHUNK]], expected, atol=1e-5)
  assert np.ptp([t.gates[0] for t in tokens]) > 0.05


def test_gates_of_new_tokens_are_those_of_a_prompt_with_them(engine):
  log = EventLog(engine, [make_request(PROMPTS[0], 8)]).wait()
  prompt = [*PROMPTS[0], *log.ids()]
  prompt_log = EventLog(engine, [make_request(prompt, 0, score_prompt=True)]).wait()
  for new, scored in zip(log.tokens(), prompt_log.prompt()[len(PROMPTS[0]) :], strict=True):
    np.testing.assert_allclose(new.gates, scored.gates, atol=1e-5)
    np.testing.assert_allclose(new.logprob, scored.logprob, atol=1e-4)


def test_no_new_tokens_is_only_a_prefill(engine):
  log = EventLog(engine, [make_request(PROMPTS[0], 0)]).wait()
  assert log.events == [[Finished("", "length")]]


def test_a_prompt_does_not_delay_the_others(decoder, monkeypatch):
  """Between two chunks of it the running request gets a token."""
  batches, extend = [], decoder.extend

  def logged_extend(state, tokens_BT, count_B, **options):
    batches.append(len(np.asarray(tokens_BT)))
    return extend(state, tokens_BT, count_B, **options)

  monkeypatch.setattr(decoder, "extend", logged_extend)
  with small_engine(decoder) as engine:
    first = EventLog(engine, [make_request(PROMPTS[1], 25)])
    first.next()
    second = EventLog(engine, [make_request(PROMPTS[6], 1)]).wait()
    first.wait()
  assert second.events[0][-1] == Finished(second.events[0][-1].text, "length")
  prefills = [i for i, size in enumerate(batches) if size == 1]
  assert len(prefills) == 1 + len(PROMPTS[6]) // CHUNK
  assert all(batches[i + 1] == SLOTS for i in prefills)


def test_a_stop_string_cuts_the_text(engine):
  free = EventLog(engine, [make_request(PROMPTS[0], 12)]).wait()
  tokenizer = make_tokenizer()
  assert free.text() == tokenizer.decode(free.ids())
  stop = free.text()[3:5]
  cut = EventLog(engine, [make_request(PROMPTS[0], 12, stop=(stop, "never that"))]).wait()
  assert cut.text() == free.text()[: free.text().index(stop)]
  assert cut.events[0][-1].reason == "stop"
  assert len(cut.ids()) < len(free.ids())


def test_a_stop_id_ends_the_text_is_no_part_of_it_and_is_scored(engine, decoder):
  free = EventLog(engine, [make_request(PROMPTS[0], 8, top=2)]).wait().tokens()
  end = [t.id for t in free].index(free[4].id)
  with small_engine(decoder, stop_ids=[free[4].id]) as stopping:
    log = EventLog(stopping, [make_request(PROMPTS[0], 8, top=2)]).wait()
  assert log.tokens() == [*free[:end], free[end]._replace(text="")]
  assert log.text() == make_tokenizer().decode([t.id for t in free[:end]])
  assert log.events[0][-1].reason == "stop"


def test_tokens_have_their_start_though_their_text_is_held_back(engine):
  """Two stop strings begin in the text and never end."""
  free = EventLog(engine, [make_request(PROMPTS[0], 12)]).wait()
  text = free.text()
  held = EventLog(
    engine, [make_request(PROMPTS[0], 12, stop=(text[2:6] + "\0", text[3:] + "\0"))]
  ).wait()
  assert [t.text for t in held.tokens()] != [t.text for t in free.tokens()]
  starts = [0, *itertools.accumulate(len(t.text) for t in free.tokens()[:-1])]
  assert [t.start for t in held.tokens()] == [t.start for t in free.tokens()] == starts


def test_warming_up_compiles_every_kind_of_scoring(engine):
  before = slots._score._cache_size()
  for top, score_prompt in ((0, True), (3, True), (3, False), (0, False)):
    EventLog(engine, [make_request(PROMPTS[0], 2, top=top, score_prompt=score_prompt)]).wait()
  assert slots._score._cache_size() == before


def test_cancelled_requests_free_their_slots(engine, decoder):
  """Requests that run, are in prefill or wait are cancelled; later ones are not affected."""
  requests = [make_request(PROMPTS[i % 2], 20) for i in range(SLOTS + 4)]
  log = EventLog(engine, requests)
  log.next()
  engine.cancel(log.handles)
  after = EventLog(engine, [make_request(PROMPTS[i], 8) for i in range(SLOTS)]).wait()
  assert [after.ids(i) for i in range(SLOTS)] == [
    generate_alone(decoder, PROMPTS[i], Sampling(), 8) for i in range(SLOTS)
  ]
  settle(engine)
  assert not any(isinstance(e, Finished | Failed) for events in log.events for e in events)


def test_a_full_queue_takes_all_requests_or_none(engine):
  log = EventLog(engine, [make_request(PROMPTS[0], 20) for _ in range(QUEUE)])
  with pytest.raises(QueueFull, match=f"{QUEUE} may"):
    EventLog(engine, [make_request(PROMPTS[0], 20) for _ in range(QUEUE)])
  engine.cancel(log.handles)


@pytest.mark.parametrize(
  ("ids", "new", "message"),
  [([], 1, "empty"), ([V], 1, "outside"), ([-1], 1, "outside"), ([1] * 30, CAPACITY, "fit")],
)
def test_unsound_prompts_are_refused_before_they_wait(engine, ids, new, message):
  with pytest.raises(ConfigError, match=message):
    EventLog(engine, [make_request([1], 1), make_request(ids, new)])
  assert engine.status()["waiting"] == 0


class FlakyRows:
  """A row source whose reads fail once for each time that `fail` is set."""

  def __init__(self, row_source):
    self.row_source, self.fail = row_source, threading.Event()

  def prefetch(self, *args):
    return self.row_source.prefetch(*args)

  def on_demand(self, *args):
    if self.fail.is_set():
      self.fail.clear()
      raise StorageError("rows: the file has gone")
    return self.row_source.on_demand(*args)


def test_rows_that_cannot_be_read_fail_the_running_requests_alone(decoder):
  flaky = FlakyRows(decoder.row_source)
  with small_engine(decoder.with_row_source(flaky)) as engine:
    running = EventLog(engine, [make_request(PROMPTS[0], 20)])
    running.next()
    flaky.fail.set()
    running.wait()
    assert "the file has gone" in running.events[0][-1].message
    after = EventLog(engine, [make_request(PROMPTS[0], 8)]).wait()
    assert after.ids() == generate_alone(decoder, PROMPTS[0], Sampling(), 8)
    status = engine.status()
  assert (status["status"], status["failures"]) == ("ok", 1)
  assert "the file has gone" in status["last_failure"]


def test_an_engine_that_cannot_go_on_fails_all_requests(decoder, monkeypatch):
  with small_engine(decoder) as engine:
    running = EventLog(engine, [make_request(PROMPTS[0], 20) for _ in range(SLOTS + 2)])
    running.next()

    def out_of_memory(*_):
      raise MemoryError("no memory is left")

    monkeypatch.setattr(engine._slots, "step", out_of_memory)
    monkeypatch.setattr(decoder, "empty_state", out_of_memory)
    running.wait()
    assert all(isinstance(events[-1], Failed) for events in running.events)
    with pytest.raises(EngineDown, match="no memory is left"):
      EventLog(engine, [make_request(PROMPTS[0])])
    assert "no memory is left" in engine.status()["status"]


def test_a_listener_that_raises_ends_its_request_alone(engine, decoder):
  def failing_listener(_, event):
    raise RuntimeError("the loop is closed")

  engine.submit([make_request(PROMPTS[0], 20)], failing_listener)
  assert EventLog(engine, [make_request(PROMPTS[3], 8)]).wait().ids() == generate_alone(
    decoder, PROMPTS[3], Sampling(), 8
  )


def test_closing_fails_all_requests(decoder):
  with small_engine(decoder) as engine:
    log = EventLog(engine, [make_request(PROMPTS[0], 20) for _ in range(SLOTS + 2)])
    log.next()
    engine.close()
    log.wait()
    assert any(e == [Failed("the server is stopping")] for e in log.events)
    with pytest.raises(EngineDown, match="stopping"):
      EventLog(engine, [make_request(PROMPTS[0])])


def test_a_diverged_model_fails_its_requests_with_the_reason(decoder):
  with small_engine(with_nan_params(decoder)) as engine:
    log = EventLog(engine, [make_request(PROMPTS[0])]).wait()
  assert not log.ids()
  assert "not finite" in log.events[0][-1].message
