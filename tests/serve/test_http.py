"""The OpenAI API in front of the small model, in this process."""

import math

import numpy as np
import pytest
import tokenizers
from served import CAPACITY, Client, Heard, job, small_decoder, small_engine, small_tokenizer

from engram_jax.errors import ConfigError
from engram_jax.inference.sampling import Sampling
from engram_jax.serve.api import Service
from engram_jax.serve.prompts import Words
from engram_jax.serve.schema import CompletionBody
from engram_jax.serve.server import warm

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
    warm(engine)
    yield engine


@pytest.fixture(scope="module")
def words():
  return Words(small_tokenizer())


@pytest.fixture(scope="module")
def client(engine, words):
  return Client(Service(engine, words, "small"))


def said_alone(engine, text, count, **options):
  ids = small_tokenizer().encode(text).ids
  return Heard(engine, [job(ids, count, **options)]).wait()


def test_a_completion(client, engine):
  answer = client.complete(max_tokens=7)
  assert answer["object"] == "text_completion"
  assert answer["model"] == "small"
  (choice,) = answer["choices"]
  assert choice["text"] == said_alone(engine, "the capital", 7).text()
  assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
  assert answer["usage"] == {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}


def test_several_prompts_and_several_choices(client):
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


def test_a_stream_says_the_same(client):
  whole = client.complete(["the capital", "of"], n=2, max_tokens=9, logprobs=2, gates=True)
  parts = client.complete(
    ["the capital", "of"],
    n=2,
    max_tokens=9,
    logprobs=2,
    gates=True,
    stream=True,
    stream_options={"include_usage": True},
  )
  assert parts[-1]["usage"] == whole["usage"]
  assert len({part["id"] for part in parts}) == 1
  for i, choice in enumerate(whole["choices"]):
    mine = [c for part in parts for c in part["choices"] if c["index"] == i]
    assert "".join(c["text"] for c in mine) == choice["text"]
    assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
    assert mine[-1]["finish_reason"] == choice["finish_reason"]
    for name, values in choice["logprobs"].items():
      assert [x for c in mine for x in c["logprobs"][name]] == values
    assert [x for c in mine for x in c["engram"]["tokens"]] == choice["engram"]["tokens"]


def test_echo_scores_the_prompt_as_evaluation_harnesses_ask(client, engine):
  """max_tokens 0, or 1 as lm_eval does: its tokens, their log-probabilities, where they begin."""
  text = "the capital of"
  (choice,) = client.complete(text, max_tokens=0, echo=True, logprobs=1)["choices"]
  assert choice["text"] == text
  given = choice["logprobs"]
  assert given["tokens"] == list(text)
  assert given["text_offset"] == list(range(len(text)))
  assert (given["token_logprobs"][0], given["top_logprobs"][0]) == (None, None)
  expected = said_alone(engine, text, 0, top=1, score_prompt=True).prompt()
  assert given["token_logprobs"][1:] == [t.logprob for t in expected[1:]]
  for token, logprob, top in list(zip(*list(given.values())[:3], strict=True))[1:]:
    assert top[token] == logprob <= max(top.values()) < 0  # what lm_eval's is_greedy compares
  (more,) = client.complete(text, max_tokens=1, echo=True, logprobs=1)["choices"]
  assert more["text"].startswith(text)
  np.testing.assert_allclose(
    more["logprobs"]["token_logprobs"][1:-1], given["token_logprobs"][1:], atol=1e-6
  )
  assert more["logprobs"]["text_offset"] == list(range(len(text) + 1))
  (plain,) = client.complete(text, max_tokens=1, echo=True)["choices"]
  assert plain["text"] == more["text"]


def test_the_last_token_is_scored_even_where_it_ends_the_text(client, words, engine):
  """lm_eval leaves out the last entry of an answer of one new token, whatever that token is."""
  text = "the capital of"
  asked = {"max_tokens": 1, "echo": True, "logprobs": 1}
  (free,) = client.complete(text, **asked)["choices"]
  (end,) = said_alone(engine, text, 1).ids()
  with small_engine(engine.decoder, stop_ids=[end]) as stopping:
    stopped = Client(Service(stopping, words, "small")).complete(text, **asked)
  (choice,) = stopped["choices"]
  assert choice["logprobs"] == free["logprobs"]
  assert (choice["text"], choice["finish_reason"]) == (text, "stop")
  assert stopped["usage"]["completion_tokens"] == 1


def test_offsets_do_not_depend_on_what_is_held_back(client):
  asked = {"max_tokens": 12, "logprobs": 0, "echo": True}
  (free,) = client.complete(**asked)["choices"]
  said = free["text"].removeprefix("the capital")
  (choice,) = client.complete(**asked, stop=[said[2:5] + "\0", said[4:] + "\0"])["choices"]
  assert choice == free
  assert free["logprobs"]["text_offset"][: 11 + 1] == list(range(12))


def test_nulls_are_as_good_as_nothing(client):
  """OpenAI's schema allows them nearly everywhere, and clients send them."""
  names = ("n", "temperature", "top_p", "top_k", "stop", "stream", "stream_options", "max_tokens")
  names += ("echo", "logprobs", "gates", "seed", "presence_penalty", "user", "model")
  nothing = dict.fromkeys(names)
  ask = lambda **body: client.post("/v1/completions", {"prompt": "ab", "seed": 3} | body).json()
  (null,) = ask(**nothing | {"seed": 3})["choices"]
  assert null == ask()["choices"][0]
  options = {"stream": True, "max_tokens": 1, "stream_options": {"include_usage": None}}
  assert all(part["choices"] for part in client.complete("ab", **options))
  said = {"messages": [{"role": "user", "content": "a", "name": None}], "max_tokens": 2}
  chat = client.post("/v1/chat/completions", said | {"logprobs": None, "top_logprobs": None})
  assert chat.status_code == 200


