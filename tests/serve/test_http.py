"""The OpenAI API in front of the small model, in this process."""

import math

import numpy as np
import pytest
import tokenizers
from small_server import (
  CAPACITY,
  Client,
  EventLog,
  make_request,
  small_decoder,
  small_engine,
  small_tokenizer,
)

from engram_jax.errors import ConfigError
from engram_jax.inference.sampling import Sampling
from engram_jax.serve.api import Service
from engram_jax.serve.prompts import PromptEncoder
from engram_jax.serve.schema import CompletionBody
from engram_jax.serve.server import warm_up

TEMPLATE = """\
{% for m in messages %}
{% if m.role == 'developer' %}{{ raise_exception('no developers') }}{% endif %}
{% if m.role == 'system' %}{{ 1 + m.content }}{% endif %}
{{- m.role }}|{{ m.content }}{{ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}a:{% endif %}"""


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


def generate_alone(engine, text, count, **options):
  ids = small_tokenizer().encode(text).ids
  return EventLog(engine, [make_request(ids, count, **options)]).wait()


def test_a_completion_has_its_text_and_usage(client, engine):
  response = client.complete(max_tokens=7)
  assert response["object"] == "text_completion"
  assert response["model"] == "small"
  (choice,) = response["choices"]
  assert choice["text"] == generate_alone(engine, "the capital", 7).text()
  assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
  assert response["usage"] == {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}


def test_several_prompts_have_several_choices_each(client):
  one = client.complete("ab", temperature=1.5, seed=3, max_tokens=6)["choices"]
  both = client.complete(["ab", "cd"], n=2, temperature=1.5, seed=3, max_tokens=6)
  texts = [c["text"] for c in both["choices"]]
  assert [c["index"] for c in both["choices"]] == [0, 1, 2, 3]
  assert texts[0] == one[0]["text"]
  assert (
    texts[1] == client.complete("ab", temperature=1.5, seed=4, max_tokens=6)["choices"][0]["text"]
  )
  assert len(set(texts)) == 4
  assert both["usage"] == {"prompt_tokens": 4, "completion_tokens": 24, "total_tokens": 28}


def test_token_ids_are_a_prompt(client):
  ids = small_tokenizer().encode("the capital").ids
  texts = [
    [c["text"] for c in client.complete(prompt)["choices"]]
    for prompt in ("the capital", ids, [ids, ids])
  ]
  assert texts[0] == texts[1]
  assert texts[2] == texts[0] * 2


def test_without_a_seed_choices_differ(client):
  texts = {client.complete(temperature=2, max_tokens=12)["choices"][0]["text"] for _ in range(4)}
  assert len(texts) > 1


def test_a_stream_adds_up_to_the_response(client):
  full = client.complete(["the capital", "of"], n=2, max_tokens=9, logprobs=2, gates=True)
  chunks = client.complete(
    ["the capital", "of"],
    n=2,
    max_tokens=9,
    logprobs=2,
    gates=True,
    stream=True,
    stream_options={"include_usage": True},
  )
  assert chunks[-1]["usage"] == full["usage"]
  assert len({chunk["id"] for chunk in chunks}) == 1
  for i, choice in enumerate(full["choices"]):
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == i]
    assert "".join(c["text"] for c in choices) == choice["text"]
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == choice["finish_reason"]
    for name, values in choice["logprobs"].items():
      assert [x for c in choices for x in c["logprobs"][name]] == values
    assert [x for c in choices for x in c["engram"]["tokens"]] == choice["engram"]["tokens"]


def test_echo_scores_the_prompt_as_evaluation_harnesses_expect(client, engine):
  """max_tokens is 0, or 1 as lm_eval sends: tokens, their log-probabilities and offsets."""
  text = "the capital of"
  (choice,) = client.complete(text, max_tokens=0, echo=True, logprobs=1)["choices"]
  assert choice["text"] == text
  logprobs = choice["logprobs"]
  assert logprobs["tokens"] == list(text)
  assert logprobs["text_offset"] == list(range(len(text)))
  assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
  expected = generate_alone(engine, text, 0, top=1, score_prompt=True).prompt()
  assert logprobs["token_logprobs"][1:] == [t.logprob for t in expected[1:]]
  for token, logprob, top in list(zip(*list(logprobs.values())[:3], strict=True))[1:]:
    assert top[token] == logprob <= max(top.values()) < 0  # what lm_eval's is_greedy compares
  (more,) = client.complete(text, max_tokens=1, echo=True, logprobs=1)["choices"]
  assert more["text"].startswith(text)
  np.testing.assert_allclose(
    more["logprobs"]["token_logprobs"][1:-1], logprobs["token_logprobs"][1:], atol=1e-6
  )
  assert more["logprobs"]["text_offset"] == list(range(len(text) + 1))
  (plain,) = client.complete(text, max_tokens=1, echo=True)["choices"]
  assert plain["text"] == more["text"]


