"""A trained run opened for inference: its model, tokenizer, and rows from where they are wanted."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from engram_jax.config import Config
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.run_directory import CHECKPOINTS, TOKENIZER, open_run
from engram_jax.data.pipeline import Prepared, prepare
from engram_jax.data.tokenizer import end_of_text_id, read_tokenizer
from engram_jax.errors import ConfigError
from engram_jax.inference.cache import HostCache
from engram_jax.inference.cache_counts import IdCounts, count_ids, hot_ids
from engram_jax.inference.cache_device import DeviceCache
from engram_jax.inference.decoder import RowSource, Weights
from engram_jax.inference.prefetch import StoreRows
from engram_jax.inference.rows_on_device import DeviceRows
from engram_jax.inference.store.file import FileRows
from engram_jax.inference.store.host import HostRows
from engram_jax.memory.compress import TokenCompressor, tokenizer_digest
from engram_jax.memory.hashing import HashLayout
from engram_jax.memory.table import padded_rows
from engram_jax.model.lm import LM
from engram_jax.model.moe import RouterBias
from engram_jax.training.identity import check_identity
from engram_jax.training.saved_rows import saved_rows

Placement = Literal["device", "host", "file"]
COUNTED_AT_ONCE = 64  # windows


@dataclasses.dataclass(frozen=True)
class Opened:
  """One step of a run."""

  config: Config
  step: int
  weights: Weights
  tokenizer: tokenizers.Tokenizer
  end_id: int
  run: pathlib.Path

  def tables(self) -> list[np.ndarray]:
    """[R_padded, C] of each memory in host memory, in the dtype it was trained in."""
    layout, engram = self.weights.layout, self.config.model.engram
    out = []
    with Checkpoints(self.run / CHECKPOINTS, keep=None) as checkpoints:
      for layer in layout.layers if layout else ():
        shape = (padded_rows(layout.rows[layer]), engram.row_width)
        table, start = np.zeros(shape, jnp.dtype(engram.table_dtype)), 0
        for rows_UC in saved_rows(checkpoints, self.step, self.config, layout, layer):
          table[start : start + len(rows_UC)] = rows_UC
          start += len(rows_UC)
        out.append(table)
    return out

  def data(self) -> Prepared:
    """Its training and validation text, as train.py prepared it; from the cache where it can."""
    data = self.config.data.model_copy(update={"tokenizer": str(self.run / TOKENIZER)})
    return prepare(self.config.model_copy(update={"data": data}), lambda _: None)

  def source(self, stack: contextlib.ExitStack, where: "Rows") -> RowSource | None:
    """Rows of this step from where they are wanted; None without a memory.

    stack: what is opened is closed with it.
    """
    layout, compressor = self.weights.layout, self.weights.compressor
    where.check(layout is not None)
    if layout is None:
      return None
    if where.placement == "device":
      return DeviceRows(layout, compressor.table, tuple(map(jax.device_put, self.tables())))
    if where.placement == "host":
      store = HostRows.from_tables(self.tables(), layout, compressor.digest)
    else:
      store = FileRows(where.table)
    stack.enter_context(store)
    store.require(layout, compressor.digest, f"--table {where.table}")
    if where.host_cache_mib:
      store = stack.enter_context(HostCache(store, where.host_cache_mib << 20))
    if where.device_cache_rows:
      hot = hot_ids(self.counts(), where.device_cache_rows)
      store = stack.enter_context(DeviceCache(store, hot))
    return stack.enter_context(StoreRows(store, compressor))

  def counts(self) -> list[IdCounts]:
    """How often each row occurs in the training text."""
    windows = self.data().training_pipeline(1).windows
    starts = range(0, len(windows), COUNTED_AT_ONCE)
    batches = (np.arange(s, min(s + COUNTED_AT_ONCE, len(windows))) for s in starts)
    return count_ids(
      (windows(batch)["row_ids"] for batch in batches), len(self.weights.layout.layers)
    )


@dataclasses.dataclass(frozen=True)
class Rows:
  """Where a model's tables are while it generates."""

  placement: Placement = "device"
  """On the device, in host memory, or in the file of --table."""
  table: pathlib.Path | None = None
  """A file that `convert table` wrote."""
  device_cache_rows: int = 0
  """Rows most frequent in the training text that stay on the device; with host or file."""
  host_cache_mib: int = 0
  """Memory for rows of the file that were asked for often; with file."""

  def check(self, memory: bool = True) -> None:
    """ConfigError where two of them contradict; memory: whether the model has one."""
    for ok, message in (
      (
        (self.placement == "file") == (self.table is not None),
        f"--placement {self.placement} with --table {self.table}: a file of `convert table` goes "
        "with --placement file, and only with it",
      ),
      (
        self.device_cache_rows >= 0 and self.host_cache_mib >= 0,
        f"--device_cache_rows {self.device_cache_rows} and --host_cache_mib {self.host_cache_mib} "
        "must be at least 0",
      ),
      (
        not self.device_cache_rows or self.placement != "device",
        f"--device_cache_rows {self.device_cache_rows}: with --placement device all rows are there",
      ),
      (
        not self.host_cache_mib or self.placement == "file",
        f"--host_cache_mib {self.host_cache_mib} is a cache over a file, not over --placement "
        f"{self.placement}",
      ),
      (
        memory or self == Rows(),
        "this run was trained without a memory: it has no tables to place",
      ),
    ):
      if not ok:
        raise ConfigError(message)


