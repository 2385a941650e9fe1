"""`python -m engram_jax generate --run DIR --prompt TEXT`: continuations of a trained run."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from engram_jax.cli import log
from engram_jax.errors import ConfigError
from engram_jax.inference.completion import Completion, encode_prompts, stream_completions
from engram_jax.inference.decoder import Decoder, RowSource
from engram_jax.inference.load import (
  MAX_CONTEXT,
  LoadedModel,
  PlacementArgs,
  check_device_memory,
  load_model,
)
from engram_jax.inference.row_sources import StoreRowSource
from engram_jax.inference.sampling import Sampling

MAX_DRAFT_TOKENS = 64  # beyond a few there is nothing to gain


@dataclasses.dataclass(frozen=True)
class GenerateArgs:
  """Options of `generate`."""

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
  draft_tokens: Annotated[int, tyro.conf.arg(aliases=["--guesses"])] = 0
  """Tokens drafted from the text itself and verified, a step; changes the speed alone."""
  rows: tyro.conf.OmitArgPrefixes[PlacementArgs] = dataclasses.field(default_factory=PlacementArgs)
  step: int | None = None
  """Checkpoint to use; the newest one that is sound if left out."""
  json: bool = False
  """One JSON object on stdout, everything else on stderr."""


def main(argv: Sequence[str]) -> int:
  """Continues prompts; tables on the device, in host memory or in a file."""
  args = tyro.cli(
    GenerateArgs, prog="python -m engram_jax generate", args=argv, description=__doc__
  )
  sampling = _check(args)
  model = load_model(args.run, args.step, log)
  with contextlib.ExitStack() as stack:
    row_source = model.open_row_source(stack, args.rows, log)
    # What is compiled for one capacity serves all lines of a conversation that need no more.
    decoder_of = functools.cache(lambda capacity: Decoder(model.weights, row_source, capacity))
    if args.interactive:
      return _converse(args, model, decoder_of, sampling)
    begin = time.perf_counter()
    completions = _complete(args, model, decoder_of, sampling, args.prompt)
    seconds = time.perf_counter() - begin
    if args.json:
      print(json.dumps(_result(args, model, row_source, completions, seconds)))
  return 0


def _check(args: GenerateArgs) -> Sampling:
  if args.interactive == bool(args.prompt):
    raise ConfigError("give --prompt TEXT, or --interactive, and not both")
  if args.interactive and args.json:
    raise ConfigError("--interactive is for reading along: leave --json out")
  for name, low, high in (("tokens", 1, MAX_CONTEXT), ("draft_tokens", 0, MAX_DRAFT_TOKENS)):
    if not low <= getattr(args, name) <= high:
      raise ConfigError(f"--{name} {getattr(args, name)} must be at least {low} and at most {high}")
  for name in ("prompt", "stop"):
    for text in getattr(args, name):
      if not text:
        raise ConfigError(f"--{name} '' is empty; give some text")
      _check_text(text, f"--{name}")
  args.rows.check()
  return Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.seed)


def _check_text(text: str, name: str) -> None:
  """Raises ConfigError for surrogates, which stand for bytes of a command line that are no text."""
  try:
    text.encode()
  except UnicodeEncodeError:
    raise ConfigError(f"{name} {text[:40]!a} holds bytes that are no UTF-8") from None


def _complete(
  args: GenerateArgs,
  model: LoadedModel,
  decoder_of: Callable[[int], Decoder],
  sampling: Sampling,
  prompts: Sequence[str],
) -> list[Completion]:
  """Completes the prompts: prints a single text as it is generated, several when all are done."""
  longest = max(map(len, encode_prompts(model.tokenizer, prompts)))
  capacity = _capacity(longest + args.tokens)
  check_device_memory(model, len(prompts), capacity, f"--tokens {args.tokens}")
  decoder, streaming = decoder_of(capacity), len(prompts) == 1 and not args.json
  seeds = ((sampling.seed + i) % 2**32 for i in range(len(prompts)))
  samplings = [dataclasses.replace(sampling, seed=seed) for seed in seeds]
  steps = stream_completions(
    decoder,
    model.tokenizer,
    prompts,
    samplings,
    args.tokens,
    stop=args.stop,
    end_id=model.end_id,
    draft_tokens=args.draft_tokens,
  )
  if streaming:
    print(prompts[0], end="", flush=True)
  completions = []
  try:
    for completions, added in steps:  # noqa: B007 (the last ones are returned)
      if streaming:
        print(added[0], end="", flush=True)
  finally:  # after Ctrl-C too
    if streaming:
      print()
  if not streaming and not args.json:
    for completion in completions:
      print(completion.prompt + completion.text)
  return completions


def _converse(
  args: GenerateArgs, model: LoadedModel, decoder_of: Callable[[int], Decoder], sampling: Sampling
) -> int:
  log("a prompt a line; Ctrl-C ends a text, or at the prompt the command, as end of file does")
  try:
    for line in sys.stdin:
      if prompt := line.rstrip("\n"):
        _check_text(prompt, "the line")
        try:
          _complete(args, model, decoder_of, sampling, [prompt])
        except KeyboardInterrupt:
          log("stopped by Ctrl-C; the next prompt")
  except UnicodeDecodeError:
    raise ConfigError("--interactive: the input holds bytes that are no UTF-8") from None
  return 0


def _capacity(tokens: int) -> int:
  """The next power of two: few shapes to compile for prompts of many lengths."""
  return 1 << (tokens - 1).bit_length()


def _result(
  args: GenerateArgs,
  model: LoadedModel,
  row_source: RowSource | None,
  completions: list[Completion],
  seconds: float,
) -> dict[str, Any]:
  result = {
    "run": str(args.run),
    "step": model.step,
    "completions": [dataclasses.asdict(completion) for completion in completions],
    "tokens": sum(completion.tokens for completion in completions),
    "seconds_with_compilation": round(seconds, 3),
  }
  if isinstance(row_source, StoreRowSource):
    result["rows"] = row_source.telemetry.as_dict()
    result["levels"] = row_source.store.levels()
  return result
