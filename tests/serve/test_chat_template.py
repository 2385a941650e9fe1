"""Chat templates are rendered as transformers renders them, and what they may not do is refused."""

import json

import pytest
from chat_templates import CONVERSATIONS, GOLDEN, NAMES, TEMPLATES, without_date
from small_server import CAPACITY, small_tokenizer

from engram_jax.commands.serve import read_template
from engram_jax.errors import ConfigError
from engram_jax.serve.chat_template import compile_template, render
from engram_jax.serve.prompts import PromptEncoder
from engram_jax.serve.schema import ChatBody

TEXTS = json.loads(GOLDEN.read_text(encoding="utf-8"))["texts"]


@pytest.mark.parametrize("which", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_says_what_transformers_makes_of_it(name, which):
  template, expected = compile_template(TEMPLATES[name], NAMES), TEXTS[name][which]
  conversation = dict(CONVERSATIONS[which])
  messages = conversation.pop("messages")
  if expected is None:
    with pytest.raises(ConfigError, match="the model's chat template refuses them"):
      render(template, messages, **conversation)
  else:
    assert without_date(render(template, messages, **conversation)) == expected


def test_the_goldens_are_of_these_templates_and_most_of_them_texts():
  assert {name: set(texts) for name, texts in TEXTS.items()} == {
    name: set(CONVERSATIONS) for name in TEMPLATES
  }
  texts = [text for of_name in TEXTS.values() for text in of_name.values()]
  assert sum(text is not None for text in texts) > 100


@pytest.mark.parametrize(
  ("template", "words"),
  [
    ("{% for %}", "line 1"),
    ("a\n{% generation %}", "line 2"),
    ("{{ x | no_such_filter }}", "no_such_filter"),
    ("{% include 'other' %}", "refuses them"),
    ("{{ strftime_now(5) }}", "refuses them"),
    ("{{ range(10**9) | list }}", "refuses them"),
    ("{{ ''.__class__ }}{{ ().__class__.__bases__[0].__subclasses__() }}", "refuses them"),
    ("{{ dict.__init__.__globals__ }}", "refuses them"),
    ("{{ strftime_now.__globals__ }}", ""),
    ("{{ {} | tojson(indent=[]) }}", "refuses them"),
    ("{{ messages[0] | tojson(separators=1) }}", "refuses them"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses them"),
    ("{{ raise_exception('no') }}", "refuses them: no"),
    ("{{ undefined_name.attribute }}", "refuses them"),
  ],
)
def test_what_a_template_may_not_do_is_a_refusal(template, words):
  if not words:
    assert render(compile_template(template, {}), [{"role": "user", "content": "a"}]) == ""
    return
  with pytest.raises(ConfigError, match=words):
    render(compile_template(template, {}), [{"role": "user", "content": "a"}])


def test_a_request_is_rendered_with_its_names():
  encoder = PromptEncoder(small_tokenizer(), "{{ messages[0].name }}:{{ messages[0].content }}")
  body = ChatBody(messages=[{"role": "user", "content": "b", "name": "a"}], max_tokens=1)
  (request,) = encoder.chat_requests(body, CAPACITY)
  assert list(request.ids) == small_tokenizer().encode("a:b").ids


def test_all_special_tokens_of_a_model_may_be_named(tmp_path):
  config = {"pad_token": "<p>", "unk_token": {"content": "<u>"}, "chat_template": "x", "other": "y"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  assert read_template(tmp_path) == ("x", {"pad_token": "<p>", "unk_token": "<u>"})
