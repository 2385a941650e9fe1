"""Trains a language model with a conditional memory.

    python train.py [--config configs/tiny.yaml] [--train.steps 20] [--any.field VALUE]

The same command again resumes a run that was stopped. The loop is below, from top to bottom.
"""

import contextlib
import itertools
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from engram_jax.cli import parse_config, run_command
from engram_jax.config import Config
from engram_jax.core import distributed
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.mesh import (
  batch_sharding,
  compute_dtype,
  make_mesh,
  process_indices,
  to_global,
)
from engram_jax.core.metrics import MetricsWriter
from engram_jax.core.periodic_saves import PeriodicSaves
from engram_jax.core.profiling import TraceWindow, matmul_peak
from engram_jax.core.resume import find_start
from engram_jax.core.run_changes import last_change, require_known_text, require_steps_left
from engram_jax.core.run_directory import (
  CHECKPOINTS,
  PROFILE,
  TOKENIZER,
  RunDirectory,
  check_config,
)
from engram_jax.core.signals import StopRequest
from engram_jax.data.pipeline import PreparedData, prepare
from engram_jax.errors import EXIT_STOPPED, ConfigError
from engram_jax.memory.vocabulary import check_fingerprint, check_tokenizer_file, encode_texts
from engram_jax.model.counts import count, flops_per_token
from engram_jax.training.divergence import Divergence, require_finite
from engram_jax.training.evaluate import evaluate, make_eval_step
from engram_jax.training.sample import complete, make_next_logits
from engram_jax.training.state import (
  TrainSetup,
  TrainState,
  flush,
  init_state,
  make_setup,
  restore_state,
  save_state,
  with_layout,
)
from engram_jax.training.step import NONFINITE_LEAF, make_train_step
from engram_jax.training.warm_start import find_warm_start

METRICS_SUMMARY = "metrics"  # in a checkpoint's meta: what metrics.jsonl held when it was saved
NOT_LOGGED = ("stop", NONFINITE_LEAF)


def main() -> int:
  cfg = parse_config("train.py", __doc__)
  if cfg.run.log_level == "debug":
    log_debug_messages()
  distributed.start(cfg.distributed)
  with StopRequest(has_work=False, say=log_anywhere) as stop:
    return train_run(cfg, stop)


