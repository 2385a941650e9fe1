"""Chat templates of published models, rendered as transformers renders them.

The dialect is Jinja with loop controls and `{% generation %}` blocks, which mark what a model says
and change nothing here; `tojson` escapes nothing; `strftime_now` and `raise_exception` are there. A
template comes with a model, from whoever made it, so it runs in a sandbox.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from engram_jax.errors import ConfigError


def compile_template(template: str, names: Mapping[str, str]) -> jinja2.Template:
  """Compiles a chat template.

  names: special tokens that it may use, `bos_token` and the like.

  Raises ConfigError with the line for a template that is not sound.
  """
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = _to_json
  known: dict[str, Any] = environment.globals
  known.update(raise_exception=_refuse, strftime_now=_now, dict=_Dict(), namespace=_Namespace)
  try:
    return environment.from_string(template, globals={"bos_token": "", "eos_token": "", **names})
  except jinja2.TemplateError as error:
    line = getattr(error, "lineno", None)
    raise ConfigError(f"chat template: line {line}: {error.message}") from None
  except (ValueError, RecursionError, SyntaxError, OverflowError, MemoryError) as error:
    raise ConfigError(f"chat template: {str(error)[:200] or type(error).__name__}") from None


def render(
  template: jinja2.Template,
  messages: Sequence[Mapping[str, Any]],
  *,
  add_generation_prompt: bool = True,
  **values: Any,
) -> str:
  """The text of a conversation, and of the beginning of an answer.

  values: what else the template may ask for; `tools` and `documents` are None if left out.

  Raises ConfigError for messages that the template refuses.
  """
  try:
    return template.render(
      **{"tools": None, "documents": None} | values,
      messages=messages,
      add_generation_prompt=add_generation_prompt,
    )
  except Exception as error:  # a template is a program, and may raise anything
    said = str(error)[:400] or type(error).__name__
    raise ConfigError(f"messages: the model's chat template refuses them: {said}") from None


class _Generation(jinja2.ext.Extension):
  """{% generation %}...{% endgeneration %}: what a model says, for those who train on that alone.

  Its body has a scope of its own, as a macro's has.
  """

  tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

  def _body(self, caller: Any) -> str:
    return caller()


class _Dict:
  """The global `dict`: the constructor and `fromkeys`, and none of a class's other attributes."""

  def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
    return dict(*args, **values)

  def fromkeys(self, *args: Any) -> dict[Any, Any]:
    return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
  """The global `namespace`, without names that begin with an underscore."""

  def __init__(*args: Any, **values: Any) -> None:  # so that a value may be called self
    self, *rest = args
    attributes = dict(*rest, **values)
    for name in attributes:
      _check_name(name)
    jinja2.utils.Namespace.__init__(self, attributes)

  def __setitem__(self, name: str, value: Any) -> None:
    _check_name(name)
    super().__setitem__(name, value)


def _check_name(name: Any) -> None:
  if isinstance(name, str) and name.startswith("_"):
    raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: Any = None,
  separators: Any = None,
  sort_keys: bool = False,
) -> str:
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _now(format: str) -> str:
  return datetime.datetime.now().strftime(format)


def _refuse(message: str) -> None:
  raise jinja2.TemplateError(message)
