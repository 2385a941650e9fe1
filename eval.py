"""Evaluates a run: loss, perplexity and bits per byte by source, with the memory on and off.

    python eval.py --run runs/tiny [--json] [--prompt "The capital of France is" ...]
    python eval.py --run runs/tiny --score FILE [--json] [--special]

Figures come from the validation documents of the run's own data; with --score they are the
log-probability of each token of a text of yours.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
from typing import Any

import jax
import tyro
from jax.sharding import Mesh

from engram_jax.cli import require_text, run_command
from engram_jax.config import Config
from engram_jax.core.mesh import make_mesh
from engram_jax.core.run_directory import TOKENIZER
from engram_jax.data.pipeline import PreparedData, prepare
from engram_jax.errors import ConfigError
from engram_jax.memory.vocabulary import check_fingerprint
from engram_jax.tables.saved_run import load_run
from engram_jax.training.evaluate import evaluate, make_eval_step
from engram_jax.training.sample import complete, make_next_logits
from engram_jax.training.score import TextScores, read_text, score_text
from engram_jax.training.state import TrainSetup, TrainState, flush, make_setup, restore_state


@dataclasses.dataclass(frozen=True)
class Args:
  """Arguments of eval.py."""

  run: pathlib.Path
  """Folder of a run that train.py wrote."""
  step: int | None = None
  """Checkpoint to evaluate; the newest one that is sound if left out."""
  data_path: pathlib.Path | None = None
  """Folder or file of the run's text, where it has moved; its digest must be the same."""
  batches: int | None = None
  """Validation batches to read; all of them if left out."""
  prompt: tuple[str, ...] = ()
  """Texts to continue, greedily and sampled; train.sample_prompt of the run if left out."""
  tokens: int = 40
  """Length of each continuation; 0 for none."""
  temperature: float = 0.8
  """Temperature of the sampled continuation."""
  seed: int = 0
  """Seed of the sampled continuation."""
  score: str | None = None
  """A UTF-8 text, - for standard input: the log-probability of each of its tokens given all before
  it, with the memory on, in place of everything else."""
  special: bool = False
  """With --score: also the tokens that the tokenizer puts around a text."""
  json: bool = False
  """One JSON object on stdout, everything else on stderr."""


def main() -> int:
  args = tyro.cli(Args, prog="eval.py", description=__doc__)
  check(args)
  log = lambda text: print(text, file=sys.stderr)
  if args.score is not None:
    text = read_text(args.score)
    scores = score_text(args.run, args.step, text, log, special=args.special)
    (print_scores if args.json else show_scores)(args, scores)
    return 0
  with contextlib.ExitStack() as stack:
    saved = stack.enter_context(load_run(args.run, args.step, log))
    cfg = with_own_text(saved.config, args)
    data = prepare(cfg, log)
    check_fingerprint(saved.meta, data.fingerprint(), str(args.run))
    setup = make_setup(cfg, data.vocabulary.layout, evaluation_mesh(cfg))
    stack.enter_context(setup.tables)
    state = flush(setup, restore_state(saved.checkpoints, saved.step, setup))
    result: dict[str, Any] = {"run": str(args.run), "step": saved.step}
    result |= losses(setup, state, data, args.batches)
    result["samples"] = samples(setup, state, data, args)
  if data.bits_per_byte_problem is not None:
    log(f"no bits per byte: {data.bits_per_byte_problem}")
  if args.json:
    print(json.dumps(result))
  else:
    show(result)
  return 0


def with_own_text(cfg: Config, args: Args) -> Config:
  """The config with the run's own tokenizer, and its text where it lies now."""
  update = {"tokenizer": str(args.run / TOKENIZER)}
  if args.data_path is not None:
    if cfg.data.path is None:
      raise ConfigError(
        f"--data_path {args.data_path}: data.source={cfg.data.source!r} of the run is no file"
      )
    update["path"] = str(args.data_path)
  return cfg.model_copy(update={"data": cfg.data.model_copy(update=update)})


def evaluation_mesh(cfg: Config) -> Mesh:
  """A mesh of as many devices as divide the batch, over which tables and parameters are sharded."""
  devices = jax.devices()[:1] if cfg.model.engram.on_host else jax.devices()
  parts = max(n for n in range(1, len(devices) + 1) if cfg.train.batch_size % n == 0)
  return make_mesh({"fsdp": parts}, devices[:parts])


