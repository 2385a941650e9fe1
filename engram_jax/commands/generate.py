"""`python -m engram_jax generate --run DIR --prompt TEXT`: continuations of a trained run."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from engram_jax.errors import ConfigError
from engram_jax.inference.completion import Completion, complete, encode
from engram_jax.inference.decoder import Decoder
from engram_jax.inference.load import (
  LONGEST_CONTEXT,
  LoadedModel,
  PlacementArgs,
  check_room,
  load_model,
)
from engram_jax.inference.row_sources import StoreRows
from engram_jax.inference.sampling import Sampling

MOST_GUESSES = 64  # beyond a few there is nothing to gain


@dataclasses.dataclass(frozen=True)
class Args:
  run: pathlib.Path
  """Folder of a run that train.py wrote."""
  prompt: tuple[str, ...] = ()
  """Texts to continue, together in one batch."""
  interactive: bool = False
  """Reads prompts from the terminal, a line each, until it ends."""
  tokens: int = 64
  """At most so many new tokens."""
  temperature: float = 0.0
  """0 is greedy."""
  top_k: int = 0
  """Only the k most likely tokens; 0 is all."""
  top_p: float = 1.0
  """Only the fewest most likely tokens that together have this probability."""
  repetition_penalty: float = 1.0
  """Above 1, tokens that are in the text already are less likely."""
  seed: int = 0
  stop: tuple[str, ...] = ()
  """Strings that end a text."""
  guesses: int = 0
  """Tokens guessed ahead from the text itself and checked, a step; changes the speed alone."""
  rows: tyro.conf.OmitArgPrefixes[PlacementArgs] = dataclasses.field(default_factory=PlacementArgs)
  step: int | None = None
  """Checkpoint to use; the newest one that is sound if left out."""
  json: bool = False
  """One JSON object on stdout, everything else on stderr."""


def main(args: Sequence[str]) -> int:
  """Continues prompts; tables on the device, in host memory or in a file."""
  own = tyro.cli(Args, prog="python -m engram_jax generate", args=args, description=__doc__)
  sampling = _check(own)
  log = lambda text: print(text, file=sys.stderr)
  opened = load_model(own.run, own.step, log)
  with contextlib.ExitStack() as stack:
    source = opened.source(stack, own.rows)
    # What is compiled for one capacity serves all lines of a conversation that need no more.
    decoder_of = functools.cache(lambda capacity: Decoder(opened.weights, source, capacity))
    if own.interactive:
      return _converse(own, opened, decoder_of, sampling)
    begin = time.perf_counter()
    done = _answer(own, opened, decoder_of, sampling, own.prompt)
    seconds = time.perf_counter() - begin
    if own.json:
      print(json.dumps(_result(own, opened, source, done, seconds)))
  return 0


def _check(own: Args) -> Sampling:
  if own.interactive == bool(own.prompt):
    raise ConfigError("give --prompt TEXT, or --interactive, and not both")
  if own.interactive and own.json:
    raise ConfigError("--interactive is for reading along: leave --json out")
  for name, low, high in (("tokens", 1, LONGEST_CONTEXT), ("guesses", 0, MOST_GUESSES)):
    if not low <= getattr(own, name) <= high:
      raise ConfigError(f"--{name} {getattr(own, name)} must be at least {low} and at most {high}")
  for name in ("prompt", "stop"):
    for text in getattr(own, name):
      if not text:
        raise ConfigError(f"--{name} '' is empty; give some text")
      _check_text(text, f"--{name}")
  own.rows.check()
  return Sampling(own.temperature, own.top_k, own.top_p, own.repetition_penalty, own.seed)


def _check_text(text: str, what: str) -> None:
  """Python stands surrogates in for bytes of a command line that are no text."""
  try:
    text.encode()
  except UnicodeEncodeError:
    raise ConfigError(f"{what} {text[:40]!a} holds bytes that are no UTF-8") from None


def _answer(
  own: Args,
  opened: LoadedModel,
  decoder_of: Callable[[int], Decoder],
  sampling: Sampling,
  prompts: Sequence[str],
) -> list[Completion]:
  """Streams a single text as it comes; of several each is shown when all are done."""
  longest = max(map(len, encode(opened.tokenizer, prompts)))
  capacity = _capacity(longest + own.tokens)
  check_room(opened, len(prompts), capacity, f"--tokens {own.tokens}")
  decoder, streaming = decoder_of(capacity), len(prompts) == 1 and not own.json
  seeds = ((sampling.seed + i) % 2**32 for i in range(len(prompts)))
  samplings = [dataclasses.replace(sampling, seed=seed) for seed in seeds]
  steps = complete(
    decoder,
    opened.tokenizer,
    prompts,
    samplings,
    own.tokens,
    stop=own.stop,
    end_id=opened.end_id,
    guesses=own.guesses,
  )
  if streaming:
    print(prompts[0], end="", flush=True)
  for done, added in steps:  # noqa: B007 (the last one is the answer)
    if streaming:
      print(added[0], end="", flush=True)
  if streaming:
    print()
  elif not own.json:
    for one in done:
      print(one.prompt + one.text)
  return done


def _converse(
  own: Args, opened: LoadedModel, decoder_of: Callable[[int], Decoder], sampling: Sampling
) -> int:
  print("a prompt a line; end of file ends", file=sys.stderr)
  try:
    for line in sys.stdin:
      if prompt := line.rstrip("\n"):
        _check_text(prompt, "the line")
        _answer(own, opened, decoder_of, sampling, [prompt])
  except UnicodeDecodeError:
    raise ConfigError("--interactive: the input holds bytes that are no UTF-8") from None
  return 0


def _capacity(tokens: int) -> int:
  """A power of two: few shapes to compile for prompts of many lengths."""
  return 1 << (tokens - 1).bit_length()


def _result(
  own: Args, opened: LoadedModel, source: Any, done: list[Completion], seconds: float
) -> dict[str, Any]:
  result = {
    "run": str(own.run),
    "step": opened.step,
    "completions": [dataclasses.asdict(one) for one in done],
    "tokens": sum(one.tokens for one in done),
    "seconds_with_compilation": round(seconds, 3),
  }
  if isinstance(source, StoreRows):
    result["rows"] = source.telemetry.as_dict()
    result["levels"] = source.store.levels()
  return result
