"""Continuous batching: everyone gets what it would get alone, and what ends leaves room."""

import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from served import CAPACITY, CHUNK, QUEUE, SLOTS, Heard, job, settle, small_decoder, small_engine
from served import small_tokenizer as make_tokenizer
from speaker import V, diverged, make_speaker, some_tokens

from engram_jax.errors import ConfigError, StorageError
from engram_jax.inference.decoder import Decoder, continuations
from engram_jax.inference.row_sources import StoreRows
from engram_jax.inference.sampling import Sampling
from engram_jax.inference.stores.host import HostRows
from engram_jax.serve import slots
from engram_jax.serve.request import Done, EngineDown, Failed, QueueFull
from engram_jax.serve.server import warm

# Lengths that cut into pieces of 1 and 8, so that there is little to compile.
PROMPTS = [some_tokens(i, n) for i, n in enumerate((8, 1, 17, 9, 16, 8, 24))]
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
def speaker():
  return make_speaker()


@pytest.fixture(scope="module")
def decoder():
  return small_decoder()


@pytest.fixture(scope="module")
def engine(decoder):
  with small_engine(decoder) as engine:
    warm(engine)
    yield engine


@pytest.fixture(autouse=True)
def _all_free_after(request):
  yield
  if "engine" in request.fixturenames:
    settle(request.getfixturevalue("engine"))


def alone(decoder, prompt, sampling, count):
  return np.concatenate(list(continuations(decoder, [prompt], [sampling], count))).tolist()


def test_everyone_gets_what_it_would_get_alone(engine, decoder):
  """More requests than slots, of different lengths: they come and go at different times."""
  jobs = [job(*each) for each in zip(PROMPTS, NEW, SAMPLINGS, strict=True)]
  assert len(jobs) > 2 * SLOTS
  heard = Heard(engine, jobs).wait()
  for i, (prompt, new, sampling) in enumerate(zip(PROMPTS, NEW, SAMPLINGS, strict=True)):
    assert heard.ids(i) == alone(decoder, prompt, sampling, new)
    assert heard.events[i][-1].reason == "length"
  order = Heard(engine, jobs[::-1]).wait()
  assert [order.ids(i) for i in range(len(jobs))][::-1] == [heard.ids(i) for i in range(len(jobs))]


def test_rows_from_the_host_say_the_same(engine, decoder, speaker):
  """Those of a prompt's next piece are fetched ahead, those of chosen tokens on demand."""
  w = speaker.weights
  store = HostRows.from_tables(speaker.tables, w.layout, w.compressor.digest)
  jobs = [job(PROMPTS[i], 8, SAMPLINGS[i]) for i in (0, 2, 6, 3)]
  expected = Heard(engine, jobs).wait()
  with StoreRows(store, w.compressor) as rows, small_engine(decoder.with_source(rows)) as hosted:
    heard = Heard(hosted, jobs).wait()
  assert heard.events == expected.events
  assert rows.telemetry.rows > 0


def test_a_model_without_a_memory_has_no_gates():
  w = make_speaker(memory=False).weights
  plain = Decoder(w, None, CAPACITY, chunk=CHUNK)
  with small_engine(plain, slots=1) as engine:
    heard = Heard(engine, [job(PROMPTS[0], 3, score_prompt=True)]).wait()
  assert heard.ids() == alone(plain, PROMPTS[0], Sampling(), 3)
  assert {t.gates for t in (*heard.prompt(), *heard.tokens())} == {()}


def test_scores_and_gates_are_the_full_forwards(engine, decoder, speaker):
  prompt = PROMPTS[2]
  heard = Heard(engine, [job(prompt, 5, SAMPLINGS[1], top=4, score_prompt=True)]).wait()
  tokens = [*heard.prompt(), *heard.tokens()]
  ids = [t.id for t in tokens]
  assert ids == [*prompt, *heard.ids()]
  logprobs_TV = np.asarray(jax.nn.log_softmax(jnp.asarray(speaker.logits(ids))))
  assert tokens[0].logprob is None
  assert tokens[0].top == ()
  for t in range(1, len(ids)):
    before_V = logprobs_TV[t - 1]
    np.testing.assert_allclose(tokens[t].logprob, before_V[ids[t]], atol=1e-4)
    best, values = zip(*tokens[t].top, strict=True)
    np.testing.assert_allclose(values, np.sort(before_V)[::-1][:4], atol=1e-4)
    np.testing.assert_allclose(before_V[list(best)], values, atol=1e-4)
  # One piece without padding: the same shape as the engine reads.
  piece = decoder.extend(decoder.empty(1), [ids[:CHUNK]], [CHUNK])
  for layer, gate_BTG in enumerate(piece.gates):
    expected = np.asarray(gate_BTG).mean(-1)[0]
    np.testing.assert_allclose([t.gates[layer] for t in tokens[:CHUNK]], expected, atol=1e-5)
  assert np.ptp([t.gates[0] for t in tokens]) > 0.05


