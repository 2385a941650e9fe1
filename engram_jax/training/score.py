"""Log-probabilities of the tokens of a text under a run, in bounded memory and exact.

The text goes through the model in pieces of at most `PIECE` tokens. A piece attends to all tokens
before it, block by block with a running softmax (arXiv 2112.05682, section 2), and the memory's
convolution reads on from where the last piece ended, so a log-probability is that of one forward
pass over the whole text as a single document. Texts are padded to powers of two, each of which is a
program of its own; causality keeps the padding from every token before it.

Local letters: H, heads; S, positions of the padded text; L, latent of attention (in `row_ids_LBSJ`,
memories); k and v, widths of a head's query and key and of its value; r, of its rotary part.
"""

import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax import lax
from jax.sharding import Mesh

from engram_jax.config.bounded import read_bounded, shorten
from engram_jax.core.mesh import compute_dtype, make_mesh, platform, replicated
from engram_jax.data.byte_counts import compare_bytes
from engram_jax.data.tokenizer import token_bytes
from engram_jax.errors import ConfigError, NonFiniteError
from engram_jax.memory.compress import check_ids
from engram_jax.memory.engram import ConvCache
from engram_jax.memory.token_text import token_texts
from engram_jax.memory.vocabulary import Vocabulary, encode_texts
from engram_jax.model.block import Block
from engram_jax.model.mla import LatentAttention, LatentCache, empty_cache
from engram_jax.tables.saved_run import load_run
from engram_jax.training.loss import chunked_cross_entropy
from engram_jax.training.state import TrainSetup, TrainState, flush, make_setup, restore_state

PIECE = 512  # tokens that go through the model at once; a power of two
SHORTEST = 32  # tokens that the shortest texts are padded to; a power of two
MAX_TEXT_BYTES = 16 << 20  # time grows with the square of a text's length


@dataclasses.dataclass(frozen=True)
class TextScores:
  """The tokens of a text and what a model thinks of them.

  Attributes:
    step: of the checkpoint.
    tokens: T ids. texts: the text of each, its own; an incomplete character is U+FFFD.
    logprobs: T - 1 floats, nats, at most 0: each token given all before it, from the second on.
    target_bytes: UTF-8 bytes of the tokens from the second on; special tokens have none.
    bits_per_byte_problem: why these are not the text's; None where they are.
  """

  step: int
  tokens: list[int]
  texts: list[str]
  logprobs: list[float]
  target_bytes: int
  bits_per_byte_problem: str | None = None

  @property
  def loss(self) -> float:
    """Mean nats per predicted token."""
    return -math.fsum(self.logprobs) / len(self.logprobs)

  @property
  def bits_per_byte(self) -> float | None:
    """Bits per UTF-8 byte of the predicted tokens, which compares tokenizers; None if unknown."""
    if self.bits_per_byte_problem is not None:
      return None
    return -math.fsum(self.logprobs) / math.log(2) / max(self.target_bytes, 1)


def score_text(
  run: pathlib.Path,
  step: int | None,
  text: str,
  log: Callable[[str], None],
  *,
  special: bool = False,
) -> TextScores:
  """Scores a text with a step of a run, its memory on; neither its corpus nor its cache is read.

  Args:
    step: the newest sound one if None.
    log: is told of checkpoints that cannot be used.
    special: tokens that the tokenizer's post-processor puts around a text are added, and scored.

  It runs on one device. Raises ConfigError, before anything is compiled, for a text of fewer than
  two tokens; like `load_run`; and NonFiniteError where the model gives no finite numbers.
  """
  with load_run(run, step, log) as saved:
    tokens = encode_text(saved.tokenizer, text, special=special)
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    setup = make_setup(saved.config, saved.vocabulary.layout, mesh)
    with setup.tables:
      state = flush(setup, restore_state(saved.checkpoints, saved.step, setup))
      logprobs = score_tokens(make_score_step(setup), setup, state, saved.vocabulary, tokens)
    texts = token_texts(saved.tokenizer, tokens)
    counts = token_bytes(saved.tokenizer)
    size, why = (
      int(counts[tokens[1:]].sum()),
      compare_bytes(saved.tokenizer, counts, [text], [tokens]),
    )
    return TextScores(saved.step, tokens, texts, logprobs.tolist(), size, why)


def read_text(name: str) -> str:
  """The text of a UTF-8 file of at most `MAX_TEXT_BYTES`, its line ends as they are.

  name: its path; "-" is standard input.

  Raises ConfigError for what cannot be read, is no regular file, too large, empty or not UTF-8, and
  then says at which byte.
  """
  try:
    content = _read_stdin() if name == "-" else read_bounded(pathlib.Path(name), MAX_TEXT_BYTES)
    text = content.decode("utf-8")
  except UnicodeDecodeError as error:
    byte = f"byte {error.start} (0x{error.object[error.start]:02x})"
    raise ConfigError(f"--score {name}: not UTF-8 at {byte}: {error.reason}") from None
  except OSError as error:
    raise ConfigError(f"--score {name}: {error.strerror or error}") from None
  except ValueError as error:
    raise ConfigError(f"--score {shorten(name)}: {error}") from None
  if not text:
    raise ConfigError(f"--score {name} is empty; give a text of at least two tokens")
  return text


