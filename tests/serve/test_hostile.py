"""What the server refuses, and how it says so: always 4xx, or 503 where the engine has failed."""

import asyncio
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import CAPACITY, QUEUE, Client, Heard, job, small_decoder, small_engine, small_tokenizer
from speaker import V

from engram_jax.serve import api as app
from engram_jax.serve.api import Service
from engram_jax.serve.prompts import Words
from engram_jax.serve.responses import Answer
from engram_jax.serve.schema import CompletionBody
from engram_jax.serve.server import warm

KEY = "a key that is long enough"


@pytest.fixture(scope="module")
def engine():
  with small_engine(small_decoder()) as engine:
    warm(engine)
    yield engine


@pytest.fixture(scope="module")
def words():
  return Words(small_tokenizer())


@pytest.fixture(scope="module")
def client(engine, words):
  return Client(Service(engine, words, "small"))


def nested(depth):
  return "[" * depth + "]" * depth


HOSTILE = {
  "no body": b"",
  "no json": b"{",
  "not utf-8": b'{"prompt": "\xff\xfe"}',
  "deep": b'{"prompt": ' + nested(100_000).encode() + b"}",
  "deep elsewhere": b'{"prompt": "a", "x": ' + nested(900).encode() + b"}",
  "endless digits": b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
  "a list": b"[1]",
  "a number": b"1",
  "null": b"null",
  "surrogate": b'{"prompt": "\\ud800"}',
  "surrogate in a stop": b'{"prompt": "a", "stop": "\\udfff"}',
  "surrogate in a name": b'{"prompt": "a", "\\ud800": 1}',
  "surrogate in the model": b'{"prompt": "a", "model": "\\ud800"}',
  "nan": b'{"prompt": "a", "temperature": NaN}',
  "infinity": b'{"prompt": "a", "temperature": Infinity}',
  "infinite by its exponent": b'{"prompt": "a", "temperature": 1e999}',
}
BAD_FIELDS = [
  {},
  {"prompt": ""},
  {"prompt": []},
  {"prompt": [[]]},
  {"prompt": None},
  {"prompt": 3},
  {"prompt": {"a": 1}},
  {"prompt": [1.5]},
  {"prompt": [True]},
  {"prompt": ["a", 1]},
  {"prompt": ["a", [1]]},
  {"prompt": ["a", ""]},
  {"prompt": [-1]},
  {"prompt": [V]},
  {"prompt": [2**32]},
  {"prompt": [[1], [-1]]},
  {"prompt": [10**30]},
  {"prompt": [[1], [V]]},
  {"prompt": ["a"] * 129},
  {"prompt": "日"},  # nothing of it in the small vocabulary
  {"prompt": "a" * (CAPACITY + 1)},
  {"prompt": "a" * 1_000_000},
  {"prompt": [1] * 100_000},
  {"max_tokens": CAPACITY},
  {"max_tokens": -1},
  {"max_tokens": 2**31},
  {"max_tokens": 10**30},
  {"max_tokens": 1.5},
  {"max_tokens": "5"},
  {"max_tokens": True},
  {"temperature": -0.1},
  {"temperature": 2.1},
  {"temperature": 10**400},
  {"temperature": "hot"},
  {"top_p": 0},
  {"top_p": 1.1},
  {"top_p": -1},
  {"top_k": -2},
  {"top_k": 2**31},
  {"top_k": 0.5},
  {"repetition_penalty": 0},
  {"repetition_penalty": -1},
  {"repetition_penalty": 1e30},
  {"presence_penalty": 0.5},
  {"seed": 2**63},
  {"seed": "x"},
  {"n": 0},
  {"n": 17},
  {"n": QUEUE, "prompt": ["a", "b"]},  # more than may ever wait
  {"n": -(10**20)},
  {"stop": ""},
  {"stop": ["a"] * 17},
  {"stop": [1]},
  {"stop": {}},
  {"stop": "a" * 257},
  {"logprobs": 21},
  {"logprobs": -1},
  {"logprobs": True},
  {"stream": "yes"},
  {"stream_options": []},
  {"echo": 1},
  {"gates": "x"},
  {"model": 1},
  {"model": "another"},
  {"user": 1},
  {"logit_bias": {"1": 5}},
  {"prompt_": 1},
]
BAD_CHATS = [
  {"messages": []},
  {"messages": None},
  {"messages": "hi"},
  {"messages": [1]},
  {"messages": [{}]},
  {"messages": [{"role": "user"}]},
  {"messages": [{"role": "user", "content": None}]},
  {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
  {"messages": [{"role": "user", "content": "\ud800"}]},
  {"messages": [{"role": "root", "content": "x"}]},
  {"messages": [{"role": "user", "content": "x" * 100}]},
  {"messages": [{"role": "user", "content": "x"}] * 1025},
  {"max_tokens": CAPACITY},
  {"max_completion_tokens": -1},
  {"top_logprobs": 21},
  {"logprobs": 3},
]


def refused(answer, statuses=(400, 404)):
  assert answer.status_code in statuses, answer.text[:300]
  error = answer.json()["error"]
  assert set(error) == {"message", "type", "param", "code"}
  assert error["message"]
  assert len(error["message"]) < 1000
  return error["message"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_hostile_bodies(client, path, name):
  headers = {"content-type": "application/json"}
  refused(client.request("POST", path, content=HOSTILE[name], headers=headers))


@pytest.mark.parametrize("echo", [{}, {"echo": True}, {"echo": True, "logprobs": 1}], ids=str)
@pytest.mark.parametrize("fields", BAD_FIELDS, ids=lambda x: str(x)[:40])
def test_bad_fields_of_a_completion(client, fields, echo):
  body = fields if not fields or "prompt" in fields else {"prompt": "ab"} | fields
  refused(client.post("/v1/completions", echo | body))


def test_an_answer_of_very_many_numbers_is_refused(client, monkeypatch):
  most = 2 * (1 + 20) * (2 + 5)
  asked = {"prompt": ["ab", "cd"], "max_tokens": 5, "logprobs": 20, "echo": True}
  monkeypatch.setattr(app, "MAX_SCORES", most)
  assert client.post("/v1/completions", asked).status_code == 200
  monkeypatch.setattr(app, "MAX_SCORES", most - 1)
  assert "send fewer prompts" in refused(client.post("/v1/completions", asked))
  assert client.post("/v1/completions", asked | {"logprobs": None}).status_code == 200


def test_chunks_are_made_for_streams_alone(engine, words):
  """A long prompt's scores, whose form is long to make, are made once."""
  body = CompletionBody(prompt="ab", echo=True, logprobs=2)
  (made,) = words.completion_jobs(body, CAPACITY)
  (events,) = Heard(engine, [made]).wait().events
  answer = Answer(body, [made], words, "small")
  assert [answer.add(0, event) for event in events] == [None] * len(events)
  assert len(answer.whole()["choices"][0]["logprobs"]["tokens"]) == 2 + 16


@pytest.mark.parametrize("fields", BAD_CHATS, ids=lambda x: str(x)[:40])
def test_bad_fields_of_a_chat(client, fields):
  body = {"messages": [{"role": "user", "content": "a"}]} | fields
  text = json.dumps(body)  # spells surrogates as escapes
  headers = {"content-type": "application/json"}
  refused(client.request("POST", "/v1/chat/completions", content=text, headers=headers))


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
  lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3),
  max_leaves=6,
)
FIELDS = ["model", "n", "temperature", "top_p", "top_k", "seed", "stop", "stream", "logprobs"]
FIELDS += [
  "stream_options",
  "repetition_penalty",
  "echo",
  "gates",
  "messages",
  "user",
  "max_tokens",
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), prompt=JSON | st.just("ab"))
def test_any_json_at_all(client, body, prompt):
  """Right or refused, and never a failure of the server."""
  for path, fields in (
    ("/v1/completions", body | {"prompt": prompt}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]} | body),
  ):
    headers = {"content-type": "application/json"}
    answer = client.request("POST", path, content=json.dumps(fields), headers=headers)
    assert answer.status_code in (200, 400, 404), (fields, answer.text[:300])