def test_gates_of_new_tokens_are_those_of_a_prompt_with_them(engine):
  heard = Heard(engine, [job(PROMPTS[0], 8)]).wait()
  again = Heard(engine, [job([*PROMPTS[0], *heard.ids()], 0, score_prompt=True)]).wait()
  for new, read in zip(heard.tokens(), again.prompt()[len(PROMPTS[0]) :], strict=True):
    np.testing.assert_allclose(new.gates, read.gates, atol=1e-5)
    np.testing.assert_allclose(new.logprob, read.logprob, atol=1e-4)


def test_nothing_new_is_only_a_reading(engine):
  heard = Heard(engine, [job(PROMPTS[0], 0)]).wait()
  assert heard.events == [[Done("", "length")]]


def test_a_prompt_does_not_hold_the_others_up(decoder, monkeypatch):
  """Between two pieces of it the running request gets a token."""
  batches, extend = [], decoder.extend

  def watched(state, tokens_BT, count_B, **options):
    batches.append(len(np.asarray(tokens_BT)))
    return extend(state, tokens_BT, count_B, **options)

  monkeypatch.setattr(decoder, "extend", watched)
  with small_engine(decoder) as engine:
    first = Heard(engine, [job(PROMPTS[1], 25)])
    first.next()
    second = Heard(engine, [job(PROMPTS[6], 1)]).wait()
    first.wait()
  assert second.events[0][-1] == Done(second.events[0][-1].text, "length")
  reads = [i for i, size in enumerate(batches) if size == 1]
  assert len(reads) == 1 + len(PROMPTS[6]) // CHUNK
  assert all(batches[i + 1] == SLOTS for i in reads)


def test_text_and_stop_strings(engine):
  free = Heard(engine, [job(PROMPTS[0], 12)]).wait()
  tokenizer = make_tokenizer()
  assert free.text() == tokenizer.decode(free.ids())
  stop = free.text()[3:5]
  cut = Heard(engine, [job(PROMPTS[0], 12, stop=(stop, "never that"))]).wait()
  assert cut.text() == free.text()[: free.text().index(stop)]
  assert cut.events[0][-1].reason == "stop"
  assert len(cut.ids()) < len(free.ids())


def test_a_stop_id_ends_the_text_is_no_part_of_it_and_is_scored(engine, decoder):
  free = Heard(engine, [job(PROMPTS[0], 8, top=2)]).wait().tokens()
  end = [t.id for t in free].index(free[4].id)
  with small_engine(decoder, stop_ids=[free[4].id]) as stopping:
    heard = Heard(stopping, [job(PROMPTS[0], 8, top=2)]).wait()
  assert heard.tokens() == [*free[:end], free[end]._replace(text="")]
  assert heard.text() == make_tokenizer().decode([t.id for t in free[:end]])
  assert heard.events[0][-1].reason == "stop"


def test_tokens_say_where_they_begin_though_their_text_is_held_back(engine):
  """A stop string that begins again and again and never comes."""
  free = Heard(engine, [job(PROMPTS[0], 12)]).wait()
  text = free.text()
  held = Heard(engine, [job(PROMPTS[0], 12, stop=(text[2:6] + "\0", text[3:] + "\0"))]).wait()
  assert [t.text for t in held.tokens()] != [t.text for t in free.tokens()]
  starts = [0, *itertools.accumulate(len(t.text) for t in free.tokens()[:-1])]
  assert [t.start for t in held.tokens()] == [t.start for t in free.tokens()] == starts


def test_warming_up_compiles_every_kind_of_scoring(engine):
  before = slots._score._cache_size()
  for top, score_prompt in ((0, True), (3, True), (3, False), (0, False)):
    Heard(engine, [job(PROMPTS[0], 2, top=top, score_prompt=score_prompt)]).wait()
  assert slots._score._cache_size() == before