def train_run(cfg: Config, stop: StopRequest) -> int:
  """Trains to the last step, or until it is stopped; returns the exit code."""
  train = cfg.train
  mesh = make_mesh(cfg.mesh_sizes(jax.device_count()))
  is_existing_run = check_config(cfg)

  # --- data, model and optimizers ----------------------------------------------------
  data = prepare(cfg, log)
  training, validation = data.training_pipeline(), data.validation_pipeline()
  layout, fingerprint = data.vocabulary.layout, data.fingerprint()
  setup = make_setup(cfg, layout, mesh)
  train_step, eval_step = make_train_step(setup), make_eval_step(setup)
  next_logits = make_next_logits(setup)
  flops = 3 * flops_per_token(cfg.model, cfg.data.sequence_length)  # forward and twice backward
  peak = mesh.size * matmul_peak(compute_dtype(cfg.model.dtype))
  warm_start = None  # another run's weights, for the first step of this one
  if train.init_from and not is_existing_run:
    warm_start = find_warm_start(train.init_from, setup, layout, fingerprint, log)
  if train.sample_tokens:  # now, and not when the first sample is made
    check_sample_prompt(train.sample_prompt, data)
  log_setup(cfg, data, flops, peak, mesh)

  with contextlib.ExitStack() as stack:
    run = stack.enter_context(RunDirectory(cfg, data.vocabulary.tokenizer.to_str()))
    distributed.keep_stacks_in(run.path)
    tables = stack.enter_context(setup.tables)
    checkpoints = stack.enter_context(
      Checkpoints(
        run.path / CHECKPOINTS, keep=train.keep_checkpoints, verify=train.verify_checkpoints
      )
    )

    if not train.verify_checkpoints:
      log("checkpoints are used without a look at their digests: train.verify_checkpoints=False")

    # --- a new run, or the newest checkpoint of an existing one -----------------------------
    start = find_start(cfg, run, checkpoints, log)
    require_steps_left(cfg, start or 0)
    meta = checkpoints.meta(start) if start is not None else {}
    if meta:
      check_fingerprint(meta, fingerprint, str(run.path))
      require_known_text(run.changes, meta, run.path)
    check_tokenizer_file(run.path / TOKENIZER, data.vocabulary.tokenizer_digest)
    if start == train.steps:
      log(f"{run.path} is finished ({start} steps); for another run choose another --run.name")
      return 0
    checkpoints.prepare()
    if start is None:
      start, state = 0, init_state(setup)
      if train.init_from:  # found above, unless this run was killed before its first checkpoint
        warm_start = warm_start or find_warm_start(train.init_from, setup, layout, fingerprint, log)
        state = warm_start.apply(state)
        log(f"weights of {warm_start.run}, step {warm_start.step}")
    else:
      state = restore_state(checkpoints, start, setup)
      log(f"resumed {run.path} after step {start}")
    state = with_layout(setup, state)
    for change in run.changes:
      log(f"from step {start + 1} on {change.field} is {change.now!r}, {change.before!r} before")
    run.write_changes(start)
    changed_after = last_change(run.path)

    # --- the loop ---------------------------------------------------------------------------
    writer = stack.enter_context(
      MetricsWriter(
        run.path, cfg.run.tensorboard, start, expected=meta.get(METRICS_SUMMARY), report=log
      )
    )
    saves = PeriodicSaves(checkpoints, train.failed_saves_limit, log)
    divergence = Divergence(setup, run.path, log)
    local_examples = process_indices(batch_sharding(mesh), train.batch_size)
    batches = stack.enter_context(contextlib.closing(training.iterate(start, local_examples)))
    batches = tables.prefetch(state.tables, batches)
    bar = stack.enter_context(progress(start, train.steps))
    trace = stack.enter_context(TraceWindow(train.profile_window, run.path / PROFILE))
    clock, previous, stop_agreed = Clock(), None, False
    for step in range(start + 1, train.steps + 1):
      batch = to_global(next(batches), mesh, train.batch_size)
      batch["stop"] = distributed.stop_flags(mesh, stop.requested)
      with trace.step(step):
        state, metrics = train_step(state, batch)
      stop.has_work = True
      if trace.end(step, metrics):
        log(f"trace of steps {train.profile} in {run.path / PROFILE}")
      if previous is not None:  # one step late, so that the device never waits for Python
        divergence.check(step - 1, previous)
        stop_agreed = int(previous["stop"]) > 0  # of any process: all stop after the same step
      previous, last = metrics, step == train.steps
      if last:  # before its checkpoint says that the run is finished
        divergence.check(step, metrics)
      bar.update()
      clock.count(train.batch_size * cfg.data.sequence_length)

      evaluating = last or step % train.eval_every == 0
      if evaluating or step % train.log_every == 0:
        values = {name: float(metrics[name]) for name in metrics if name not in NOT_LOGGED}
        values |= clock.read(flops, peak) | tables.counts(state.tables) | saves.metrics()
        if changed_after is not None:
          values["config_changed_after_step"] = changed_after
        report(step, values, bar)
        if evaluating:
          with clock.stopped(), contextlib.closing(validation.iterate()) as examples:
            eval_batches = itertools.islice(examples, train.eval_batches)
            state = flush(setup, state)
            result = evaluate(
              eval_step,
              setup,
              state,
              unless_hurried(stop, last, eval_batches),
              data.token_bytes,
              data.source_names,
              exact_bytes=data.bits_per_byte_problem is None,
            )
          if is_hurried(stop, last):
            log(f"step {step}: stopped before its validation loss was known")
          else:
            by_source = result.pop("by_source")
            values |= {f"validation/{k}": v for k, v in result.items() if v is not None}
            values |= {f"validation/source/{k}": v["loss"] for k, v in by_source.items()}
            bits = result["bits_per_byte"]
            log(
              f"step {step}: validation loss {result['loss']:.4f}, perplexity "
              f"{result['perplexity']:.2f}{'' if bits is None else f', {bits:.4f} bits per byte'}"
            )
        writer.write(step, values)
        require_finite(step, values.get("validation/loss", 0.0), state)
      sampling = last or (train.sample_every and step % train.sample_every == 0)
      if train.sample_tokens and sampling and not is_hurried(stop, last):
        with clock.stopped():
          (text,) = complete(
            next_logits,
            setup,
            state,
            data.vocabulary,
            [train.sample_prompt],
            train.sample_tokens,
            end_id=data.end_id,
          )
        writer.text(step, "sample", train.sample_prompt + text)
        log(f"step {step}: {train.sample_prompt}|{text}")
      stopping = stop_agreed if distributed.is_multiprocess() else stop.requested
      saving = step % train.checkpoint_every == 0 and divergence.is_sound(step, metrics)
      if saving or last or stopping:
        meta = fingerprint | {"next_batch": step, METRICS_SUMMARY: writer.summary()}
        with clock.stopped():
          saves.save(step, lambda: save(run, checkpoints, step, setup, state, meta))  # noqa: B023 (called at once)
      if last or stopping:
        saves.finish()
      if stopping and not last:
        by = stop.signal_name or "another process"
        log(f"stopped by {by}, step {step} saved; the same command resumes")
        return EXIT_STOPPED
  log(f"finished {run.path}; evaluate it with: python eval.py --run {run.path}")
  return 0


