"""Requests of the engine from the bodies of HTTP requests: tokenisation and chat templates."""

from collections.abc import Mapping

import jinja2
import tokenizers

from engram_jax.errors import ConfigError
from engram_jax.memory.token_text import Detokenizer, TokenPieces, decode, token_names
from engram_jax.memory.vocabulary import encode_texts
from engram_jax.serve.chat_template import compile_template, render
from engram_jax.serve.request import Request
from engram_jax.serve.schema import ChatBody, CompletionBody, Message

PLAIN_STOP = "\nuser:"  # without a template: the model would go on and speak for the user


class PromptEncoder:
  """A tokenizer, and the chat template that goes with it, if any: Jinja, as published models have
  them. names: those the template may use, `bos_token` and the like."""

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    template: str | None = None,
    names: Mapping[str, str] | None = None,
  ):
    self._plain = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    self._with_specials = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    for copy in (self._plain, self._with_specials):
      copy.no_truncation()
      copy.no_padding()
    self._plain.encode_special_tokens = True  # text that spells a special token is just text
    added = tokenizer.get_added_tokens_decoder().values()
    self._specials = [token.content for token in added if token.special]
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    self.longest_token = max(map(len, vocabulary))
    self._names = token_names(tokenizer, max(vocabulary.values()) + 1)
    self._pieces = TokenPieces(tokenizer)
    self._template = compile_template(template, names or {}) if template else None

  def token_name(self, token: int) -> str:
    """The name of a token, its own text for most: see `token_names`."""
    return self._names[token] if 0 <= token < len(self._names) else f"#{token}"

  def token_bytes(self, token: int) -> bytes:
    """The bytes of a token's own text, of a special one's name; none for an id that is no token."""
    return self._pieces[token]

  def decode(self, ids: list[int], *, continued: bool = False) -> str:
    """The text of token ids; without a character that is not complete if more is to come."""
    held = Detokenizer(self._plain, ids).held if continued else []
    return decode(self._plain, ids[: len(ids) - len(held)])

  def completion_requests(self, body: CompletionBody, capacity: int) -> list[Request]:
    """`n` requests for each prompt, in order. Raises ConfigError for a text that cannot fit."""
    prompts = [tuple(p) if isinstance(p, list) else self._encode(p, capacity) for p in body.prompt]
    score_prompt = body.echo and (body.logprobs is not None or body.gates)
    top = body.logprobs or 0
    return [
      Request(prompts[i // body.n], body.max_tokens, sampling, body.stop, top, score_prompt)
      for i, sampling in enumerate(body.samplings(len(prompts)))
    ]

  def chat_requests(self, body: ChatBody, capacity: int) -> list[Request]:
    """`n` requests for the conversation. Raises ConfigError for messages that are refused or do not
    fit."""
    stop = body.stop
    if self._template is None:
      lines = [f"{m.role}: {m.text}\n" for m in body.messages]
      ids, stop = self._encode("".join([*lines, "assistant:"]), capacity), (*stop, PLAIN_STOP)
    else:
      ids = self._render(self._template, body.messages, capacity)
    room = max(capacity - len(ids), 0)
    limits = [x for x in (body.max_completion_tokens, body.max_tokens) if x is not None]
    max_new = limits[0] if limits else room
    if not room:
      raise ConfigError(f"messages: {len(ids)} tokens fill the {capacity} that a request can hold")
    top = (body.top_logprobs or 0) if body.logprobs else 0
    return [Request(ids, max_new, sampling, stop, top) for sampling in body.samplings(1)]

  def _render(
    self, template: jinja2.Template, messages: list[Message], capacity: int
  ) -> tuple[int, ...]:
    """Token ids of the messages in the chat template."""
    for i, message in enumerate(messages):
      for special in self._specials:
        if special in message.text:
          raise ConfigError(f"messages[{i}]: content holds the special token {special!r}")
    names = [{} if m.name is None else {"name": m.name} for m in messages]
    values = [{"role": m.role, "content": m.text} for m in messages]
    text = render(template, [v | n for v, n in zip(values, names, strict=True)])
    _check_length(text, self.longest_token, capacity)
    return tuple(encode_texts(self._with_specials, [text], "messages")[0])

  def _encode(self, text: str, capacity: int) -> tuple[int, ...]:
    """Token ids of a text, tokenised as for training."""
    _check_length(text, self.longest_token, capacity)
    return tuple(encode_texts(self._plain, [text], "prompt")[0])


def _check_length(text: str, longest_token: int, capacity: int) -> None:
  # Before time is spent on a text that cannot fit whatever its tokens are.
  if len(text) > capacity * longest_token:
    raise ConfigError(
      f"prompt: {len(text):,} characters do not fit in the {capacity} tokens that a request can "
      "hold"
    )
