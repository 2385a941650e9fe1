"""Text to the engine's jobs: tokenisation and chat templates."""

from collections.abc import Mapping

import jinja2
import jinja2.sandbox
import tokenizers

from engram_jax.errors import ConfigError
from engram_jax.serve.request import Job
from engram_jax.serve.schema import ChatBody, CompletionBody, Message

PLAIN_STOP = "\nuser:"  # without a template: the model would go on and speak for the user


class Words:
  """A tokenizer, and the chat template that goes with it, if any: Jinja, as published models have
  them. names: what the template may call by name, `bos_token` and the like."""

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    template: str | None = None,
    names: Mapping[str, str] | None = None,
  ):
    copy = lambda: tokenizers.Tokenizer.from_str(tokenizer.to_str())
    self._plain, self._special = copy(), copy()
    for each in (self._plain, self._special):
      each.no_truncation()
      each.no_padding()
    self._plain.encode_special_tokens = True  # text that spells a special token is just text
    self._specials = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    self.longest = max(map(len, vocabulary))
    each = [[i] for i in range(max(vocabulary.values()) + 1)]
    self._texts = self._plain.decode_batch(each, skip_special_tokens=False)
    self._template = template and _compiled(template, names or {})

  def of(self, token: int) -> str:
    """A single token's text, special ones included; none of an id that the tokenizer has not."""
    return self._texts[token] if token < len(self._texts) else ""

  def decode(self, ids: list[int]) -> str:
    return self._plain.decode(ids)

  def completion_jobs(self, body: CompletionBody, capacity: int) -> list[Job]:
    """`n` for each prompt, in order. Raises ConfigError for what cannot be."""
    prompts = [tuple(p) if isinstance(p, list) else self._encode(p, capacity) for p in body.prompt]
    scored = body.echo and (body.logprobs is not None or body.gates)
    return [
      Job(prompts[i // body.n], body.max_tokens, sampling, body.stop, body.logprobs or 0, scored)
      for i, sampling in enumerate(body.samplings(len(prompts)))
    ]

  def chat_jobs(self, body: ChatBody, capacity: int) -> list[Job]:
    """`n` for the conversation. Raises ConfigError for what cannot be."""
    stop = body.stop
    if self._template is None:
      lines = [f"{m.role}: {m.text}\n" for m in body.messages]
      ids, stop = self._encode("".join([*lines, "assistant:"]), capacity), (*stop, PLAIN_STOP)
    else:
      ids = self._from_template(body.messages, capacity)
    room = max(capacity - len(ids), 0)
    given = [x for x in (body.max_completion_tokens, body.max_tokens) if x is not None]
    most = given[0] if given else room
    if not room:
      raise ConfigError(f"messages: {len(ids)} tokens fill the {capacity} that a request can hold")
    top = (body.top_logprobs or 0) if body.logprobs else 0
    return [Job(ids, most, sampling, stop, top) for sampling in body.samplings(1)]

  def _from_template(self, messages: list[Message], capacity: int) -> tuple[int, ...]:
    for i, message in enumerate(messages):
      for special in self._specials:
        if special in message.text:
          raise ConfigError(f"messages[{i}]: content holds the special token {special!r}")
    said = [{"role": m.role, "content": m.text} for m in messages]
    try:
      text = self._template.render(messages=said, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and may raise anything
      raise ConfigError(f"messages: the model's chat template refuses them: {error}") from None
    _check_length(text, self.longest, capacity)
    return tuple(self._special.encode(text, add_special_tokens=False).ids)

  def _encode(self, text: str, capacity: int) -> tuple[int, ...]:
    _check_length(text, self.longest, capacity)
    # As text was tokenised for training.
    return tuple(self._plain.encode(text, add_special_tokens=False).ids)


def _check_length(text: str, longest: int, capacity: int) -> None:
  """Before time is spent on a text that cannot fit whatever its tokens are."""
  if len(text) > capacity * longest:
    raise ConfigError(
      f"prompt: {len(text):,} characters do not fit in the {capacity} tokens that a request can "
      "hold"
    )


def _compiled(template: str, names: Mapping[str, str]) -> jinja2.Template:
  """In a sandbox: a template comes with a model, from whoever made it."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
  environment.globals |= {"bos_token": "", "eos_token": "", **names, "raise_exception": _refuse}
  try:
    return environment.from_string(template)
  except jinja2.TemplateError as error:
    raise ConfigError(f"chat template: line {error.lineno}: {error.message}") from None


def _refuse(message: str) -> None:
  raise jinja2.TemplateError(message)
