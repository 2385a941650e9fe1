"""The server refuses bad requests with 4xx and a message; 503 is for a failed engine."""

import asyncio
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_model import V
from small_server import (
  CAPACITY,
  QUEUE,
  Client,
  EventLog,
  make_request,
  small_decoder,
  small_engine,
  small_tokenizer,
)

from engram_jax.serve import api
from engram_jax.serve.api import Service
from engram_jax.serve.prompts import PromptEncoder
from engram_jax.serve.responses import ResponseBuilder
from engram_jax.serve.schema import CompletionBody
from engram_jax.serve.server import warm_up

KEY = "a key that is long enough"


@pytest.fixture(scope="module")
def engine():
  with small_engine(small_decoder()) as engine:
    warm_up(engine)
    yield engine


@pytest.fixture(scope="module")
def encoder():
  return PromptEncoder(small_tokenizer())


@pytest.fixture(scope="module")
def client(engine, encoder):
  return Client(Service(engine, encoder, "small"))


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


def assert_refused(response, statuses=(400, 404)):
  assert response.status_code in statuses, response.text[:300]
  error = response.json()["error"]
  assert set(error) == {"message", "type", "param", "code"}
  assert error["message"]
  assert len(error["message"]) < 1000
  return error["message"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_hostile_bodies_are_refused(client, path, name):
  headers = {"content-type": "application/json"}
  assert_refused(client.request("POST", path, content=HOSTILE[name], headers=headers))


@pytest.mark.parametrize("echo", [{}, {"echo": True}, {"echo": True, "logprobs": 1}], ids=str)
@pytest.mark.parametrize("fields", BAD_FIELDS, ids=lambda x: str(x)[:40])
def test_bad_fields_of_a_completion_are_refused(client, fields, echo):
  body = fields if not fields or "prompt" in fields else {"prompt": "ab"} | fields
  assert_refused(client.post("/v1/completions", echo | body))


def test_a_response_of_very_many_scores_is_refused(client, monkeypatch):
  limit = 2 * (1 + 20) * (2 + 5)
  body = {"prompt": ["ab", "cd"], "max_tokens": 5, "logprobs": 20, "echo": True}
  monkeypatch.setattr(api, "MAX_SCORES", limit)
  assert client.post("/v1/completions", body).status_code == 200
  monkeypatch.setattr(api, "MAX_SCORES", limit - 1)
  assert "send fewer prompts" in assert_refused(client.post("/v1/completions", body))
  assert client.post("/v1/completions", body | {"logprobs": None}).status_code == 200


def test_chunks_are_made_for_streams_alone(engine, encoder):
  """The scores of a long prompt, whose JSON takes long to make, are made once."""
  body = CompletionBody(prompt="ab", echo=True, logprobs=2)
  (request,) = encoder.completion_requests(body, CAPACITY)
  (events,) = EventLog(engine, [request]).wait().events
  builder = ResponseBuilder(body, [request], encoder, "small")
  assert [builder.add(0, event) for event in events] == [None] * len(events)
  assert len(builder.response()["choices"][0]["logprobs"]["tokens"]) == 2 + 16


@pytest.mark.parametrize("fields", BAD_CHATS, ids=lambda x: str(x)[:40])
def test_bad_fields_of_a_chat_are_refused(client, fields):
  body = {"messages": [{"role": "user", "content": "a"}]} | fields
  text = json.dumps(body)  # spells surrogates as escapes
  headers = {"content-type": "application/json"}
  assert_refused(client.request("POST", "/v1/chat/completions", content=text, headers=headers))


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
def test_any_json_is_answered_or_refused(client, body, prompt):
  """The server itself never fails."""
  for path, fields in (
    ("/v1/completions", body | {"prompt": prompt}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]} | body),
  ):
    headers = {"content-type": "application/json"}
    response = client.request("POST", path, content=json.dumps(fields), headers=headers)
    assert response.status_code in (200, 400, 404), (fields, response.text[:300])


def test_messages_name_the_field_and_the_valid_values(client):
  message = lambda **body: assert_refused(client.post("/v1/completions", {"prompt": "ab"} | body))
  assert message(temperature=3) == "temperature: Input should be less than or equal to 2"
  assert message(logit_bias=1) == "logit_bias: is not a field of this request"
  assert "token id 60 is outside the vocabulary: 0..59" in message(prompt=[60])
  assert f"do not fit in the {CAPACITY}" in message(max_tokens=CAPACITY)
  assert "'another'" in message(model="another")


def test_unknown_paths_and_methods_are_refused(client):
  assert_refused(client.get("/v1/nothing"))
  assert_refused(client.get("/v1/models/another"))
  assert_refused(client.get("/v1/completions"), (405,))
  assert_refused(client.request("POST", "/v1/completions", content=b"a=1"))