def check_sample_prompt(prompt: str, data: PreparedData) -> None:
  """Raises ConfigError for a prompt of which the tokenizer makes nothing."""
  name = f"train.sample_prompt={prompt!r}"
  (tokens,) = encode_texts(data.vocabulary.tokenizer, [prompt], name)
  if not tokens:
    raise ConfigError(
      f"{name}: the tokenizer makes no tokens of it; give another, or train.sample_tokens=0"
    )


def log_setup(cfg: Config, data: PreparedData, flops: float, peak: float, mesh: Mesh) -> None:
  """Logs data, sizes and devices of the run before it starts."""
  parts = count(cfg.model, data.vocabulary.layout)
  tokens = cfg.train.batch_size * cfg.data.sequence_length
  devices = jax.devices()
  for line in data.description:
    log(line)
  log(
    f"model: {parts.total_parameters:,} parameters without the token embedding, "
    f"{parts.active_parameters:,} active per token, {parts.memory_parameters:,} in memory tables"
  )
  if layout := data.vocabulary.layout:
    rows = (f"block {layer} has {layout.rows[layer]:,} rows" for layer in layout.layers)
    log("memory: " + ", ".join(rows))
  log(
    f"step: {cfg.train.batch_size} windows x {cfg.data.sequence_length} = {tokens:,} tokens, "
    f"{flops / 1e6:.1f} MFLOP a token; {cfg.train.steps} steps, {tokens * cfg.train.steps:,} tokens"
  )
  axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one"
  log(
    f"mesh: {axes}, of {mesh.size} {devices[0].platform} devices ({devices[0].device_kind}) in "
    f"{jax.process_count()} processes, measured matmul peak {peak / 1e9:.1f} GFLOP/s"
  )


def report(step: int, values: dict[str, float], bar: tqdm) -> None:
  """Shows one line of progress: in the bar on a terminal, by itself elsewhere."""
  shown = {
    "loss": f"{values['loss']:.4f}",
    "grad": f"{values['grad_norm']:.2f}",
    "lr": f"{values['learning_rate']:.1e}",
    "tokens/s": f"{values['tokens_per_second']:.0f}",
    "mfu": f"{values['mfu']:.0%}",
  }
  shown |= {k.replace("_mean/layer_", "@"): f"{v:.2f}" for k, v in values.items() if "gate" in k}
  shown |= {k.replace("_rows/layer_", "@"): f"{v:.0%}" for k, v in values.items() if "unique" in k}
  if "expert_balance" in values:
    shown["balance"] = f"{values['expert_balance']:.2f}"
  if values["nonfinite_total"]:
    shown["skipped"] = f"{values['nonfinite_total']:.0f}"
  if bar.disable:
    log(f"step {step}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))
  else:
    bar.set_postfix(shown)


def is_hurried(stop: StopRequest, last: bool) -> bool:
  """Says whether to leave out what only delays a stop; several processes would have to agree."""
  return stop.requested and not last and not distributed.is_multiprocess()


def unless_hurried(stop: StopRequest, last: bool, batches: Iterable[Any]) -> Iterator[Any]:
  """Gives batches until a stop is requested."""
  for batch in batches:
    if is_hurried(stop, last):
      return
    yield batch


def save(
  run: RunDirectory,
  checkpoints: Checkpoints,
  step: int,
  setup: TrainSetup,
  state: TrainState,
  meta: dict[str, Any],
) -> None:
  """Starts to save a step, unless the run's folder is no longer there."""
  run.require_present()
  save_state(checkpoints, step, setup, state, meta)


def progress(start: int, steps: int) -> tqdm:
  return tqdm(
    total=steps,
    initial=start,
    unit="step",
    disable=not (distributed.is_main() and sys.stderr.isatty()),
  )


def log(text: str) -> None:
  if distributed.is_main():
    log_anywhere(text)


def log_anywhere(text: str) -> None:
  """Logs in whichever process and thread it is called."""
  tqdm.write(text, file=sys.stderr)
  sys.stderr.flush()


def log_debug_messages() -> None:
  """Shows the package's messages at debug level, such as the start and the end of a save."""
  logger = logging.getLogger("engram_jax")
  logger.setLevel(logging.DEBUG)
  if not logger.handlers:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    logger.addHandler(handler)


class Clock:
  """Measures tokens per second of training alone, since the last reading."""

  def __init__(self):
    self._tokens, self._since = 0, time.perf_counter()

  def count(self, tokens: int) -> None:
    self._tokens += tokens

  @contextlib.contextmanager
  def stopped(self):
    begin = time.perf_counter()
    yield
    self._since += time.perf_counter() - begin

  def read(self, flops: float, peak: float) -> dict[str, float]:
    """Tokens a second and MFU; flops: of one token; peak: FLOP/s of the machine."""
    now = time.perf_counter()
    speed = self._tokens / (now - self._since)
    self._tokens, self._since = 0, now
    return {"tokens_per_second": speed, "mfu": speed * flops / peak}


if __name__ == "__main__":
  run_command(main)
