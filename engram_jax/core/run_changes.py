"""The fields that may differ from one start of a run to the next, and how the others are refused.

Three kinds. What changes no step is free: folders, devices and programs (which may change last
digits), what is logged, evaluated and saved. So is where the text lies, since a checkpoint knows
its text and tokenizer by their digests. What changes the steps to come (their number, the rates,
the order of windows) is taken with `run.extend`, from the newest checkpoint on, and written down.
Everything else is another run.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from engram_jax.config import Config
from engram_jax.core.manifest import replace_file
from engram_jax.errors import ConfigError

HISTORY = "config.changes.jsonl"

# A name that ends in a dot stands for all fields below it.
FREE = (
  "run.root",
  "run.tensorboard",
  "run.start_over",
  "run.extend",
  "run.log_level",
  "train.failed_saves_limit",
  "train.nonfinite_limit",
  "train.verify_checkpoints",
  "train.keep_checkpoints",
  "train.checkpoint_every",
  "train.log_every",
  "train.eval_every",
  "train.eval_batches",
  "train.sample_every",
  "train.sample_prompt",
  "train.sample_tokens",
  "train.profile",
  "train.accumulate",
  "train.loss_chunk",
  "data.threads",
  "data.workers",
  "data.cache",
  "mesh.",
  "distributed.",
  "model.attention.kernel",
  "model.scan_layers",
  "model.remat",
  "model.moe.dispatch",
  "model.engram.exchange_capacity",
  "model.engram.placement",
)
# Compared by the digests of the text and of the tokenizer that every checkpoint holds.
BY_DIGEST = (
  "data.source",
  "data.path",
  "data.text_field",
  "data.source_field",
  "data.bad_rows",
  "data.tokenizer",
  "data.end_of_text",
)
EXTENDABLE = (
  "train.steps",
  "train.z_loss",
  "train.schedule.",
  "train.optimizer.learning_rate",
  "train.optimizer.weight_decay",
  "train.optimizer.momentum",
  "train.optimizer.newton_schulz_steps",
  "train.optimizer.beta1",
  "train.optimizer.beta2",
  "train.optimizer.eps",
  "train.optimizer.clip_norm",
  "train.optimizer.table_rate",
  "model.moe.bias_step",
  "data.seed",
)


class Change(NamedTuple):
  """A field's value in a run's config.yaml and the one it has now."""

  field: str
  before: Any
  now: Any


def find_changes(saved: Config, cfg: Config) -> list[Change]:
  """The changes that are to be written down when a run goes on.

  Raises ConfigError, naming every field, where one may not change, or not without `run.extend`.
  """
  different = [
    Change(field, before, now)
    for (field, before), now in zip(
      _flat(saved.model_dump(mode="json")).items(),
      _flat(cfg.model_dump(mode="json")).values(),
      strict=True,
    )
    if before != now and not _is_named(field, FREE)
  ]
  kept = [c for c in different if not _is_named(c.field, BY_DIGEST)]
  fixed = [c for c in kept if not _is_named(c.field, EXTENDABLE)]
  if fixed or (kept and not cfg.run.extend):
    raise ConfigError(_refusal(cfg, fixed or kept, can_extend=not fixed))
  return different


def _refusal(cfg: Config, changes: Sequence[Change], *, can_extend: bool) -> str:
  lines = "\n".join(f"  {c.field}: {c.before!r} there, {c.now!r} now" for c in changes)
  advice = "give the same values to resume it, or another --run.name"
  if can_extend:
    advice += "; --run.extend True goes on with the new ones from its newest checkpoint"
  return (
    f"run.name={cfg.run.name!r}: {cfg.run.directory} was made with another config:\n{lines}\n"
    f"{advice}"
  )


def last_change(folder: pathlib.Path) -> int | None:
  """The step after which the newest change to a run's steps holds; None where there is none."""
  path = folder / HISTORY
  lines = path.read_text().splitlines() if path.exists() else []
  entries = [json.loads(line) for line in lines]
  steps = [e["after_step"] for e in entries if not set(e["changes"]) <= set(BY_DIGEST)]
  return steps[-1] if steps else None


def require_known_text(changes: Sequence[Change], meta: dict[str, Any], run: pathlib.Path) -> None:
  """ConfigError where text has moved, and a checkpoint of before does not know all of it."""
  moved = [c.field for c in changes if c.field in BY_DIGEST]
  if moved and meta and "validation_content_digest" not in meta:
    raise ConfigError(
      f"{run} was trained by an older version, whose checkpoints do not know all their text: "
      f"{', '.join(moved)} must be as they were there"
    )


def require_steps_left(cfg: Config, start: int) -> None:
  """ConfigError where a run is already beyond the steps that it is to have."""
  if start > cfg.train.steps:
    raise ConfigError(
      f"train.steps={cfg.train.steps}: {cfg.run.directory} has made {start} steps already; give "
      "more, or another --run.name"
    )


def write_changes(
  folder: pathlib.Path, config_name: str, cfg: Config, step: int, changes: Sequence[Change]
) -> None:
  """Writes the changes to the history of a run, then its config.yaml.

  step: after which they hold.
  """
  history = folder / HISTORY
  before = history.read_bytes() if history.exists() else b""
  entry = {
    "after_step": step,
    "changes": {c.field: {"before": c.before, "now": c.now} for c in changes},
  }
  line = json.dumps(entry).encode() + b"\n"
  if not before.endswith(line):  # a start that was killed between the two files wrote it already
    replace_file(history, before + line)
  replace_file(folder / config_name, cfg.to_yaml().encode())


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    nested = isinstance(value, dict)
    flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
  return flat


def _is_named(field: str, names: Sequence[str]) -> bool:
  return any(field.startswith(name) if name.endswith(".") else field == name for name in names)
