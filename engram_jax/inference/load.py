"""A trained run loaded for inference: its model, its tokenizer, and its rows from any placement."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Generator, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from engram_jax.config import Config
from engram_jax.core.run_directory import TOKENIZER
from engram_jax.data.pipeline import PreparedData, prepare
from engram_jax.data.tokenizer import end_of_text_id
from engram_jax.errors import ConfigError
from engram_jax.inference.decoder import RowSource, Weights
from engram_jax.inference.row_sources import DeviceRowSource, StoreRowSource
from engram_jax.inference.state import empty_state
from engram_jax.inference.stores.cache import HostCache
from engram_jax.inference.stores.device_cache import DeviceCache, IdCounts, count_ids, hot_ids
from engram_jax.inference.stores.file import FileRows
from engram_jax.inference.stores.host import HostRows
from engram_jax.memory.hash_layout import HashLayout
from engram_jax.memory.table import padded_rows
from engram_jax.memory.vocabulary import require_ngrams
from engram_jax.model.lm import LM
from engram_jax.model.router import RouterBias
from engram_jax.tables.saved_run import SavedRun, load_run

Placement = Literal["device", "host", "file"]
COUNT_BATCH = 64  # packed examples
MAX_CONTEXT = 1 << 20  # tokens of a request
MAX_DEADLINE = 24 * 60 * 60  # seconds


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """One step of a run, ready for inference.

  end_id: the token that ends a text. digest: SHA-256 of the checkpoint.
  """

  config: Config
  step: int
  weights: Weights
  tokenizer: tokenizers.Tokenizer
  end_id: int
  run: pathlib.Path
  digest: str

  def tables(self) -> list[np.ndarray]:
    """[R_padded, C] of each memory in host memory, in the dtype it was trained in."""
    layout, engram, tables = self.weights.layout, self.config.model.engram, []
    if layout is None:
      return tables
    with self._open_blocks() as blocks:
      for layer in layout.layers:
        shape = (padded_rows(layout.rows[layer]), engram.row_width)
        table_RC, start = np.zeros(shape, jnp.dtype(engram.table_dtype)), 0
        for block in blocks(layer):
          table_RC[start : start + len(block)] = block
          start += len(block)
        tables.append(table_RC)
    return tables

  def host_store(self) -> HostRows:
    """All memories in host memory, in the dtype they were trained in; never held twice."""
    engram, layout = self.config.model.engram, self._require_layout()
    kind = "bf16" if engram.table_dtype == "bfloat16" else "f32"
    digest = self.weights.compressor.digest
    with self._open_blocks() as blocks:
      return HostRows.from_blocks(blocks, layout, digest, engram.row_width, kind=kind)

  def open_table_file(self, path: pathlib.Path, *, verify: bool = True) -> FileRows:
    """The file that `convert table` wrote of this step; ConfigError for one of anything else.

    verify: see `FileRows`.
    """
    store = FileRows(path, verify=verify)
    try:
      self._require_same_step(store, f"--table {path}")
    except ConfigError:
      store.close()
      raise
    return store

  def _require_layout(self) -> HashLayout:
    assert self.weights.layout is not None, "a model without a memory has no rows"
    return self.weights.layout

  def _require_same_step(self, store: FileRows, name: str) -> None:
    source, width = store.header.source, self.config.model.engram.row_width
    expected = f"step {self.step} of run {self.run.resolve().name}"
    remedy = f"`convert table --run {self.run} --step {self.step} --to FILE` writes one"
    if "digest" not in source:
      raise ConfigError(
        f"{name} holds rows of no run that train.py wrote, not of {expected}: {remedy}"
      )
    if source["digest"] != self.digest:
      known = {"step": "an unknown step", "run": "unnamed"} | source
      actual = f"step {known['step']} of run {known['run']}"
      if actual == expected:
        raise ConfigError(f"{name} holds rows of another training of {expected}: {remedy}")
      raise ConfigError(
        f"{name} holds rows of {actual}, not of {expected}: give its --step, or {remedy}"
      )
    if store.width != width:
      raise ConfigError(
        f"{name} has rows of width {store.width}, and {expected} of {width}: {remedy}"
      )
    store.require(self._require_layout(), self.weights.compressor.digest, name)

  @contextlib.contextmanager
  def _open_blocks(self) -> Generator[Callable[[int], Iterator[np.ndarray]]]:
    """Yields a function from a layer's id to blocks of its rows, in order."""
    with load_run(self.run, self.step, lambda _: None) as saved:
      yield saved.rows

  def data(self) -> PreparedData:
    """Its training and validation text, as train.py prepared it; from the cache where it can."""
    data = self.config.data.model_copy(update={"tokenizer": str(self.run / TOKENIZER)})
    return prepare(self.config.model_copy(update={"data": data}), lambda _: None)

  def open_row_source(
    self,
    stack: contextlib.ExitStack,
    args: "PlacementArgs",
    log: Callable[[str], None] = lambda _: None,
  ) -> RowSource | None:
    """Rows of this step, placed as `args` say; None without a memory.

    Args:
      stack: closes everything that is opened here.
      log: is told if rows of a file are not verified, or only in large blocks.
    """
    layout, compressor = self.weights.layout, self.weights.compressor
    args.check(layout is not None)
    if layout is None:
      return None
    if args.placement == "device":
      return DeviceRowSource(layout, compressor.table, tuple(map(jax.device_put, self.tables())))
    if args.table is None:
      store = self.host_store()
    else:
      store = self.open_table_file(args.table, verify=args.verify)
      if not args.verify:
        log(f"--no-verify: rows of {args.table} are used without comparing its checksums")
      elif store.header.version == 1 and args.placement == "file":
        log(
          f"{args.table} has format 1: a first row is verified with the MiB around it, with the "
          "4 KiB in a file that `convert table` writes now"
        )
      if args.placement == "host":
        with store as file:
          store = file.in_memory()
    stack.enter_context(store)
    if args.host_cache_mib:
      store = stack.enter_context(HostCache(store, args.host_cache_mib << 20))
    if args.device_cache_rows:
      hot = hot_ids(self.count_rows(), args.device_cache_rows)
      store = stack.enter_context(DeviceCache(store, hot))
    return stack.enter_context(StoreRowSource(store, compressor, deadline=args.deadline))

  def count_rows(self) -> list[IdCounts]:
    """Counts how often each row occurs in the training text."""
    examples = self.data().training_pipeline(1).examples
    starts = range(0, len(examples), COUNT_BATCH)
    batches = (np.arange(s, min(s + COUNT_BATCH, len(examples))) for s in starts)
    return count_ids(
      (examples(batch)["row_ids"] for batch in batches), len(self._require_layout().layers)
    )


