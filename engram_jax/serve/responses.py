"""The engine's events in the OpenAI API's shapes, in one piece or streamed."""

import math
import time
import uuid
from typing import Any

from engram_jax.serve.prompts import Words
from engram_jax.serve.request import Done, Event, Failed, Job, Prompt, Token
from engram_jax.serve.schema import Asked, ChatBody


class Answer:
  """One request's. `add` turns an event into a piece of a stream; `whole` gives everything that was
  said, once all choices are done. jobs: of sound prompts."""

  def __init__(self, body: Asked, jobs: list[Job], words: Words, model: str):
    self.body, self.jobs, self.words = body, jobs, words
    self.chat = isinstance(body, ChatBody)
    self.scored = body.logprobs is not None and body.logprobs is not False
    kind = ("chat.completion" if self.chat else "text_completion") + (
      ".chunk" if self.chat and body.stream else ""
    )
    prefix = "chatcmpl" if self.chat else "cmpl"
    self._head = {
      "id": f"{prefix}-{uuid.uuid4().hex}",
      "object": kind,
      "created": int(time.time()),
      "model": model,
    }
    self._choices = [_Choice(self, i) for i in range(len(jobs))]

  def add(self, index: int, event: Event) -> dict[str, Any] | None:
    """The chunk for an event of choice `index`, if the answer is streamed and it says something."""
    part = self._choices[index].part(event)
    return part and self._head | {"choices": [part]}

  def first(self) -> list[dict[str, Any]]:
    """Chunks that stand before all others: a chat's say whose turn it is."""
    if not self.chat:
      return []
    delta = {"role": "assistant", "content": ""}
    return [
      self._head | {"choices": [{"index": i, "delta": delta, "finish_reason": None}]}
      for i in range(len(self.jobs))
    ]

  def last(self) -> list[dict[str, Any]]:
    """Chunks that stand after all others."""
    options = self.body.stream_options
    wanted = options is not None and options.include_usage
    return [self._head | {"choices": [], "usage": self._usage()}] if wanted else []

  @property
  def scores(self) -> int:
    """Log-probabilities and gates' tokens that it may come to hold."""
    if not (self.scored or self.body.gates):
      return 0
    return sum((1 + job.top) * (job.max_new + job.score_prompt * len(job.ids)) for job in self.jobs)

  def whole(self) -> dict[str, Any]:
    """The answer that is not streamed."""
    return self._head | {"choices": [c.whole() for c in self._choices], "usage": self._usage()}

  def _usage(self) -> dict[str, int]:
    prompts = sum(len(job.ids) for job in self.jobs[:: self.body.n])
    made = sum(choice.made for choice in self._choices)
    return {
      "prompt_tokens": prompts,
      "completion_tokens": made,
      "total_tokens": prompts + made,
    }


class _Choice:
  def __init__(self, answer: Answer, index: int):
    self.answer, self.index, self.made = answer, index, 0
    self._echo = self._prompt_text() if getattr(answer.body, "echo", False) else ""
    self._echoed = len(self._echo)  # characters before the continuation
    self._text, self._tokens, self._offsets, self._reason = [], [], [], None

  def part(self, event: Event) -> dict[str, Any] | None:
    """What an event adds, in the form of a chunk's choice; None where there are no chunks."""
    assert not isinstance(event, Failed)
    tokens, text, reason = [], "", None
    if isinstance(event, Prompt):
      tokens, text, self._echo = list(event.tokens), self._echo, ""
    elif isinstance(event, Token):
      tokens, text, self._echo = [event], self._echo + event.text, ""
      self.made += 1
    elif isinstance(event, Done):
      text, reason, self._echo = self._echo + event.text, event.reason, ""
    before = 0 if isinstance(event, Prompt) else self._echoed
    offsets = [before + token.start for token in tokens]
    self._text.append(text)
    self._tokens += tokens
    self._offsets += offsets
    self._reason = reason
    if not self.answer.body.stream or not (tokens or text or reason):
      return None
    return self._form(text, tokens, offsets, reason, "delta")

  def whole(self) -> dict[str, Any]:
    text = "".join(self._text)
    return self._form(text, self._tokens, self._offsets, self._reason, "message")

  def _prompt_text(self) -> str:
    body, i = self.answer.body, self.index // self.answer.body.n
    given = body.prompt[i]
    return given if isinstance(given, str) else self.answer.words.decode(given)

  def _form(self, text: str, tokens: list, offsets: list, reason: str | None, place: str) -> dict:
    answer = self.answer
    choice: dict[str, Any] = {"index": self.index}
    if answer.chat:
      role = {"role": "assistant"} if place == "message" else {}
      choice[place] = role | ({"content": text} if text or role else {})
    else:
      choice["text"] = text
    form = self._chat_logprobs if answer.chat else self._logprobs
    choice["logprobs"] = form(tokens, offsets) if answer.scored else None
    choice["finish_reason"] = reason
    if answer.body.gates:
      say = lambda t: {"id": t.id, "text": t.text, "gates": [_number(g) for g in t.gates]}
      choice["engram"] = {"tokens": [say(t) for t in tokens]}
    return choice

  def _logprobs(self, tokens: list[Token], offsets: list[int]) -> dict[str, Any]:
    of = self.answer.words.of
    return {
      "tokens": [of(t.id) for t in tokens],
      "token_logprobs": [_number(t.logprob) for t in tokens],
      "top_logprobs": [self._best(t) for t in tokens] if self.answer.body.logprobs else None,
      "text_offset": offsets,
    }

  def _best(self, token: Token) -> dict[str, float | None] | None:
    """By text, the chosen one among them; of two ids with one text, the likelier."""
    if token.logprob is None:
      return None
    best: dict[str, float | None] = {}
    for i, logprob in (*token.top, (token.id, token.logprob)):
      best.setdefault(self.answer.words.of(i), _number(logprob))
    return best

  def _chat_logprobs(self, tokens: list[Token], _: list[int]) -> dict[str, Any]:
    def say(i: int, logprob: float | None) -> dict[str, Any]:
      text = self.answer.words.of(i)
      return {"token": text, "logprob": _number(logprob), "bytes": list(text.encode())}

    content = [
      say(t.id, t.logprob) | {"top_logprobs": [say(*best) for best in t.top]} for t in tokens
    ]
    return {"content": content}


def _number(x: float | None) -> float | None:
  """JSON has no NaN and no infinity: a model that says one has said nothing."""
  return x if x is not None and math.isfinite(x) else None