def test_cancelled_requests_leave_their_slots_to_others(engine, decoder):
  """Running, being read and waiting ones; those that stay are none the wiser."""
  jobs = [job(PROMPTS[i % 2], 20) for i in range(SLOTS + 4)]
  heard = Heard(engine, jobs)
  heard.next()
  engine.cancel(heard.tickets)
  after = Heard(engine, [job(PROMPTS[i], 8) for i in range(SLOTS)]).wait()
  assert [after.ids(i) for i in range(SLOTS)] == [
    alone(decoder, PROMPTS[i], Sampling(), 8) for i in range(SLOTS)
  ]
  settle(engine)
  assert not any(isinstance(e, Done | Failed) for events in heard.events for e in events)


def test_a_full_queue_takes_all_of_a_request_or_nothing(engine):
  heard = Heard(engine, [job(PROMPTS[0], 20) for _ in range(QUEUE)])
  with pytest.raises(QueueFull, match=f"{QUEUE} may"):
    Heard(engine, [job(PROMPTS[0], 20) for _ in range(QUEUE)])
  engine.cancel(heard.tickets)


@pytest.mark.parametrize(
  ("ids", "new", "message"),
  [([], 1, "empty"), ([V], 1, "outside"), ([-1], 1, "outside"), ([1] * 30, CAPACITY, "fit")],
)
def test_what_cannot_be_is_refused_before_it_waits(engine, ids, new, message):
  with pytest.raises(ConfigError, match=message):
    Heard(engine, [job([1], 1), job(ids, new)])
  assert engine.status()["waiting"] == 0


class Flaky:
  """Rows that cannot be read now and then."""

  def __init__(self, source):
    self.source, self.fail = source, threading.Event()

  def start(self, *args):
    return self.source.start(*args)

  def on_demand(self, *args):
    if self.fail.is_set():
      self.fail.clear()
      raise StorageError("rows: the file has gone")
    return self.source.on_demand(*args)


def test_rows_that_cannot_be_read_fail_the_requests_that_run_and_no_others(decoder):
  flaky = Flaky(decoder.source)
  with small_engine(decoder.with_source(flaky)) as engine:
    running = Heard(engine, [job(PROMPTS[0], 20)])
    running.next()
    flaky.fail.set()
    running.wait()
    assert "the file has gone" in running.events[0][-1].message
    after = Heard(engine, [job(PROMPTS[0], 8)]).wait()
    assert after.ids() == alone(decoder, PROMPTS[0], Sampling(), 8)
    status = engine.status()
  assert (status["status"], status["failures"]) == ("ok", 1)
  assert "the file has gone" in status["last_failure"]


def test_an_engine_that_cannot_go_on_says_so_and_leaves_nobody_waiting(decoder, monkeypatch):
  with small_engine(decoder) as engine:
    running = Heard(engine, [job(PROMPTS[0], 20) for _ in range(SLOTS + 2)])
    running.next()

    def gone(*_):
      raise MemoryError("no memory is left")

    monkeypatch.setattr(engine._slots, "step", gone)
    monkeypatch.setattr(decoder, "empty", gone)
    running.wait()
    assert all(isinstance(events[-1], Failed) for events in running.events)
    with pytest.raises(EngineDown, match="no memory is left"):
      Heard(engine, [job(PROMPTS[0])])
    assert "no memory is left" in engine.status()["status"]


def test_a_listener_that_fails_loses_its_request_alone(engine, decoder):
  def deaf(_, event):
    raise RuntimeError("the loop is closed")

  engine.submit([job(PROMPTS[0], 20)], deaf)
  assert Heard(engine, [job(PROMPTS[3], 8)]).wait().ids() == alone(
    decoder, PROMPTS[3], Sampling(), 8
  )


def test_closing_tells_everyone(decoder):
  with small_engine(decoder) as engine:
    heard = Heard(engine, [job(PROMPTS[0], 20) for _ in range(SLOTS + 2)])
    heard.next()
    engine.close()
    heard.wait()
    assert any(e == [Failed("the server is stopping")] for e in heard.events)
    with pytest.raises(EngineDown, match="stopping"):
      Heard(engine, [job(PROMPTS[0])])


def test_a_diverged_model_fails_its_requests_and_says_why(decoder):
  with small_engine(diverged(decoder)) as engine:
    heard = Heard(engine, [job(PROMPTS[0])]).wait()
  assert not heard.ids()
  assert "not finite" in heard.events[0][-1].message