def test_text_is_tokenised_as_for_training():
  """Whatever a tokenizer would put around it."""
  tokenizer = small_tokenizer()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
  )
  assert tokenizer.encode("ab").ids == [0, 1, 2]
  (made,) = Words(tokenizer).completion_jobs(CompletionBody(prompt="ab"), CAPACITY)
  assert made.ids == (1, 2)


def test_characters_of_several_tokens(client):
  """é is two ids here: each has its place, and the text is whole."""
  (choice,) = client.complete("é é", max_tokens=0, echo=True, logprobs=0)["choices"]
  assert choice["text"] == "é é"
  assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2, 2]
  assert choice["logprobs"]["top_logprobs"] is None


def test_stop_strings(client):
  whole = client.complete(max_tokens=12)["choices"][0]["text"]
  for stop in (whole[4:6], [whole[4:6], "never"]):
    (choice,) = client.complete(max_tokens=12, stop=stop)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(whole[4:6])], "stop")


def test_chat_without_a_template_is_lines_of_role_and_text(client, engine):
  expected = said_alone(engine, "system: be\nuser: hi\nassistant:", 2)
  answer = client.chat(("system", "be"), ("user", "hi"), max_tokens=2)
  (choice,) = answer["choices"]
  assert choice["message"] == {"role": "assistant", "content": expected.text()}
  assert answer["object"] == "chat.completion"


def test_a_chat_goes_on_until_the_room_ends(client):
  answer = client.chat(("user", "hi"))
  usage = answer["usage"]
  assert answer["choices"][0]["finish_reason"] == "length"
  assert usage["total_tokens"] == CAPACITY


def test_a_chat_streamed(client):
  whole = client.chat(("user", "hi"), max_tokens=6, logprobs=True, top_logprobs=2)
  first, *parts = client.chat(
    ("user", "hi"), max_tokens=6, logprobs=True, top_logprobs=2, stream=True
  )
  assert first["object"] == "chat.completion.chunk"
  assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
  (choice,) = whole["choices"]
  text = "".join(p["choices"][0]["delta"].get("content", "") for p in parts)
  assert text == choice["message"]["content"]
  content = [x for p in parts for x in p["choices"][0]["logprobs"]["content"]]
  assert content == choice["logprobs"]["content"]
  assert len(content) == 6
  for token in content:
    assert bytes(token["bytes"]).decode() == token["token"]
    assert len(token["top_logprobs"]) == 2
    assert token["top_logprobs"][0]["logprob"] >= token["logprob"]


def test_a_chat_template(engine):
  words = Words(small_tokenizer(), TEMPLATE, {"eos_token": "<|endoftext|>"})
  client = Client(Service(engine, words, "small"))
  answer = client.chat(("user", "hi"), ("assistant", "yo"), max_tokens=4)
  ids = []
  for text in ("user|hi", "assistant|yo"):
    ids += [*small_tokenizer().encode(text).ids, 0]
  expected = Heard(engine, [job([*ids, *small_tokenizer().encode("a:").ids], 4)]).wait()
  assert answer["choices"][0]["message"]["content"] == expected.text()
  for said, message in (
    (("user", "hi<|endoftext|>"), "messages[0]: content holds the special token"),
    (("developer", "hi"), "no developers"),
    (("system", "hi"), "unsupported operand"),
  ):
    body = {"messages": [{"role": said[0], "content": said[1]}]}
    answer = client.post("/v1/chat/completions", body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_a_template_is_sandboxed_and_a_broken_one_refused():
  with pytest.raises(ConfigError, match="chat template: line 1"):
    Words(small_tokenizer(), "{% for %}")


def test_models_and_health(client):
  (model,) = client.get("/v1/models").json()["data"]
  assert (model["id"], model["object"]) == ("small", "model")
  assert model["engram"] == {"layers": [1, 2], "capacity": CAPACITY}
  assert client.get("/v1/models/small").json() == model
  health = client.get("/health")
  assert health.status_code == 200
  assert health.json()["status"] == "ok"
  described = client.get("/openapi.json").json()["components"]["schemas"]
  assert {"prompt", "top_k", "gates"} <= set(described["CompletionBody"]["properties"])


def test_the_page_needs_nothing_from_elsewhere(client):
  page = client.get("/")
  assert page.headers["content-type"].startswith("text/html")
  assert "default-src 'none'" in page.headers["content-security-policy"]
  assert not [word for word in ("http:", "https:", "src=", "@import") if word in page.text]


def test_a_model_that_says_nan_is_still_json(client, engine, monkeypatch):
  step = engine._slots.step

  def sick(*args):
    said = step(*args)
    return said._replace(logprob_B=said.logprob_B * math.nan)

  monkeypatch.setattr(engine._slots, "step", sick)
  (choice,) = client.complete(max_tokens=3, logprobs=1)["choices"]
  assert choice["logprobs"]["token_logprobs"] == [None] * 3


def test_settings_reach_the_engine(client, engine):
  how = {"temperature": 1.2, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.4, "seed": 2**32 + 5}
  (choice,) = client.complete("the capital", max_tokens=8, **how)["choices"]
  sampling = Sampling(1.2, 9, 0.9, 1.4, 5)
  expected = said_alone(engine, "the capital", 8, sampling=sampling)
  assert choice["text"] == expected.text()