def open_model(run: pathlib.Path, step: int | None, say: Callable[[str], None]) -> Opened:
  """The parameters of a run's step (the newest sound one if None); neither its corpus nor its
  optimizer is read.

  Raises ConfigError for a folder that is no run, a step that is not saved, or a tokenizer that is
  not the one it was trained with; StorageError for damaged files.
  """
  cfg = open_run(run)
  with Checkpoints(run / CHECKPOINTS, keep=None) as checkpoints:
    step = chosen_step(checkpoints, run, step, say)
    meta = checkpoints.meta(step)
    tokenizer = read_tokenizer(run / TOKENIZER)
    check_identity(meta, {"tokenizer_digest": tokenizer_digest(tokenizer)}, str(run))
    compressor = _token_map(cfg, tokenizer)
    layout = meta["hash_layout"] and HashLayout.from_description(meta["hash_layout"])
    if layout:
      check_identity(meta, {"token_map_digest": compressor.digest}, str(run))
    model = nnx.eval_shape(lambda: LM(cfg.model, rngs=nnx.Rngs(0)))
    graphdef, params, biases = nnx.split(model, nnx.Param, RouterBias)
    like = {"params": nnx.to_pure_dict(params), "biases": nnx.to_pure_dict(biases)}
    state = checkpoints.restore(step, like, partial=True)
  weights = Weights(cfg.model, graphdef, state["params"], state["biases"], layout, compressor)
  return Opened(cfg, step, weights, tokenizer, end_of_text_id(tokenizer), run)


def chosen_step(
  checkpoints: Checkpoints, run: pathlib.Path, step: int | None, say: Callable[[str], None]
) -> int:
  """The step asked for, or the newest sound one."""
  if step is None:
    newest = checkpoints.newest_valid(say)
    if newest is None:
      raise ConfigError(f"--run {run} holds no sound checkpoint yet; train it first")
    return newest
  if step not in checkpoints.steps():
    raise ConfigError(f"--step {step} is not saved in {run}: {checkpoints.steps()} are")
  return step


def _token_map(cfg: Config, tokenizer: tokenizers.Tokenizer) -> TokenCompressor:
  if cfg.model.engram.dialect == "qwen_ple":
    return TokenCompressor.identity(cfg.model.vocab_size)
  return TokenCompressor.from_tokenizer(tokenizer)