def _read_stdin() -> bytes:
  content = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
  if len(content) > MAX_TEXT_BYTES:
    raise ValueError(f"has more than {MAX_TEXT_BYTES:,} bytes")
  return content


def encode_text(tokenizer: tokenizers.Tokenizer, text: str, *, special: bool = False) -> list[int]:
  """Token ids of a text, tokenised as for training: what spells a special token is ordinary text.

  special: tokens that the tokenizer's post-processor puts around a text are added.

  Raises ConfigError for fewer than two tokens, of which none is predicted.
  """
  tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())  # the caller's stays as it is
  tokenizer.no_truncation()
  tokenizer.no_padding()
  tokenizer.encode_special_tokens = True
  (tokens,) = encode_texts(tokenizer, [text], "--score", special=special)
  if len(tokens) < 2:
    raise ConfigError(
      f"--score: the text has {len(tokens)} token{'s' * (len(tokens) != 1)}: at least two are "
      "needed, as the first one is only read"
    )
  return tokens


class Past(NamedTuple):
  """Everything that a piece reads of those before it.

  latent_caches: one `LatentCache` a block, [1, S, ...]. conv_caches: one `ConvCache` a memory.
  """

  latent_caches: tuple[LatentCache, ...]
  conv_caches: tuple[ConvCache, ...]

  @classmethod
  def empty(cls, setup: TrainSetup, size: int) -> "Past":
    """The past of a text's first piece, with room for `size` tokens."""
    cfg = setup.config.model
    dtype, B = compute_dtype(cfg.dtype, platform(setup.mesh)), 1
    past = cls(
      tuple(empty_cache(cfg.attention, B, size, dtype) for _ in range(cfg.layers)),
      tuple(
        ConvCache.empty(cfg.engram, B, cfg.residual.branches, cfg.width) for _ in cfg.engram.layers
      ),
    )
    # Placed as a step returns it, or the step would be compiled once for each placement.
    place = jax.local_devices()[0] if setup.mesh is None else replicated(setup.mesh)
    return jax.device_put(past, place)


def make_score_step(setup: TrainSetup) -> Callable[..., tuple[jax.Array, Past]]:
  """Returns jitted `step(params, biases, rows, tokens_BT, targets_BT, start, past)` of a piece.

  It gives (nll_BT, past): float32 nats of each target, and the past of the next piece. B is 1.
  rows: [B, T, J, C] of each memory, in the order of layers. start: int32, the piece's first
  position, a multiple of T. past: of all pieces before; it is donated.
  """
  cfg, mesh = setup.config, setup.mesh

  def step(params, biases, rows, tokens_BT, targets_BT, start, past):
    model = setup.model(params, biases)
    memories = dict(
      zip(cfg.model.engram.layers, zip(rows, past.conv_caches, strict=True), strict=True)
    )
    x_BTGD = model.streams(tokens_BT, mesh)
    latent_caches, conv_caches = [], []
    for layer, block in enumerate(model.blocks):
      x_BTGD, latent_cache, conv_cache = _run_block(
        block, x_BTGD, start, past.latent_caches[layer], *memories.get(layer, (None, None)), mesh
      )
      latent_caches.append(latent_cache)
      if conv_cache is not None:
        conv_caches.append(conv_cache)
    _, aux = chunked_cross_entropy(
      model.final(x_BTGD),
      model.head_DV,
      targets_BT,
      jnp.ones(targets_BT.shape, bool),
      chunk=cfg.train.loss_chunk,
    )
    return aux["nll_BT"], Past(tuple(latent_caches), tuple(conv_caches))

  on_all = None if mesh is None else replicated(mesh)
  return jax.jit(step, donate_argnames="past", out_shardings=on_all)