def test_the_last_token_is_scored_even_if_it_ends_the_text(client, encoder, engine):
  """lm_eval leaves out the last entry of an response of one new token, whatever that token is."""
  text = "the capital of"
  body = {"max_tokens": 1, "echo": True, "logprobs": 1}
  (free,) = client.complete(text, **body)["choices"]
  (end,) = generate_alone(engine, text, 1).ids()
  with small_engine(engine.decoder, stop_ids=[end]) as stopping:
    stopped = Client(Service(stopping, encoder, "small")).complete(text, **body)
  (choice,) = stopped["choices"]
  assert choice["logprobs"] == free["logprobs"]
  assert (choice["text"], choice["finish_reason"]) == (text, "stop")
  assert stopped["usage"]["completion_tokens"] == 1


def test_offsets_do_not_depend_on_text_held_back(client):
  body = {"max_tokens": 12, "logprobs": 0, "echo": True}
  (free,) = client.complete(**body)["choices"]
  text = free["text"].removeprefix("the capital")
  (choice,) = client.complete(**body, stop=[text[2:5] + "\0", text[4:] + "\0"])["choices"]
  assert choice == free
  assert free["logprobs"]["text_offset"][: 11 + 1] == list(range(12))


def test_nulls_count_as_absent(client):
  """OpenAI's schema allows them nearly everywhere, and clients send them."""
  names = ("n", "temperature", "top_p", "top_k", "stop", "stream", "stream_options", "max_tokens")
  names += ("echo", "logprobs", "gates", "seed", "presence_penalty", "user", "model")
  nulls = dict.fromkeys(names)
  complete = lambda **body: client.post(
    "/v1/completions", {"prompt": "ab", "seed": 3} | body
  ).json()
  (null,) = complete(**nulls | {"seed": 3})["choices"]
  assert null == complete()["choices"][0]
  options = {"stream": True, "max_tokens": 1, "stream_options": {"include_usage": None}}
  assert all(chunk["choices"] for chunk in client.complete("ab", **options))
  chat = {"messages": [{"role": "user", "content": "a", "name": None}], "max_tokens": 2}
  response = client.post("/v1/chat/completions", chat | {"logprobs": None, "top_logprobs": None})
  assert response.status_code == 200


def test_text_is_tokenised_as_for_training():
  """A tokenizer's post-processor adds nothing."""
  tokenizer = small_tokenizer()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
  )
  assert tokenizer.encode("ab").ids == [0, 1, 2]
  (request,) = PromptEncoder(tokenizer).completion_requests(CompletionBody(prompt="ab"), CAPACITY)
  assert request.ids == (1, 2)


def test_characters_of_several_tokens_are_complete(client):
  """é is two ids here: each has its place, and the text is full."""
  (choice,) = client.complete("é é", max_tokens=0, echo=True, logprobs=0)["choices"]
  assert choice["text"] == "é é"
  assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2, 2]
  assert choice["logprobs"]["top_logprobs"] is None


def test_stop_strings_cut_the_text(client):
  full = client.complete(max_tokens=12)["choices"][0]["text"]
  for stop in (full[4:6], [full[4:6], "never"]):
    (choice,) = client.complete(max_tokens=12, stop=stop)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (full[: full.index(full[4:6])], "stop")


def test_chat_without_a_template_is_lines_of_role_and_text(client, engine):
  expected = generate_alone(engine, "system: be\nuser: hi\nassistant:", 2)
  response = client.chat(("system", "be"), ("user", "hi"), max_tokens=2)
  (choice,) = response["choices"]
  assert choice["message"] == {"role": "assistant", "content": expected.text()}
  assert response["object"] == "chat.completion"