def test_a_long_body_is_refused(engine, encoder):
  client = Client(Service(engine, encoder, "small", max_body=1000))
  long = json.dumps({"prompt": "a" * 1000})
  headers = {"content-type": "application/json"}

  async def body_chunks():
    for _ in range(20):
      yield long.encode()

  for content in (long, body_chunks()):
    response = client.request("POST", "/v1/completions", content=content, headers=headers)
    assert "1,000 bytes" in assert_refused(response, (413,))


def test_a_body_that_does_not_arrive_times_out(engine, encoder):
  client = Client(Service(engine, encoder, "small", timeout=0.05))

  async def forever():
    yield b'{"prompt"'
    await asyncio.sleep(60)

  assert_refused(client.request("POST", "/v1/completions", content=forever()), (408,))


def test_the_api_key_is_required(engine, encoder):
  client = Client(Service(engine, encoder, "small", api_key=KEY))
  right = {"authorization": f"Bearer {KEY}"}
  for headers in ({}, {"authorization": KEY}, {"authorization": f"Bearer {KEY}x"}):
    for path in ("/v1/models", "/v1/nothing", "/openapi.json", "/OPENAPI.json"):
      assert_refused(client.get(path, headers=headers), (401,))
    assert_refused(client.post("/v1/completions", {"prompt": "a"}, headers=headers), (401,))
  latin = {"authorization": "Bearer é".encode("latin-1")}
  assert_refused(client.get("/v1/models", headers=latin), (401,))
  for path in ("/v1/models", "/openapi.json"):
    assert client.get(path, headers=right).status_code == 200
  assert client.get("/health").status_code == 200
  assert client.get("/").status_code == 200


def test_failures_are_shown_only_with_the_key(encoder):
  """Their messages may name files of the machine."""
  with small_engine() as engine:
    engine._last_failure = "OSError: /home/me/table"
    client = Client(Service(engine, encoder, "small", api_key=KEY))
    right = {"headers": {"authorization": f"Bearer {KEY}"}}
    assert "/home/me" in client.get("/health", **right).text
    assert "/home/me" not in client.get("/health").text
    assert "/home/me" in Client(Service(engine, encoder, "small")).get("/health").text
    engine.close("cannot go on: /home/me/table")
    assert "/home/me" not in client.get("/health").text
    assert client.get("/health").status_code == 503
    assert client.get("/health").json()["status"] == "down"


def test_a_body_of_very_many_chunks_takes_linear_time(engine, encoder):
  """100,000 chunks arrive within the time limit; copying each with all before it would not."""
  client = Client(Service(engine, encoder, "small", timeout=5))

  async def body_chunks():
    yield b'{"prompt": "ab", "max_tokens": 1'
    for _ in range(100_000):
      yield b" "
    yield b"}"

  headers = {"content-type": "application/json"}
  response = client.request("POST", "/v1/completions", content=body_chunks(), headers=headers)
  assert response.status_code == 200


def test_other_host_names_are_refused(client, engine, encoder):
  for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
    assert_refused(client.get("/v1/models", headers={"host": host}), (403,))
  for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_a_full_queue_is_429(engine, encoder, client):
  log = EventLog(engine, [make_request([1], 30) for _ in range(QUEUE)])
  busy = EventLog(engine, [])
  responses = [client.post("/v1/completions", {"prompt": ["a"] * QUEUE, "max_tokens": 1})]
  engine.cancel([*log.handles, *busy.handles])
  assert "ask again" in assert_refused(responses[0], (429,))
  assert responses[0].headers["retry-after"] == "1"
  assert client.complete(max_tokens=2)["choices"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_engine_is_503(encoder, engine, monkeypatch, stream):
  client = Client(Service(engine, encoder, "small"))

  def broken(*_):
    raise OSError("the disk has gone")

  monkeypatch.setattr(engine._slots, "step", broken)
  body = {"prompt": "a", "stream": stream}
  response = client.post("/v1/completions", body)
  assert "the disk has gone" in assert_refused(response, (503,))
  assert client.complete(max_tokens=2)["choices"]  # on a fresh state


def test_a_failure_in_the_middle_of_a_stream_is_in_the_stream(encoder, engine, monkeypatch):
  client, step, count = Client(Service(engine, encoder, "small")), engine._slots.step, []

  def broken_later(*args):
    count.append(0)
    if len(count) == 4:
      raise OSError("the disk has gone")
    return step(*args)

  monkeypatch.setattr(engine._slots, "step", broken_later)
  *chunks, error = client.complete(max_tokens=9, stream=True)
  assert len(chunks) == 3
  assert "the disk has gone" in error["error"]["message"]


def test_an_engine_that_is_closed_is_503_at_once(encoder):
  with small_engine() as closed:
    pass
  client = Client(Service(closed, encoder, "small"))
  assert_refused(client.post("/v1/completions", {"prompt": "a"}), (503,))
  assert client.get("/health").status_code == 503