def test_messages_name_the_field_and_what_would_be_valid(client):
  say = lambda **body: refused(client.post("/v1/completions", {"prompt": "ab"} | body))
  assert say(temperature=3) == "temperature: Input should be less than or equal to 2"
  assert say(logit_bias=1) == "logit_bias: is not a field of this request"
  assert "token id 60 is outside the vocabulary: 0..59" in say(prompt=[60])
  assert f"do not fit in the {CAPACITY}" in say(max_tokens=CAPACITY)
  assert "'another'" in say(model="another")


def test_places_that_are_not_there(client):
  refused(client.get("/v1/nothing"))
  refused(client.get("/v1/models/another"))
  refused(client.get("/v1/completions"), (405,))
  refused(client.request("POST", "/v1/completions", content=b"a=1"))


def test_a_long_body_is_refused_without_being_kept(engine, words):
  client = Client(Service(engine, words, "small", max_body=1000))
  long = json.dumps({"prompt": "a" * 1000})
  headers = {"content-type": "application/json"}

  async def parts():
    for _ in range(20):
      yield long.encode()

  for content in (long, parts()):
    answer = client.request("POST", "/v1/completions", content=content, headers=headers)
    assert "1,000 bytes" in refused(answer, (413,))


def test_a_body_that_never_comes_is_not_waited_for(engine, words):
  client = Client(Service(engine, words, "small", timeout=0.05))

  async def forever():
    yield b'{"prompt"'
    await asyncio.sleep(60)

  refused(client.request("POST", "/v1/completions", content=forever()), (408,))