def test_a_chat_without_a_limit_fills_the_capacity(client):
  response = client.chat(("user", "hi"))
  usage = response["usage"]
  assert response["choices"][0]["finish_reason"] == "length"
  assert usage["total_tokens"] == CAPACITY


def test_a_streamed_chat_adds_up_to_the_response(client):
  full = client.chat(("user", "hi"), max_tokens=6, logprobs=True, top_logprobs=2)
  first, *chunks = client.chat(
    ("user", "hi"), max_tokens=6, logprobs=True, top_logprobs=2, stream=True
  )
  assert first["object"] == "chat.completion.chunk"
  assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
  (choice,) = full["choices"]
  text = "".join(p["choices"][0]["delta"].get("content", "") for p in chunks)
  assert text == choice["message"]["content"]
  content = [x for p in chunks for x in p["choices"][0]["logprobs"]["content"]]
  assert content == choice["logprobs"]["content"]
  assert len(content) == 6
  for token in content:
    assert bytes(token["bytes"]).decode() == token["token"]
    assert len(token["top_logprobs"]) == 2
    assert token["top_logprobs"][0]["logprob"] >= token["logprob"]


def test_a_chat_template_makes_the_prompt(engine):
  encoder = PromptEncoder(small_tokenizer(), TEMPLATE, {"eos_token": "<|endoftext|>"})
  client = Client(Service(engine, encoder, "small"))
  response = client.chat(("user", "hi"), ("assistant", "yo"), max_tokens=4)
  ids = []
  for text in ("user|hi", "assistant|yo"):
    ids += [*small_tokenizer().encode(text).ids, 0]
  expected = EventLog(engine, [make_request([*ids, *small_tokenizer().encode("a:").ids], 4)]).wait()
  assert response["choices"][0]["message"]["content"] == expected.text()
  for turn, message in (
    (("user", "hi<|endoftext|>"), "messages[0]: content holds the special token"),
    (("developer", "hi"), "no developers"),
    (("system", "hi"), "unsupported operand"),
  ):
    body = {"messages": [{"role": turn[0], "content": turn[1]}]}
    response = client.post("/v1/chat/completions", body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_a_template_is_sandboxed_and_a_broken_one_refused():
  with pytest.raises(ConfigError, match="chat template: line 1"):
    PromptEncoder(small_tokenizer(), "{% for %}")


def test_models_and_health_are_described(client):
  (model,) = client.get("/v1/models").json()["data"]
  assert (model["id"], model["object"]) == ("small", "model")
  assert model["engram"] == {"layers": [1, 2], "capacity": CAPACITY}
  assert client.get("/v1/models/small").json() == model
  health = client.get("/health")
  assert health.status_code == 200
  assert health.json()["status"] == "ok"
  schemas = client.get("/openapi.json").json()["components"]["schemas"]
  assert {"prompt", "top_k", "gates"} <= set(schemas["CompletionBody"]["properties"])


def test_the_page_loads_nothing_from_other_sites(client):
  page = client.get("/")
  assert page.headers["content-type"].startswith("text/html")
  assert "default-src 'none'" in page.headers["content-security-policy"]
  assert not [text for text in ("http:", "https:", "src=", "@import") if text in page.text]


def test_nan_scores_are_null(client, engine, monkeypatch):
  step = engine._slots.step

  def nan_step(*args):
    token_B, scores = step(*args)
    return token_B, scores._replace(logprobs=scores.logprobs * math.nan)

  monkeypatch.setattr(engine._slots, "step", nan_step)
  (choice,) = client.complete(max_tokens=3, logprobs=1)["choices"]
  assert choice["logprobs"]["token_logprobs"] == [None] * 3


def test_sampling_parameters_reach_the_engine(client, engine):
  parameters = {
    "temperature": 1.2,
    "top_k": 9,
    "top_p": 0.9,
    "repetition_penalty": 1.4,
    "seed": 2**32 + 5,
  }
  (choice,) = client.complete("the capital", max_tokens=8, **parameters)["choices"]
  sampling = Sampling(1.2, 9, 0.9, 1.4, 5)
  expected = generate_alone(engine, "the capital", 8, sampling=sampling)
  assert choice["text"] == expected.text()
