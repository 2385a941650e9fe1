"""Evaluates a run: loss, perplexity and bits per byte by source, with the memory on and off.

    python eval.py --run runs/tiny [--json] [--prompt "The capital of France is" ...]

Figures come from the validation documents of the run's own data.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import sys
from typing import Any

import jax
import tyro
from jax.sharding import Mesh

from engram_jax.cli import run_command
from engram_jax.commands.open_model import chosen_step
from engram_jax.config import Config
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.mesh import make_mesh
from engram_jax.core.run_directory import CHECKPOINTS, TOKENIZER, open_run
from engram_jax.data.pipeline import Prepared, prepare
from engram_jax.data.tokenizer import read_tokenizer
from engram_jax.errors import ConfigError
from engram_jax.memory.compress import tokenizer_digest
from engram_jax.memory.fingerprint import check_identity, identity
from engram_jax.training.evaluate import evaluate, make_eval_step
from engram_jax.training.host import saved
from engram_jax.training.host.host_rows import HostRows
from engram_jax.training.sample import complete, make_next_logits
from engram_jax.training.state import Recipe, TrainState, make_recipe, up_to_date


@dataclasses.dataclass(frozen=True)
class Args:
  run: pathlib.Path
  """Folder of a run that train.py wrote."""
  step: int | None = None
  """Checkpoint to evaluate; the newest one that is sound if left out."""
  batches: int | None = None
  """Validation batches to read; all of them if left out."""
  prompt: tuple[str, ...] = ()
  """Texts to continue, greedily and sampled; train.sample_prompt of the run if left out."""
  tokens: int = 40
  """Length of each continuation; 0 for none."""
  temperature: float = 0.8
  """Of the sampled continuation."""
  seed: int = 0
  """Of the sampled continuation."""
  json: bool = False
  """One JSON object on stdout, everything else on stderr."""


def main() -> int:
  args = tyro.cli(Args, prog="eval.py", description=__doc__)
  check(args)
  cfg = open_run(args.run)
  cfg = cfg.model_copy(
    update={"data": cfg.data.model_copy(update={"tokenizer": str(args.run / TOKENIZER)})}
  )
  say = lambda text: print(text, file=sys.stderr)
  with Checkpoints(args.run / CHECKPOINTS, keep=None) as checkpoints:
    step = chosen_step(checkpoints, args.run, args.step, say)
    meta = checkpoints.meta(step)
    words = tokenizer_digest(read_tokenizer(args.run / TOKENIZER))
    check_identity(meta, {"tokenizer_digest": words}, str(args.run))  # before tokenising with it
    data = prepare(cfg, say)
    meaning = identity(data.tokenizer_digest, data.compressor, data.layout, data.training.digest)
    check_identity(meta, meaning, str(args.run))
    recipe = make_recipe(cfg, data.layout, evaluation_mesh(cfg))
    with tables_on_host(recipe, data, args.run) as on_host:
      state = saved.restore(checkpoints, step, recipe, data.layout, on_host)
      state = up_to_date(recipe, state) if on_host is None else on_host.up_to_date(state)
      result = {"run": str(args.run), "step": step}
      result |= losses(recipe, state, data, args.batches, on_host)
      result["samples"] = samples(recipe, state, data, args, on_host)
  if args.json:
    print(json.dumps(result))
  else:
    show(result)
  return 0


def evaluation_mesh(cfg: Config) -> Mesh:
  """As many devices as divide the batch, so that tables and parameters are spread over them."""
  devices = jax.devices()[:1] if cfg.model.engram.on_host else jax.devices()
  parts = max(n for n in range(1, len(devices) + 1) if cfg.train.batch_size % n == 0)
  return make_mesh({"fsdp": parts}, devices[:parts])


def tables_on_host(
  recipe: Recipe, data: Prepared, run: pathlib.Path
) -> contextlib.AbstractContextManager[HostRows | None]:
  """The tables where the run's placement has them; None on the device."""
  if not recipe.config.model.engram.on_host:
    return contextlib.nullcontext()
  return HostRows(recipe, data.layout, run)


def check(args: Args) -> None:
  for name, lowest in (("step", 0), ("batches", 1), ("tokens", 0), ("temperature", 0), ("seed", 0)):
    value = getattr(args, name)
    if value is not None and value < lowest:
      raise ConfigError(f"--{name} {value} must be at least {lowest}")
  if "" in args.prompt:
    raise ConfigError("--prompt '' is empty; give some text to continue")


def losses(
  recipe: Recipe,
  state: TrainState,
  data: Prepared,
  batches: int | None,
  on_host: HostRows | None = None,
) -> dict:
  """{"memory_on": ..., "memory_off": ...}; without a memory only the first."""
  kinds = {"memory_on": True, "memory_off": False} if data.layout else {"memory_on": True}
  result = {}
  for name, memory in kinds.items():
    step = make_eval_step(recipe, memory=memory)
    step = step if on_host is None else on_host.evaluating(step)
    with contextlib.closing(data.validation_pipeline().iterate()) as windows:
      few = itertools.islice(windows, batches)
      result[name] = evaluate(step, state, few, data.token_bytes, data.sources)
  return result


def samples(
  recipe: Recipe,
  state: TrainState,
  data: Prepared,
  args: Args,
  on_host: HostRows | None = None,
) -> list[dict[str, str]]:
  prompts = args.prompt or (recipe.config.train.sample_prompt,)
  if not args.tokens:
    return []
  next_logits = make_next_logits(recipe.graphdef, recipe.config.model, recipe.mesh)
  next_logits = next_logits if on_host is None else on_host.completing(next_logits)
  greedy = complete(next_logits, state, data, prompts, args.tokens)
  drawn = complete(
    next_logits, state, data, prompts, args.tokens, temperature=args.temperature, seed=args.seed
  )
  keys = ("prompt", "greedy", "sampled")
  return [dict(zip(keys, texts, strict=True)) for texts in zip(prompts, greedy, drawn, strict=True)]


def show(result: dict[str, Any]) -> None:
  print(f"{result['run']}, step {result['step']}")
  print(f"{'memory':8}{'source':34}{'loss':>9}{'perplexity':>12}{'bits/byte':>11}{'tokens':>12}")
  for name in ("memory_on", "memory_off"):
    if name not in result:
      continue
    rows = {"all": result[name]} | result[name]["by_source"]
    for source, r in rows.items():
      print(
        f"{name.removeprefix('memory_'):8}{source[:33]:34}{r['loss']:9.4f}{r['perplexity']:12.2f}"
        f"{r['bits_per_byte']:11.4f}{r['tokens']:12,}"
      )
  for sample in result["samples"]:
    for kind in ("greedy", "sampled"):
      print(f"{kind}: {sample['prompt']}|{sample[kind]}")


if __name__ == "__main__":
  run_command(main)
