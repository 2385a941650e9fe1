"""The sections of a config that describe the model, and the types that all sections are made of."""

import pathlib
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, model_validator

Positive = Annotated[int, Field(gt=0, lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Rate = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

MAX_ROWS = 2**31 - 1  # row ids are int32, offsets included


def module_names(folder: str) -> tuple[str, ...]:
  """Names of the modules in a folder of the package, none of which is imported."""
  found = (pathlib.Path(__file__).parents[1] / folder).glob("[a-z]*.py")
  return tuple(sorted(path.stem for path in found))


DIALECTS = module_names("memory/dialects")
TABLE_OPTIMIZERS = module_names("tables/optimizers")


class Frozen(pydantic.BaseModel):
  """An immutable section of a config, which refuses unknown fields, NaN and infinity."""

  model_config = pydantic.ConfigDict(
    frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
  )


def require(ok: bool, message: str) -> None:
  """Raises ValueError with the message unless `ok`."""
  if not ok:
    raise ValueError(message)


def require_unicode(name: str, text: str) -> None:
  """Raises ValueError for surrogates: bytes of a command line that are no UTF-8 become such."""
  try:
    text.encode()
  except UnicodeEncodeError:
    raise ValueError(f"{name}={text[:100]!a} holds bytes that are no UTF-8: give text") from None


class EngramConfig(Frozen):
  """The conditional memory (arXiv 2601.07372, section 2). `layers: []` is a model without one."""

  layers: tuple[Count, ...] = ()
  """0-based blocks that read a memory at their entry."""
  max_ngram: Annotated[int, Field(ge=2, le=8)] = 3
  """Suffix n-grams of orders 2 to this number."""
  heads: Positive = 8
  """Hash heads per order."""
  row_width: Positive = 64
  """C, width of one row."""
  rows_per_head: tuple[Positive, ...] = (646_400,)
  """Start of each order's prime search, one number per order; one number serves all orders."""
  seed: Count = 0
  """Seed of the hash multipliers."""
  pad_id: Count = 2
  """Raw id that stands before the start of a text."""
  dialect: Literal[DIALECTS] = "engram"  # ty: ignore[invalid-type-form]  # made at import
  """A file of memory/dialects."""
  compress: bool = True
  """Hash canonical ids; False: the tokenizer's own (the paper's ablation)."""
  address: Literal["ngrams", "token", "one_row", "other_window"] = "ngrams"
  """Controls of experiments, for training and losses alone: rows addressed by the token alone, one
  row a head for every token, or the rows of another window at the same place."""
  gate: Literal["signed_sqrt", "sigmoid", "none"] = "signed_sqrt"
  """none: the value is added as it is, and there are no keys."""
  projections: bool = True
  """False: the rows themselves are the value, for gate=none and rows as wide as the model."""
  bias: bool = False
  """On the key and value projections (the demo has it, V4.1 has not)."""
  conv_kernel: Count = 4
  """Taps of the causal depthwise convolution, dilated by max_ngram; 0 = none."""
  norm_eps: Annotated[float, Field(gt=0)] = 1.1920928955078125e-07
  """Key and query norms."""
  conv_norm_eps: Annotated[float, Field(gt=0)] = 1e-5
  reset_at_documents: bool = True
  """N-grams and convolution do not look across documents."""
  table_dtype: Literal["float32", "bfloat16"] = "float32"
  """Stored; bf16 rows are rounded stochastically when updated, with no f32 copy."""
  placement: Literal["device", "host", "file"] = "device"
  """The place of tables and their optimizer's state while training: on the accelerators, in the
  memory of their host, or in sparse files in the run's folder; the last two for one device."""
  exchange_capacity: Annotated[float, Field(gt=0)] = 1.25
  """Rows one exchange can carry, over a batch's lookups; what is above travels in more rounds."""

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
      rows = tuple(rows) * min(max(orders - 1, 1), 8)  # more orders are refused
    return {**data, "rows_per_head": rows}

  @model_validator(mode="after")
  def _check(self) -> "EngramConfig":
    orders = self.max_ngram - 1
    require(
      len(self.rows_per_head) == orders,
      f"rows_per_head has {len(self.rows_per_head)} numbers but max_ngram={self.max_ngram} "
      f"has {orders} orders (2..{self.max_ngram}): give one number, or {orders}",
    )
    require(
      len(set(self.layers)) == len(self.layers), f"layers={list(self.layers)} names a layer twice"
    )
    require(
      tuple(sorted(self.layers)) == self.layers,
      f"layers={list(self.layers)} must be in rising order: {sorted(self.layers)}",
    )
    require(
      self.projections or (self.gate == "none" and not self.bias),
      f"projections=False leaves no keys to a gate={self.gate!r} and nothing to add a "
      f"bias={self.bias} to: give gate=none and bias=False",
    )
    rows = self.heads * sum(self.rows_per_head)
    require(
      rows <= MAX_ROWS,
      f"a table of {rows:,} rows (heads={self.heads} x rows_per_head={list(self.rows_per_head)}) "
      f"has no int32 row ids: at most {MAX_ROWS:,}",
    )
    return self

  @property
  def on_host(self) -> bool:
    """Says whether there are tables, and they are not on the accelerators."""
    return bool(self.layers) and self.placement != "device"

  @property
  def is_control(self) -> bool:
    """Says whether rows are addressed by something else than the n-grams of a text."""
    return bool(self.layers) and self.address != "ngrams"

  @property
  def hash_heads(self) -> int:
    """J, rows looked up per token: orders x heads."""
    return (self.max_ngram - 1) * self.heads

  @property
  def memory_width(self) -> int:
    """M = J C, width of the vector that one token retrieves."""
    return self.hash_heads * self.row_width


class YarnConfig(Frozen):
  """YaRN length extension of the rotary frequencies (arXiv 2309.00071); scale 1 is plain RoPE."""

  scale: Annotated[float, Field(ge=1)] = 1.0
  alpha: Annotated[float, Field(gt=0)] = 1.0
  """Rotations below which a frequency is interpolated."""
  beta: Annotated[float, Field(gt=0)] = 32.0
  """Rotations above which it is left alone."""
  original_length: Positive = 4096
  attention_factor: Annotated[float, Field(gt=0)] = 0.707
  """Logits scale by (0.1 attention_factor ln scale + 1)^2."""

  @model_validator(mode="after")
  def _check(self) -> "YarnConfig":
    require(self.alpha < self.beta, f"alpha={self.alpha} must be below beta={self.beta}")
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
  kernel: Literal["auto", "plain", "flash"] = "auto"
  """Auto: plain on CPU, a flash kernel on accelerators."""

  @model_validator(mode="after")
  def _check(self) -> "AttentionConfig":
    require(self.rope_dim % 2 == 0, f"rope_dim={self.rope_dim} must be even: it rotates pairs")
    return self


class MoEConfig(Frozen):
  """DeepSeekMoE feed-forward with loss-free balancing (arXiv 2401.06066, 2408.15664)."""

  routed_experts: Count = 16
  """Number of routed experts; 0 = every block has a dense feed-forward."""
  top_k: Positive = 2
  shared_experts: Count = 1
  expert_width: Positive = 128
  leading_dense_layers: Count = 1
  dense_width: Positive = 384
  bias_step: Rate = 1e-3
  """Distance by which an expert's bias moves against its load after each step."""
  route_scale: Annotated[float, Field(gt=0)] = 1.0
  dispatch: Literal["auto", "blocked", "ragged", "dense"] = "auto"
  """Auto: blocked on CPU."""

  @model_validator(mode="after")
  def _check(self) -> "MoEConfig":
    if self.routed_experts:
      require(
        self.top_k <= self.routed_experts,
        f"top_k={self.top_k} is above routed_experts={self.routed_experts}",
      )
    return self


class ResidualConfig(Frozen):
  """Manifold-constrained hyper-connections (arXiv 2512.24880); one branch = a plain residual."""

  branches: Positive = 4
  """G, branches of the residual stream."""
  sinkhorn_iterations: Positive = 20
  initial_scale: Rate = 0.01
  """Initial scale of the input-dependent part of the mixing."""


class ModelConfig(Frozen):
  """The mixture-of-experts language model."""

  vocab_size: Positive = 4096
  """V, token ids."""
  width: Positive = 128
  """D, model width."""
  layers: Positive = 4
  tie_embeddings: bool = False
  norm_eps: Annotated[float, Field(gt=0)] = 1e-6
  init_std: Annotated[float, Field(gt=0)] = 0.02
  dtype: Literal["auto", "float32", "bfloat16"] = "auto"
  """Compute; auto: f32 on CPU, else bf16."""
  scan_layers: bool = False
  """One compiled body for each run of equal blocks; blocks with a memory stand alone."""
  remat: Literal["none", "dots", "block"] = "none"
  """Parts that the backward pass computes again: none, all but matrix products, full blocks."""
  attention: AttentionConfig = AttentionConfig()
  moe: MoEConfig = MoEConfig()
  residual: ResidualConfig = ResidualConfig()
  engram: EngramConfig = EngramConfig()

  @model_validator(mode="after")
  def _check(self) -> "ModelConfig":
    over = [layer for layer in self.engram.layers if layer >= self.layers]
    require(
      not over,
      f"engram.layers={list(self.engram.layers)} names block {max(over, default=0)} "
      f"but layers={self.layers} has blocks 0..{self.layers - 1}",
    )
    dense = self.moe.leading_dense_layers
    require(dense <= self.layers, f"moe.leading_dense_layers={dense} is above layers={self.layers}")
    if self.engram.layers:
      require(
        self.engram.pad_id < self.vocab_size,
        f"engram.pad_id={self.engram.pad_id} is outside vocab_size={self.vocab_size}",
      )
      require(
        self.engram.projections or self.engram.memory_width == self.width,
        f"engram.projections=False adds rows of {self.engram.memory_width} numbers a token (orders "
        f"x heads x row_width) to a model of width={self.width}: they must be equal",
      )
    return self

  def is_moe(self, layer: int) -> bool:
    """Says whether block `layer` (0-based) has routed experts."""
    return self.moe.routed_experts > 0 and layer >= self.moe.leading_dense_layers