def test_the_api_key(engine, words):
  client = Client(Service(engine, words, "small", api_key=KEY))
  right = {"authorization": f"Bearer {KEY}"}
  for headers in ({}, {"authorization": KEY}, {"authorization": f"Bearer {KEY}x"}):
    for path in ("/v1/models", "/v1/nothing", "/openapi.json", "/OPENAPI.json"):
      refused(client.get(path, headers=headers), (401,))
    refused(client.post("/v1/completions", {"prompt": "a"}, headers=headers), (401,))
  latin = {"authorization": "Bearer é".encode("latin-1")}
  refused(client.get("/v1/models", headers=latin), (401,))
  for path in ("/v1/models", "/openapi.json"):
    assert client.get(path, headers=right).status_code == 200
  assert client.get("/health").status_code == 200
  assert client.get("/").status_code == 200


def test_what_failed_is_told_to_those_with_the_key_alone(words):
  """It may name files of the machine."""
  with small_engine() as engine:
    engine._last_failure = "OSError: /home/me/table"
    client = Client(Service(engine, words, "small", api_key=KEY))
    right = {"headers": {"authorization": f"Bearer {KEY}"}}
    assert "/home/me" in client.get("/health", **right).text
    assert "/home/me" not in client.get("/health").text
    assert "/home/me" in Client(Service(engine, words, "small")).get("/health").text
    engine.close("cannot go on: /home/me/table")
    assert "/home/me" not in client.get("/health").text
    assert client.get("/health").status_code == 503
    assert client.get("/health").json()["status"] == "down"


def test_a_body_of_very_many_parts_takes_no_longer_for_it(engine, words):
  """Each part was once copied with all before it."""
  client = Client(Service(engine, words, "small", timeout=5))

  async def parts():
    yield b'{"prompt": "ab", "max_tokens": 1'
    for _ in range(100_000):
      yield b" "
    yield b"}"

  headers = {"content-type": "application/json"}
  answer = client.request("POST", "/v1/completions", content=parts(), headers=headers)
  assert answer.status_code == 200


def test_pages_of_other_sites_cannot_call_under_their_own_name(client, engine, words):
  for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
    refused(client.get("/v1/models", headers={"host": host}), (403,))
  for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_a_full_queue_is_429(engine, words, client):
  heard = Heard(engine, [job([1], 30) for _ in range(QUEUE)])
  busy = Heard(engine, [])
  answers = [client.post("/v1/completions", {"prompt": ["a"] * QUEUE, "max_tokens": 1})]
  engine.cancel([*heard.tickets, *busy.tickets])
  assert "ask again" in refused(answers[0], (429,))
  assert answers[0].headers["retry-after"] == "1"
  assert client.complete(max_tokens=2)["choices"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_engine_is_503(words, engine, monkeypatch, stream):
  client = Client(Service(engine, words, "small"))

  def broken(*_):
    raise OSError("the disk has gone")

  monkeypatch.setattr(engine._slots, "step", broken)
  body = {"prompt": "a", "stream": stream}
  answer = client.post("/v1/completions", body)
  assert "the disk has gone" in refused(answer, (503,))
  assert client.complete(max_tokens=2)["choices"]  # on a fresh state


def test_a_failure_in_the_middle_of_a_stream_is_said_in_it(words, engine, monkeypatch):
  client, step, count = Client(Service(engine, words, "small")), engine._slots.step, []

  def broken_later(*args):
    count.append(0)
    if len(count) == 4:
      raise OSError("the disk has gone")
    return step(*args)

  monkeypatch.setattr(engine._slots, "step", broken_later)
  *parts, error = client.complete(max_tokens=9, stream=True)
  assert len(parts) == 3
  assert "the disk has gone" in error["error"]["message"]


def test_an_engine_that_is_closed_is_503_at_once(words):
  with small_engine() as closed:
    pass
  client = Client(Service(closed, words, "small"))
  refused(client.post("/v1/completions", {"prompt": "a"}), (503,))
  assert client.get("/health").status_code == 503
