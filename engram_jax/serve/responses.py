"""Responses of the OpenAI API from the engine's events, in one piece or streamed."""

import math
import time
import uuid
from typing import Any, Literal

from engram_jax.serve.prompts import PromptEncoder
from engram_jax.serve.request import Event, Failed, PromptScored, Request, Token
from engram_jax.serve.schema import ChatBody, CompletionBody

Json = dict[str, Any]


class ResponseBuilder:
  """The response to one HTTP request, built from the events of its choices.

  `add` returns a chunk of a stream; `response` everything, once all choices are finished.
  requests: of sound prompts, one a choice.
  """

  def __init__(
    self,
    body: CompletionBody | ChatBody,
    requests: list[Request],
    encoder: PromptEncoder,
    model: str,
  ):
    self.body, self.requests, self.encoder = body, requests, encoder
    self.chat = isinstance(body, ChatBody)
    self.scored = body.logprobs is not None and body.logprobs is not False
    prefix, kind = "cmpl", "text_completion"
    if self.chat:
      prefix, kind = "chatcmpl", "chat.completion.chunk" if body.stream else "chat.completion"
    self._head = {
      "id": f"{prefix}-{uuid.uuid4().hex}",
      "object": kind,
      "created": int(time.time()),
      "model": model,
    }
    self._choices = [_Choice(self, i) for i in range(len(requests))]

  def add(self, index: int, event: Event) -> Json | None:
    """Returns the chunk for an event of choice `index`; None if the response is not streamed or the
    event has nothing to send."""
    choice = self._choices[index].add(event)
    return choice and self._head | {"choices": [choice]}

  def first_chunks(self) -> list[Json]:
    """Chunks before all others: those of a chat name the role."""
    if not self.chat:
      return []
    delta = {"role": "assistant", "content": ""}
    return [
      self._head | {"choices": [{"index": i, "delta": delta, "finish_reason": None}]}
      for i in range(len(self.requests))
    ]

  def last_chunks(self) -> list[Json]:
    """Chunks after all others: the usage, if it was asked for."""
    options = self.body.stream_options
    if options is None or not options.include_usage:
      return []
    return [self._head | {"choices": [], "usage": self._usage()}]

  @property
  def max_scores(self) -> int:
    """Upper bound of the log-probabilities and tokens' gates that the response may hold."""
    if not (self.scored or self.body.gates):
      return 0
    return sum(
      (1 + request.top) * (request.max_new + request.score_prompt * len(request.ids))
      for request in self.requests
    )

  def response(self) -> Json:
    """The response that is not streamed."""
    return self._head | {"choices": [c.full() for c in self._choices], "usage": self._usage()}

  def _usage(self) -> dict[str, int]:
    prompt = sum(len(request.ids) for request in self.requests[:: self.body.n])
    generated = sum(choice.generated for choice in self._choices)
    return {
      "prompt_tokens": prompt,
      "completion_tokens": generated,
      "total_tokens": prompt + generated,
    }


class _Choice:
  """One continuation of a response."""

  def __init__(self, builder: ResponseBuilder, index: int):
    self.builder, self.index, self.generated = builder, index, 0
    self._echo = self._echo_text()
    self._echo_length = len(self._echo)  # characters before the continuation
    self._texts: list[str] = []
    self._tokens: list[Token] = []
    self._reason: str | None = None

  def add(self, event: Event) -> Json | None:
    """Adds an event and returns the choice of its chunk; None if it has no chunk."""
    assert not isinstance(event, Failed)
    tokens, text = [], self._echo
    self._echo = ""
    if isinstance(event, PromptScored):
      tokens = list(event.tokens)
    elif isinstance(event, Token):
      tokens, text = [event._replace(start=self._echo_length + event.start)], text + event.text
      self.generated += 1
    else:
      text, self._reason = text + event.text, event.reason
    self._texts.append(text)
    self._tokens += tokens
    if not self.builder.body.stream or not (tokens or text or self._reason):
      return None
    return self._as_json(text, tokens, "delta")

  def full(self) -> Json:
    """The choice of the response that is not streamed."""
    return self._as_json("".join(self._texts), self._tokens, "message")

  def _echo_text(self) -> str:
    """The prompt's text if the completion has to begin with it, else ""."""
    body = self.builder.body
    if not (isinstance(body, CompletionBody) and body.echo):
      return ""
    prompt = body.prompt[self.index // body.n]
    if isinstance(prompt, str):
      return prompt
    return self.builder.encoder.decode(prompt, continued=body.max_tokens > 0)

  def _as_json(self, text: str, tokens: list[Token], key: Literal["delta", "message"]) -> Json:
    builder = self.builder
    choice: Json = {"index": self.index}
    if builder.chat:
      role = {"role": "assistant"} if key == "message" else {}
      choice[key] = role | ({"content": text} if text or role else {})
    else:
      choice["text"] = text
    if not builder.scored:
      choice["logprobs"] = None
    elif builder.chat:
      choice["logprobs"] = self._chat_logprobs(tokens)
    else:
      choice["logprobs"] = self._completion_logprobs(tokens)
    choice["finish_reason"] = self._reason
    if builder.body.gates:
      choice["engram"] = {"tokens": [self._gates(t) for t in tokens]}
    return choice

  def _gates(self, token: Token) -> Json:
    """A token's gates, its name, and the part of the text that became certain with it."""
    name, gates = self.builder.encoder.token_name(token.id), [_finite(g) for g in token.gates]
    return {"id": token.id, "token": name, "text": token.text, "gates": gates}

  def _completion_logprobs(self, tokens: list[Token]) -> Json:
    name = self.builder.encoder.token_name
    return {
      "tokens": [name(t.id) for t in tokens],
      "token_logprobs": [_finite(t.logprob) for t in tokens],
      "top_logprobs": [self._top(t) for t in tokens] if self.builder.body.logprobs else None,
      "text_offset": [t.start for t in tokens],
    }

  def _top(self, token: Token) -> dict[str, float | None] | None:
    """Logprobs by name, the token's own among them."""
    if token.logprob is None:
      return None
    top: dict[str, float | None] = {}
    for i, logprob in (*token.top, (token.id, token.logprob)):
      top.setdefault(self.builder.encoder.token_name(i), _finite(logprob))
    return top

  def _chat_logprobs(self, tokens: list[Token]) -> Json:
    def entry(i: int, logprob: float | None) -> Json:
      name, piece = self.builder.encoder.token_name(i), self.builder.encoder.token_bytes(i)
      return {"token": name, "logprob": _finite(logprob), "bytes": list(piece)}

    content = [
      entry(t.id, t.logprob) | {"top_logprobs": [entry(*top) for top in t.top]} for t in tokens
    ]
    return {"content": content}


def _finite(x: float | None) -> float | None:
  """None for NaN and infinities, which JSON has not."""
  return x if x is not None and math.isfinite(x) else None