def check(args: Args) -> None:
  for name, lowest in (("step", 0), ("batches", 1), ("tokens", 0), ("temperature", 0), ("seed", 0)):
    value = getattr(args, name)
    if value is not None and value < lowest:
      raise ConfigError(f"--{name} {value} must be at least {lowest}")
  for name in ("batches", "data_path", "prompt", "tokens", "temperature", "seed"):
    default = Args.__dataclass_fields__[name].default
    if args.score is not None and getattr(args, name) != default:
      raise ConfigError(f"--{name} has no meaning with --score: leave either out")
  if args.special and args.score is None:
    raise ConfigError("--special is for --score FILE: give both, or leave it out")
  if "" in args.prompt:
    raise ConfigError("--prompt '' is empty; give some text to continue")
  for prompt in args.prompt:
    require_text("--prompt", prompt)


def losses(setup: TrainSetup, state: TrainState, data: PreparedData, batches: int | None) -> dict:
  """Evaluates with and without rows: {"memory_on": ..., "memory_off": ...}; without a memory only
  the first."""
  step, result = make_eval_step(setup), {}
  for name, memory in {"memory_on": True, "memory_off": False}.items():
    if not memory and not setup.tables.layers:
      continue
    with contextlib.closing(data.validation_pipeline().iterate()) as examples:
      eval_batches = itertools.islice(examples, batches)
      result[name] = evaluate(
        step,
        setup,
        state,
        eval_batches,
        data.token_bytes,
        data.source_names,
        memory=memory,
        exact_bytes=data.bits_per_byte_problem is None,
      )
  return result


def samples(
  setup: TrainSetup, state: TrainState, data: PreparedData, args: Args
) -> list[dict[str, str]]:
  """Continues each prompt, greedily and sampled."""
  prompts = args.prompt or (setup.config.train.sample_prompt,)
  no_text = setup.config.model.engram.is_control  # its rows follow from its own data alone
  if not args.tokens or (no_text and not args.prompt):
    return []
  continue_prompts = functools.partial(
    complete,
    make_next_logits(setup),
    setup,
    state,
    data.vocabulary,
    prompts,
    args.tokens,
    end_id=data.end_id,
  )
  greedy = continue_prompts()
  drawn = continue_prompts(temperature=args.temperature, seed=args.seed)
  keys = ("prompt", "greedy", "sampled")
  return [dict(zip(keys, texts, strict=True)) for texts in zip(prompts, greedy, drawn, strict=True)]


def show(result: dict[str, Any]) -> None:
  print(f"{result['run']}, step {result['step']}")
  has_bytes = result["memory_on"]["bits_per_byte"] is not None
  title = f"{'bits/byte':>11}" if has_bytes else ""
  print(f"{'memory':8}{'source':34}{'loss':>9}{'perplexity':>12}{title}{'tokens':>12}")
  for name in ("memory_on", "memory_off"):
    if name not in result:
      continue
    rows = {"all": result[name]} | result[name]["by_source"]
    for source, r in rows.items():
      bits = f"{r['bits_per_byte']:11.4f}" if has_bytes else ""
      print(
        f"{name.removeprefix('memory_'):8}{source[:33]:34}{r['loss']:9.4f}{r['perplexity']:12.2f}"
        f"{bits}{r['tokens']:12,}"
      )
  for sample in result["samples"]:
    for kind in ("greedy", "sampled"):
      print(f"{kind}: {sample['prompt']}|{sample[kind]}")


def print_scores(args: Args, scores: TextScores) -> None:
  result = {"run": str(args.run), "step": scores.step}
  for name in ("tokens", "logprobs", "loss", "bits_per_byte"):
    result[name] = getattr(scores, name)
  print(json.dumps(result))
  if scores.bits_per_byte_problem is not None:
    print(f"no bits per byte: {scores.bits_per_byte_problem}", file=sys.stderr)


def show_scores(args: Args, scores: TextScores) -> None:
  print(f"{args.run}, step {scores.step}")
  print(f"{'id':>8}{'logprob':>12}  token")
  logprobs = ["", *(f"{logprob:.4f}" for logprob in scores.logprobs)]  # the first is only read
  for token, logprob, text in zip(scores.tokens, logprobs, scores.texts, strict=True):
    print(f"{token:8}{logprob:>12}  {text!r}")
  bits = "" if scores.bits_per_byte is None else f", {scores.bits_per_byte:.4f} bits a byte"
  print(f"loss {scores.loss:.4f} nats a token{bits}, {len(scores.logprobs):,} tokens predicted")
  if scores.bits_per_byte_problem is not None:
    print(f"no bits per byte: {scores.bits_per_byte_problem}")


if __name__ == "__main__":
  run_command(main)