@dataclasses.dataclass(frozen=True)
class PlacementArgs:
  """Options that place a model's tables during generation."""

  placement: Placement = "device"
  """On the device, in host memory, or in the file of --table."""
  table: pathlib.Path | None = None
  """A file that `convert table` wrote of this step; with file, or with host to load it."""
  device_cache_rows: int = 0
  """Rows most frequent in the training text that stay on the device; with host or file."""
  host_cache_mib: int = 0
  """Memory for rows of the file that were asked for often; with file."""
  deadline: float | None = None
  """Seconds that one memory's read may take with host or file, an error after that; None waits."""
  verify: bool = True
  """Compare rows of --table with its checksums before use; --no-verify trusts the file."""

  def check(self, memory: bool = True) -> None:
    """Raises ConfigError for options that contradict each other; memory: the model has one."""
    for ok, message in (
      (
        self.placement == "host" or (self.placement == "file") == (self.table is not None),
        f"--placement {self.placement} "
        + ("without --table" if self.table is None else f"with --table {self.table}")
        + ": a file of `convert table` goes with --placement file, which needs one, or with host",
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
        self.host_cache_mib << 20 <= memory_bytes(),
        f"--host_cache_mib {self.host_cache_mib} is more than the {memory_bytes() >> 20} MiB that "
        "this machine has",
      ),
      (
        self.deadline is None or 0 < self.deadline <= MAX_DEADLINE,
        f"--deadline {self.deadline} must be above 0 and at most {MAX_DEADLINE} seconds",
      ),
      (
        self.verify or self.table is not None,
        "--no-verify is for rows of a file: it goes with --table FILE",
      ),
      (
        memory or dataclasses.replace(self, deadline=None) == PlacementArgs(),
        "this run was trained without a memory: it has no tables to place",
      ),
    ):
      if not ok:
        raise ConfigError(message)


def load_model(run: pathlib.Path, step: int | None, log: Callable[[str], None]) -> LoadedModel:
  """Loads the parameters of a run's step (the newest sound one if None); neither its corpus nor its
  optimizer is read. Raises like `load_run`."""
  with load_run(run, step, log) as saved:
    cfg, vocabulary = saved.config, saved.vocabulary
    require_ngrams(vocabulary.address)
    model = nnx.eval_shape(lambda: LM(cfg.model, rngs=nnx.Rngs(0)))
    graphdef, params, biases = nnx.split(model, nnx.Param, RouterBias)
    like = {"params": nnx.to_pure_dict(params), "biases": nnx.to_pure_dict(biases)}
    state = saved.checkpoints.restore(saved.step, like, partial=True)
    weights = Weights(
      cfg.model,
      graphdef,
      state["params"],
      state["biases"],
      vocabulary.layout,
      vocabulary.compressor,
    )
    end_id = end_of_text_id(saved.tokenizer, cfg.data.end_of_text)
    return LoadedModel(cfg, saved.step, weights, saved.tokenizer, end_id, run, saved.digest)


def table_provenance(saved: SavedRun) -> dict[str, Any]:
  """The entry of a table file's header that names the run and step its rows come from."""
  return {"run": saved.path.resolve().name, "step": saved.step, "digest": saved.digest}


def memory_bytes() -> int:
  """Bytes of this machine's memory."""
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_device_memory(model: LoadedModel, batch: int, capacity: int, options: str) -> None:
  """Raises ConfigError if the state of `batch` requests of `capacity` tokens exceeds the device's
  memory; options: those of the command that ask for it, for the message."""
  cfg, layout = model.weights.cfg, model.weights.layout
  state = jax.eval_shape(lambda: empty_state(cfg, layout, batch, capacity))
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit") or memory_bytes()
  if size > limit:
    raise ConfigError(
      f"{options}: {batch} requests of {capacity:,} tokens keep {size:,} bytes, but the device has "
      f"{limit:,}"
    )
