"""Tokens in answers of the API: their text, names of their own, a fault that is one request's."""

import json

import numpy as np
import pytest
import tokenizers
from small_model import V
from small_server import Client, EventLog, make_request, settle, small_decoder
from tokenizers import decoders, models, normalizers

from engram_jax.inference import completion
from engram_jax.serve.api import Service
from engram_jax.serve.engine import Engine
from engram_jax.serve.prompts import PromptEncoder

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in (*b"A\n", 0xE6, 0x97, 0xA5, 0xF0, 0x9F, 0xFF)]
WORDS = ["▁", "▁the", "the", "▁fox", "fox", "▁true", "true", "A", ",", "\ufffd"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789BCD"
FORCED: list[list[int]] = []  # what the model says, a list a step


def llama() -> tokenizers.Tokenizer:
  """A tokenizer of Llama 2's make, with as many ids as the small model."""
  names = [*SPECIAL, *BYTES, *WORDS, *LETTERS][:V]
  assert len(set(names)) == V
  words = [name for name in names if name not in SPECIAL]
  merges = [("▁", w[1:]) for w in words if w[0] == "▁" and w[1:] in words]
  tokenizer = tokenizers.Tokenizer(
    models.BPE({n: i for i, n in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True)
  )
  spaces = normalizers.Replace(" ", "▁")
  tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
  steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
  tokenizer.add_special_tokens(SPECIAL)
  return tokenizer


TOKENIZER = llama()


@pytest.fixture(scope="module")
def engine():
  with Engine(small_decoder(), TOKENIZER, slots=3, queue=16, stop_ids=[2]) as engine:
    step = engine._slots.step

    def forced_step(busy_B, top):
      token_B, scores = step(busy_B, top)
      return (np.full_like(token_B, FORCED.pop(0)) if FORCED else token_B), scores

    engine._slots.step = forced_step
    yield engine


@pytest.fixture(scope="module")
def client(engine):
  return Client(Service(engine, PromptEncoder(TOKENIZER), "small"))


def ids_of(*names: str) -> list[int]:
  return [TOKENIZER.token_to_id(name) for name in names]


def complete(client, prompt, names, **body):
  """The choice of a request whose tokens are these, in one piece; its stream says the same."""
  count = max(len(names), 1) if "max_tokens" not in body else body.pop("max_tokens")
  FORCED[:] = ids_of(*names)
  (choice,) = client.complete(prompt, max_tokens=count, **body)["choices"]
  FORCED[:] = ids_of(*names)
  chunks = client.complete(prompt, max_tokens=count, stream=True, **body)
  assert "".join(c["text"] for chunk in chunks for c in chunk["choices"]) == choice["text"]
  return choice


@pytest.mark.parametrize(
  ("prompt", "names", "text"),
  [
    ("the fox", ["▁the", "▁fox"], " the fox"),
    ("the fox", ["the"], "the"),
    ("the", ["<0xE6>", "<0x97>", "<0xA5>", "▁true"], "日 true"),
    ("the", ["<0x41>", "<0xF0>", "▁the"], "A\ufffd the"),
    ("the", ["<0xFF>", "<0xF0>"], "\ufffd\ufffd"),
    ("the \ufffd", ["▁fox"], " fox"),
    (ids_of("▁the", "<0xE6>", "<0x97>"), ["<0xA5>", "▁fox"], "日 fox"),
    (ids_of("<s>"), ["▁the", "▁fox"], "the fox"),
    (ids_of("▁fox", "</s>"), ["▁the"], " the"),
  ],
)
def test_a_prompt_and_its_continuation_are_one_text(client, prompt, names, text):
  assert complete(client, prompt, names)["text"] == text
  choice = complete(client, prompt, names, echo=True, logprobs=1)
  ids = TOKENIZER.encode(prompt).ids if isinstance(prompt, str) else prompt
  whole = TOKENIZER.decode([*ids, *ids_of(*names)])
  if "\ufffd" not in text:
    assert choice["text"] == whole
  assert choice["text"].endswith(text)
  offsets = choice["logprobs"]["text_offset"]
  assert offsets == sorted(offsets)
  assert max(offsets) <= len(choice["text"])


def test_a_prompt_that_only_is_scored_is_said_whole(client):
  choice = complete(client, ids_of("▁the", "<0xE6>"), [], echo=True, max_tokens=0)
  assert choice["text"] == "the\ufffd"


def test_a_chat_goes_on_behind_what_stands_before_it(engine, client):
  FORCED[:] = ids_of("▁true", "▁the")
  (choice,) = client.chat(("user", "the"), max_tokens=2)["choices"]
  assert choice["message"]["content"] == " true the"


def test_likeliest_tokens_are_as_many_as_were_asked_for(client):
  asked = 20
  prompt = ids_of("▁the", "▁fox", ",", "▁true")
  choice = complete(client, prompt, ["<0xE6>", "▁true", "true"], echo=True, logprobs=asked)
  logprobs = choice["logprobs"]
  for name, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True):
    assert len(top) in (asked, asked + 1)  # the token's own, if it is not among them
    assert name in top
  assert logprobs["tokens"] == [" the", " fox", ",", " true", "bytes:\\xe6", " true", "true"]
  body = {"messages": [{"role": "user", "content": "the"}], "logprobs": True, "top_logprobs": asked}
  FORCED[:] = ids_of("<0xE6>", "<0x41>", "A", "▁true", "true", "<0x0A>", "</s>")
  answer = client.post("/v1/chat/completions", body | {"max_tokens": 7}).json()
  content = answer["choices"][0]["logprobs"]["content"]
  said = [(token["token"], bytes(token["bytes"])) for token in content]
  assert said == [
    ("bytes:\\xe6", b"\xe6"),
    ("bytes:\\x41", b"A"),
    ("A", b"A"),
    (" true", b" true"),
    ("true", b"true"),
    ("\n", b"\n"),
    ("</s>", b"</s>"),
  ]
  for token in content:
    assert len({t["token"] for t in token["top_logprobs"]}) == asked


def test_gates_name_the_token_and_say_the_text_it_completed(client):
  choice = complete(client, "the", ["<0xE6>", "<0x97>", "<0xA5>"], gates=True)
  said = [(t["token"], t["text"]) for t in choice["engram"]["tokens"]]
  assert said == [("bytes:\\xe6", ""), ("bytes:\\x97", ""), ("bytes:\\xa5", "日")]


@pytest.mark.parametrize("where", ["at its beginning", "in the middle"])
def test_a_fault_of_one_request_is_its_own_and_counted(engine, client, monkeypatch, where):
  before = engine.status()
  plain_push, plain_init = completion.Detokenizer.push, completion.Detokenizer.__init__

  def push(self, token):
    if where == "in the middle" and self.marked:
      raise RuntimeError("the tokenizer cannot go on")
    return plain_push(self, token)

  def init(self, tokenizer, prompt=()):
    plain_init(self, tokenizer, prompt)
    self.marked = list(prompt[-1:]) == ids_of("true")
    if where == "at its beginning" and self.marked:
      raise RuntimeError("the tokenizer cannot go on")

  monkeypatch.setattr(completion.Detokenizer, "push", push)
  monkeypatch.setattr(completion.Detokenizer, "__init__", init)
  other = EventLog(engine, [make_request(ids_of("▁the"), 20)])
  asked = {"prompt": ids_of("true"), "max_tokens": 5, "temperature": 0}
  answer = client.post("/v1/completions", asked)
  assert answer.status_code == 500
  error = answer.json()["error"]
  assert (error["code"], error["type"]) == ("request_failed", "server_error")
  assert "the tokenizer cannot go on" in error["message"]
  assert len(other.wait().ids()) in range(1, 21)
  assert other.events[0][-1].reason in ("length", "stop")
  settle(engine)
  after = engine.status()
  assert (after["status"], after["failures"]) == ("ok", before["failures"])
  assert after["failed_requests"] == before["failed_requests"] + 1
  assert client.complete("fox", max_tokens=1)["choices"][0]["finish_reason"] in ("length", "stop")


def test_a_fault_in_the_middle_of_a_stream_is_said_in_it(engine, client, monkeypatch):
  calls = []
  plain_push = completion.Detokenizer.push

  def push(self, token):
    calls.append(token)
    if len(calls) == 3:
      raise RuntimeError("the tokenizer cannot go on")
    return plain_push(self, token)

  monkeypatch.setattr(completion.Detokenizer, "push", push)
  FORCED[:] = ids_of("▁the", "▁fox", "▁the", "▁fox")
  asked = {"prompt": "the", "max_tokens": 4, "stream": True}
  lines = client.post("/v1/completions", asked).text.strip().split("\n\n")
  assert lines[-1] == "data: [DONE]"
  error = json.loads(lines[-2].removeprefix("data: "))["error"]
  assert error["code"] == "request_failed"