def score_tokens(
  step: Callable[..., tuple[jax.Array, Past]],
  setup: TrainSetup,
  state: TrainState,
  vocabulary: Vocabulary,
  tokens: Sequence[int],
) -> np.ndarray:
  """Log-probabilities, float32 [T - 1] nats, of each of T token ids but the first given all before.

  step: of `make_score_step` for the same setup, which is on one device.

  Raises ValueError for fewer than two ids or one outside the vocabulary, NonFiniteError where the
  model gives no finite numbers.
  """
  ids = check_ids(tokens, len(vocabulary.compressor.table), "token id", "T")
  count = len(ids) - 1  # the last token predicts nothing
  if count < 1:
    raise ValueError(f"{len(ids)} token ids: at least two are needed")
  size = max(SHORTEST, 1 << (count - 1).bit_length())
  piece = min(PIECE, size)
  padded = -(-count // piece) * piece
  tokens_BS, targets_BS = np.zeros((2, 1, padded), np.int32)
  tokens_BS[0, :count], targets_BS[0, :count] = ids[:-1], ids[1:]
  row_ids_LBSJ = vocabulary.row_ids(tokens_BS)
  past, nll = Past.empty(setup, size), []
  for start in range(0, padded, piece):
    part = slice(start, start + piece)
    row_ids = dict(zip(setup.tables.layers, row_ids_LBSJ[:, :, part], strict=True))
    rows = tuple(setup.tables.lookup(state.tables, row_ids).values())
    nll_BT, past = step(
      state.params,
      state.biases,
      rows,
      tokens_BS[:, part],
      targets_BS[:, part],
      np.int32(start),
      past,
    )
    nll.append(np.asarray(nll_BT[0]))
  logprobs = -np.maximum(np.concatenate(nll)[:count], 0)  # rounding may leave a little below
  if not np.isfinite(logprobs).all():
    at = int(np.flatnonzero(~np.isfinite(logprobs))[0]) + 1
    raise NonFiniteError(f"the log-probability of token {at} is not finite: the model has diverged")
  return logprobs


def _run_block(
  block: Block,
  x_BTGD: jax.Array,
  start: jax.Array,
  latent_cache: LatentCache,
  rows: jax.Array | None,
  conv_cache: ConvCache | None,
  mesh: Mesh | None,
) -> tuple[jax.Array, LatentCache, ConvCache | None]:
  """`Block.__call__` on a piece: the streams after it, and both caches with it."""
  T = x_BTGD.shape[1]

  def remember(x_BTGD):
    nonlocal conv_cache
    assert block.engram is not None
    assert rows is not None
    assert conv_cache is not None
    delta_BTGD, probes, columns = block.engram.extend(x_BTGD, rows, conv_cache)
    conv_cache = ConvCache(*(column[:, T:] for column in columns))
    return delta_BTGD, probes

  def attend(normed_BTD):
    nonlocal latent_cache
    y_BTD, latent_cache = attend_in_blocks(block.attention, normed_BTD, start, latent_cache)
    return y_BTD

  x_BTGD, _ = block.around(x_BTGD, remember, attend, mesh)
  return x_BTGD, latent_cache, conv_cache


def attend_in_blocks(
  module: LatentAttention, x_BTD: jax.Array, start: jax.Array, cache: LatentCache
) -> tuple[jax.Array, LatentCache]:
  """Returns `LatentAttention.__call__` of T positions in one document, and the cache with them.

  start: int32, the first position, a multiple of T; the cache holds those before it. Logits exist
  for T keys at once, [B, H, T, T]; blocks of keys after the piece are not visited.
  """
  B, T, _ = x_BTD.shape
  at_T = jnp.arange(T)
  positions_BT = jnp.broadcast_to(start + at_T, (B, T))
  query_BTHk = module.queries(x_BTD, positions_BT) * module.scale
  new = module.latents(x_BTD, positions_BT)
  put = lambda old, new: lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, 1)
  cache = LatentCache(*map(put, cache, new))

  def add_block(i, carry):
    top_BHT, sum_BHT, mixed_BHTv = carry
    latent_BTL, key_rope_BTr = (lax.dynamic_slice_in_dim(x, i * T, T, 1) for x in cache)
    key_BTHk = module.keys(latent_BTL, key_rope_BTr)
    value_BTHv = jnp.einsum("btl,lhv->bthv", latent_BTL, module.w_value_up.astype(x_BTD.dtype))
    logits = _dot("bthk,bshk->bhts", query_BTHk, key_BTHk)
    logits = jnp.where((start + at_T)[:, None] >= i * T + at_T, logits, -jnp.inf)
    new_top_BHT = jnp.maximum(top_BHT, logits.max(-1))  # finite: all see the first block's first
    weights = jnp.exp(logits - new_top_BHT[..., None])
    decay_BHT = jnp.exp(top_BHT - new_top_BHT)
    mixed = _dot("bhts,bshv->bhtv", weights.astype(x_BTD.dtype), value_BTHv)
    return (
      new_top_BHT,
      sum_BHT * decay_BHT + weights.sum(-1),
      mixed_BHTv * decay_BHT[..., None] + mixed,
    )

  zeros_BHT = jnp.zeros((B, module.cfg.heads, T))
  carry = zeros_BHT - jnp.inf, zeros_BHT, jnp.zeros((*zeros_BHT.shape, module.cfg.value_dim))
  with jax.named_scope("attention"):
    _, sum_BHT, mixed_BHTv = lax.fori_loop(0, start // T + 1, add_block, carry)
  mixed_BHTv = (mixed_BHTv / sum_BHT[..., None]).astype(x_BTD.dtype)
  return jnp.einsum("bhtv,hvd->btd", mixed_BHTv, module.w_out.astype(x_BTD.dtype)), cache


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
