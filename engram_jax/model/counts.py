"""Parameters and FLOPs of a config, by arithmetic: no array is made and no jax imported.

The published sums have different parts, so every part has a number (`Counts`) and each sum names
those that it adds up. The paper's "total" counts one vocabulary matrix and the memory's tables, its
"active" no vocabulary matrix and of the tables only the rows that one token looks up.
"""

import dataclasses

from engram_jax.config import ModelConfig
from engram_jax.memory.compress import TokenCompressor
from engram_jax.memory.hash_layout import HashLayout


@dataclasses.dataclass(frozen=True)
class Counts:
  """Stored numbers of each part, all layers together, then what one token uses of them.

  The balancing biases of the routers are state, not parameters, and not counted; nor are the pad
  rows of the stored tables.
  """

  embedding: int  # [V, D]
  head: int  # [D, V]; 0 when tied
  attention: int  # w_*: the latent's and the heads' projections
  dense_feed_forward: int
  routed_experts: int
  shared_experts: int
  router: int
  residual_projections: int  # w_mix of the hyper-connections
  residual_scalars: int  # their a_* and b_*
  norms: int  # g_norm, g_latent, g_query and g_final: all but the Engram modules'
  engram_projections: int  # w_key, w_value
  engram_gate_and_conv: int  # b_*, g_*, w_conv
  tables: int  # the primes' sum x C of every layer

  vocabulary_matrix: int  # V D, whether it is stored once or twice
  chosen_experts: int  # top_k of routed_experts
  looked_up_rows: int  # M numbers a layer, of tables

  @property
  def parts(self) -> dict[str, int]:
    """The stored parts by name; they add up to `all_parameters`."""
    of_one_token = ("vocabulary_matrix", "chosen_experts", "looked_up_rows")
    return {k: n for k, n in dataclasses.asdict(self).items() if k not in of_one_token}

  @property
  def all_parameters(self) -> int:
    """Every stored parameter: vocabulary matrices (one when tied), backbone, tables."""
    return sum(self.parts.values())

  @property
  def total_parameters(self) -> int:
    """The paper's "total": `all_parameters` without the token embedding. The head counts as one
    vocabulary matrix, also when it is the embedding's."""
    return self.all_parameters - self.embedding - self.head + self.vocabulary_matrix

  @property
  def active_parameters(self) -> int:
    """The paper's "active", the parameters that one token uses: attention, dense feed-forwards, the
    top-k routed and all shared experts, routers, residual mixing, norms, the Engram modules and the
    row values it looks up. Neither vocabulary matrix."""
    unused = self.routed_experts - self.chosen_experts + self.tables - self.looked_up_rows
    return self.total_parameters - self.vocabulary_matrix - unused

  @property
  def memory_parameters(self) -> int:
    """The tables alone: exact rows x C, without pad rows and without the Engram modules."""
    return self.tables

  @property
  def matrix_parameters(self) -> int:
    """Parameters that multiply activations inside the blocks, apart from routers and residual
    mixing: those that Muon trains."""
    experts = self.routed_experts + self.shared_experts
    return self.attention + self.dense_feed_forward + experts + self.engram_projections


def count(cfg: ModelConfig, layout: HashLayout | None = None) -> Counts:
  """The counts of `LM(cfg)` and its tables.

  Args:
    layout: of the tables; default: `table_layout(cfg)`.
  """
  layout = layout or table_layout(cfg)
  moe, engram, D, G = cfg.moe, cfg.engram, cfg.width, cfg.residual.branches
  memories, M = len(engram.layers), engram.memory_width
  moe_blocks = sum(map(cfg.is_moe, range(cfg.layers)))
  expert = 3 * D * moe.expert_width
  mixed = 2 * G + G * G if G > 1 else 0  # logits of H_pre, H_post and H_res
  sublayers = 2 * cfg.layers
  conv = G * D * (1 + engram.conv_kernel) if engram.conv_kernel else 0  # g_conv, w_conv
  keys = G if engram.gate != "none" else 0  # w_key, g_key and g_query are of each
  return Counts(
    embedding=cfg.vocab_size * D,
    head=0 if cfg.tie_embeddings else D * cfg.vocab_size,
    attention=cfg.layers * _attention(cfg),
    dense_feed_forward=(cfg.layers - moe_blocks) * 3 * D * moe.dense_width,
    routed_experts=moe_blocks * moe.routed_experts * expert,
    shared_experts=moe_blocks * moe.shared_experts * expert,
    router=moe_blocks * D * moe.routed_experts,
    residual_projections=sublayers * mixed * G * D,
    residual_scalars=sublayers * (mixed + 3) if mixed else 0,
    norms=sublayers * D + cfg.layers * (cfg.attention.latent + cfg.attention.query_latent) + D,
    engram_projections=memories * M * (keys + engram.projections) * D,
    engram_gate_and_conv=memories * (2 * keys * D + conv + (keys + 1) * D * engram.bias),
    tables=sum(layout.rows[layer] for layer in engram.layers) * engram.row_width if layout else 0,
    vocabulary_matrix=cfg.vocab_size * D,
    chosen_experts=moe_blocks * moe.top_k * expert,
    looked_up_rows=memories * M,
  )


def flops_per_token(cfg: ModelConfig, sequence_length: int) -> float:
  """FLOPs of forward matrix products, mean over the positions of a sequence; training takes 3x.

  Two for each parameter that a token is multiplied by (attention, dense feed-forwards, chosen and
  shared experts, routers, the projections of the residual mixing and of the memories, the head),
  and two for each number of a query-key and a weight-value product, over the (T + 1) / 2 positions
  that causality leaves on average.

  Not counted: norms, softmax, the mixing of the streams itself, convolutions, gates and the lookup
  of rows; nor what a kernel spends on masked positions or padding.
  """
  n = count(cfg)
  used = n.attention + n.dense_feed_forward + n.chosen_experts + n.shared_experts + n.router
  used += n.residual_projections + n.engram_projections + n.vocabulary_matrix
  heads = cfg.attention
  pair = heads.heads * (heads.nope_dim + heads.rope_dim + heads.value_dim)
  return 2.0 * used + 2.0 * cfg.layers * pair * (sequence_length + 1) / 2


def table_layout(cfg: ModelConfig) -> HashLayout | None:
  """A layout with the tables of this model; None without a memory.

  The primes, and so the rows, do not depend on the compressed vocabulary, which only a tokenizer
  gives: here it is the raw one, so the multipliers are not those of a run.
  """
  return HashLayout.of(cfg.engram, TokenCompressor.identity(cfg.vocab_size))


def _attention(cfg: ModelConfig) -> int:
  """The projections of one layer's latent attention."""
  a, D = cfg.attention, cfg.width
  head = a.nope_dim + a.rope_dim
  query = (D + a.heads * head) * a.query_latent if a.query_latent else D * a.heads * head
  latent = D * (a.latent + a.rope_dim) + a.latent * a.heads * (a.nope_dim + a.value_dim)
  return query + latent + a.heads * a.value_dim * D
