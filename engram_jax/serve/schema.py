"""Bodies of HTTP requests: every field, its type and its limits.

Unknown fields are refused, so that no client relies on an option that does nothing.
"""

import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from engram_jax.inference.sampling import Sampling
from engram_jax.serve.slots import MAX_TOP

MAX_PROMPTS = 128  # in one request
MAX_CHOICES = 16  # of one prompt
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_SCORES = 1 << 20  # numbers that one answer may hold
GREEDY_BELOW = 1e-3  # a temperature that would only overflow


def _check_text(text: str) -> str:
  """Returns the text; ValueError for half of a surrogate pair, which JSON can spell."""
  try:
    text.encode()
  except UnicodeEncodeError:
    raise ValueError("holds half of a surrogate pair, which is no character") from None
  return text


def _is_ids(value: Any) -> bool:
  return isinstance(value, list) and all(type(i) is int for i in value)


def _parse_prompts(value: Any) -> list[str | list[int]]:
  prompts = [value] if isinstance(value, str) or (value and _is_ids(value)) else value
  if not isinstance(prompts, list) or not prompts:
    raise ValueError("must be a string, a list of token ids, or a list of either")
  if len(prompts) > MAX_PROMPTS:
    raise ValueError(f"holds {len(prompts)} prompts, at most {MAX_PROMPTS} go in one request")
  if not (all(isinstance(p, str) for p in prompts) or all(map(_is_ids, prompts))):
    raise ValueError("must be a string, a list of token ids, or a list of either")
  return [_check_text(p) if isinstance(p, str) else p for p in prompts]


def _parse_stops(value: Any) -> tuple[str, ...]:
  stops = [] if value is None else [value] if isinstance(value, str) else value
  if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
    raise ValueError("must be a string or a list of strings")
  if len(stops) > MAX_STOPS:
    raise ValueError(f"holds {len(stops)} strings, at most {MAX_STOPS} are looked for")
  if any(not 0 < len(s) <= MAX_STOP_LENGTH for s in stops):
    raise ValueError(f"strings must have 1 to {MAX_STOP_LENGTH} characters")
  return tuple(map(_check_text, stops))


_STRINGS = {"type": "array", "items": {"type": "string"}}
_IDS = {"type": "array", "items": {"type": "integer"}}
_PROMPT_SCHEMA = {"anyOf": [{"type": "string"}, _IDS, _STRINGS, {"type": "array", "items": _IDS}]}
_STOP_SCHEMA = {"anyOf": [{"type": "string"}, _STRINGS, {"type": "null"}]}

Text = Annotated[str, AfterValidator(_check_text)]
Prompts = Annotated[Any, AfterValidator(_parse_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
Stops = Annotated[Any, AfterValidator(_parse_stops), WithJsonSchema(_STOP_SCHEMA)]
Count = Annotated[int, Field(ge=0, lt=2**31)]


class Strict(BaseModel):
  """A model without coercion, unknown fields or NaN. A null field counts as absent, as in OpenAI's
  schema."""

  model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

  @model_validator(mode="before")
  @classmethod
  def _without_nulls(cls, body: Any) -> Any:
    if not isinstance(body, dict):
      return body
    return {k: v for k, v in body.items() if v is not None or k not in cls.model_fields}


class StreamOptions(Strict):
  """Options of a streamed response."""

  include_usage: bool = False


class CommonParams(Strict):
  """Fields that both kinds of completion take."""

  model: str | None = None
  n: int = Field(1, ge=1, le=MAX_CHOICES)
  temperature: float = Field(1.0, ge=0, le=2)
  top_p: float = Field(1.0, gt=0, le=1)
  top_k: int = Field(0, ge=-1, lt=2**31, description="0 or -1: all")
  repetition_penalty: float = Field(1.0, ge=0.01, le=100)
  seed: int | None = Field(None, ge=-(2**63), lt=2**63)
  stop: Stops = ()
  stream: bool = False
  stream_options: StreamOptions | None = None
  gates: bool = Field(False, description="Of each token: one number a memory, in `engram`.")
  user: str | None = None
  presence_penalty: float = Field(0, ge=0, le=0, description="See repetition_penalty.")
  frequency_penalty: float = Field(0, ge=0, le=0, description="See repetition_penalty.")

  def samplings(self, prompts: int) -> list[Sampling]:
    """One `Sampling` for each choice of each prompt; without a seed, seeds drawn at random."""
    seed = secrets.randbits(32) if self.seed is None else self.seed
    temperature = self.temperature if self.temperature >= GREEDY_BELOW else 0.0
    top_k, penalty = max(self.top_k, 0), self.repetition_penalty
    seeds = ((seed + i % self.n) % 2**32 for i in range(prompts * self.n))
    return [Sampling(temperature, top_k, self.top_p, penalty, seed) for seed in seeds]


class CompletionBody(CommonParams):
  """The body of POST /v1/completions."""

  prompt: Prompts
  max_tokens: Count = 16
  echo: bool = False
  logprobs: int | None = Field(None, ge=0, le=MAX_TOP)


class TextPart(Strict):
  """One part of a message's content."""

  type: Literal["text"]
  text: Text


class Message(Strict):
  """One message of a conversation."""

  role: Literal["system", "developer", "user", "assistant"]
  content: Text | list[TextPart]
  name: str | None = None

  @property
  def text(self) -> str:
    """The content, its parts joined."""
    parts = [self.content] if isinstance(self.content, str) else [p.text for p in self.content]
    return "".join(parts)


class ChatBody(CommonParams):
  """The body of POST /v1/chat/completions."""

  messages: list[Message] = Field(min_length=1, max_length=1024)
  max_tokens: Count | None = None
  max_completion_tokens: Count | None = None
  logprobs: bool = False
  top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
