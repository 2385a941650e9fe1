"""Canonical ids to hash ids: suffix n-grams, multiplied, XORed and reduced by primes.

For a layer's odd multipliers m_0..m_{N-1}, order n in 2..N and head k (arXiv 2601.07372, eq. 1-2),

    mix_{t,n} = XOR_{i<n} x_{t-i} m_i        z_{t,n,k} = mix_{t,n} mod p_{n,k}

in 64 bits: `HashLayout` draws multipliers whose products stay below 2^63, and 32 bits would give
other ids. `hash_ids_numpy` is
for the host; `hash_ids` gives the same numbers inside jit, and only calling it imports jax.

What a position does not see reads as the pad id. Look-back ends, for all older tokens too,

- before the start of the sequence, unless `history_BH` says what came before;
- where the segment id changes (packed documents);
- at a masked token. A masked token's own n-grams are all pads;
- in a dialect whose pad ends look-back (`qwen_ple`), at a token whose id is the layout's `pad_id`.

Local letters: N, the largest order; K, heads per order; H, ids of a history; O, orders; X, tokens.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from engram_jax.memory.compress import check_ids, check_visible_ids
from engram_jax.memory.hash_layout import HashLayout, find_dialect

if TYPE_CHECKING:
  import jax

__all__ = ["HashLayout", "hash_ids", "hash_ids_numpy", "invalid_ids", "row_ids"]

BLOCK = 4096  # tokens reduced at a time on the host
FEW = 512  # tokens for which calls cost more than divisions


def hash_ids_numpy(
  layout: HashLayout,
  layer: int,
  ids_BT: np.ndarray,
  segments_BT: np.ndarray | None = None,
  history_BH: np.ndarray | None = None,
  mask_BT: np.ndarray | None = None,
) -> np.ndarray:
  """Hash ids of one layer, per head: int32 [B, T, J], each in [0, its head's prime).

  Columns are in the order of `layout.primes[layer]`: order 2's heads first. Row ids are the
  result + `layout.offsets[layer]`.

  Args:
    ids_BT: canonical ids, integers in [0, layout.compressed_vocab).
    segments_BT: integers of any value; look-back ends where they change.
    history_BH: the H canonical ids before the first column, the newest last; any H, of which the
      last N-1 count. They are of the first column's document.
    mask_BT: bool; True where no text token stands (an image's place).
    segments_BT and mask_BT may be [B, H+T] and then cover the history too.

  Raises ValueError on an id outside its range (naming it and its position), a layer the layout
  has not, or shapes or dtypes that do not agree.
  """
  check_shapes(layout, layer, ids_BT, segments_BT, history_BH, mask_BT)
  ids_BT = check_ids(ids_BT, layout.compressed_vocab, "canonical id")
  if history_BH is not None:
    history_BH = check_ids(history_BH, layout.compressed_vocab, "canonical history id")
    history_BH = history_BH.astype(np.uint64)
  seen = look_back(np, layout, ids_BT.astype(np.uint64), segments_BT, history_BH, mask_BT)
  multipliers = np.array(layout.multipliers[layer], np.uint64)
  mixes = [seen[0] * multipliers[0]]
  for older_BT, multiplier in zip(seen[1:], multipliers[1:], strict=True):
    mixes.append(mixes[-1] ^ older_BT * multiplier)
  return _remainders(mixes[1:], layout.primes[layer]).reshape(*ids_BT.shape, layout.hash_heads)


def hash_ids(
  layout: HashLayout,
  layer: int,
  ids_BT: "jax.Array | np.ndarray",
  segments_BT: "jax.Array | np.ndarray | None" = None,
  history_BH: "jax.Array | np.ndarray | None" = None,
  mask_BT: "jax.Array | np.ndarray | None" = None,
) -> "jax.Array":
  """`hash_ids_numpy` inside jit (or eagerly), without jax_enable_x64: int32 [B, T, J].

  `layout` and `layer` are static. Values cannot raise under jit: an id outside
  [0, layout.compressed_vocab) is treated as a masked token, so it is never hashed and every result
  is in range; `invalid_ids` counts them. ValueError on an unknown layer, or on shapes or dtypes
  that do not agree.
  """
  from engram_jax.memory import hashing_jit

  check_shapes(layout, layer, ids_BT, segments_BT, history_BH, mask_BT)
  return hashing_jit.hash_ids(layout, layer, ids_BT, segments_BT, history_BH, mask_BT)


def row_ids(
  layout: HashLayout,
  layer: int,
  ids_BT: "jax.Array | np.ndarray",
  segments_BT: "jax.Array | np.ndarray | None" = None,
  history_BH: "jax.Array | np.ndarray | None" = None,
  mask_BT: "jax.Array | np.ndarray | None" = None,
) -> "jax.Array | np.ndarray":
  """Row ids of one layer's table: hash ids + `layout.offsets[layer]`, int32 [B, T, J].

  A NumPy array gives one, by `hash_ids_numpy`; a jax array, traced or not, one by `hash_ids`.
  Arguments and errors are theirs.
  """
  args: Any = (layout, layer, ids_BT, segments_BT, history_BH, mask_BT)
  if isinstance(ids_BT, np.ndarray | list):
    return hash_ids_numpy(*args) + np.array(layout.offsets[layer], np.int32)
  return hash_ids(*args) + np.array(layout.offsets[layer], np.int32)


def invalid_ids(layout: HashLayout, ids: "jax.Array | np.ndarray") -> "jax.Array":
  """Counts the ids outside [0, compressed_vocab): int32 scalar, jittable."""
  from engram_jax.memory import hashing_jit

  return hashing_jit.invalid_ids(layout, ids)


def look_back(
  xp: Any,
  layout: HashLayout,
  ids_BT: Any,
  segments_BT: Any = None,
  history_BH: Any = None,
  mask_BT: Any = None,
) -> list[Any]:
  """The N tokens each position sees, [B, T] each, newest first; the pad id where none is seen.

  One definition for both halves: `xp` is numpy or jax.numpy. Ids are unsigned integers.
  """
  B, T = ids_BT.shape
  context = layout.max_ngram - 1

  def extend(x, filler):
    """[B, T] or [B, H+T] to [B, N-1+T]: what is missing on the left is filled."""
    x = xp.asarray(x)[:, -(context + T) :]
    if x.shape[1] == context + T:
      return x
    filler = xp.asarray(filler, x.dtype)
    missing = xp.broadcast_to(filler, (B, context + T - x.shape[1]))
    return xp.concatenate([missing, x], axis=1)

  def before(x, i):
    return x[:, context - i : context - i + T]

  if history_BH is not None:
    ids_BT = xp.concatenate([history_BH, ids_BT], axis=1)
  pad = xp.asarray(layout.pad_id, ids_BT.dtype)
  ids = extend(ids_BT, pad)
  pad_ends = find_dialect(layout.dialect).pad_ends_look_back
  if mask_BT is None and segments_BT is None and not pad_ends:
    return [before(ids, i) for i in range(layout.max_ngram)]  # nothing ends a look-back
  masked = xp.zeros((B, T), bool) if mask_BT is None else xp.asarray(mask_BT, bool)
  ends = extend(masked, False)
  reached = ~before(ends, 0)
  seen = [xp.where(reached, before(ids, 0), pad)]
  if pad_ends:
    ends = ends | (ids == layout.pad_id)
  if segments_BT is not None:
    segments = extend(segments_BT, xp.asarray(segments_BT)[:, :1] if T else 0)
  for i in range(1, layout.max_ngram):
    reached = reached & ~before(ends, i)
    if segments_BT is not None:
      reached = reached & (before(segments, i) == before(segments, 0))
    seen.append(xp.where(reached, before(ids, i), pad))
  return seen


def _remainders(mixes: list[np.ndarray], primes: tuple[tuple[int, ...], ...]) -> np.ndarray:
  """Reduces the mix of each order by that order's primes: int32 [X, J].

  It works in blocks that fit into the processor's cache. NumPy divides by a scalar with
  multiplications, but its remainder divides, at twice the time. With few tokens the calls for each
  column cost more than the slower remainder, so all columns are divided at once.
  """
  if mixes[0].size <= FEW:
    mix_XO = np.stack([mix.reshape(-1) for mix in mixes], axis=1)
    divisors = np.array([prime for heads in primes for prime in heads], np.uint64)
    mix_XJ = np.repeat(mix_XO, [len(heads) for heads in primes], axis=1)
    return (mix_XJ % divisors).astype(np.int32)
  pairs = [
    (mix.reshape(-1), np.uint64(prime))
    for mix, heads in zip(mixes, primes, strict=True)
    for prime in heads
  ]
  count = mixes[0].size
  out = np.empty((count, len(pairs)), np.int32)
  block = np.empty((len(pairs), min(BLOCK, count)), np.int32)
  quotient = np.empty(block.shape[1], np.uint64)
  for start in range(0, count, BLOCK):
    size = min(BLOCK, count - start)
    multiple = quotient[:size]
    for column, (mix, prime) in enumerate(pairs):
      np.floor_divide(mix[start : start + size], prime, out=multiple)
      np.multiply(multiple, prime, out=multiple)
      block[column, :size] = np.subtract(mix[start : start + size], multiple, out=multiple)
    out[start : start + size] = block[:, :size].T
  return out


def check_shapes(
  layout: HashLayout,
  layer: int,
  ids_BT: Any,
  segments_BT: Any = None,
  history_BH: Any = None,
  mask_BT: Any = None,
) -> None:
  """ValueError unless the layer is known, and the arrays' dtypes and shapes agree."""
  if layer not in layout.layers:
    raise ValueError(f"layer={layer} has no hash: the layout has layers {list(layout.layers)}")
  check_visible_ids(ids_BT, None, "canonical id")
  if history_BH is not None:
    check_visible_ids(history_BH, None, "canonical history id")
  if np.ndim(ids_BT) != 2:
    raise ValueError(f"ids_BT is [B, T], not of shape {np.shape(ids_BT)}")
  B, T = np.shape(ids_BT)
  if history_BH is not None and (np.ndim(history_BH) != 2 or np.shape(history_BH)[0] != B):
    raise ValueError(f"history_BH is [{B}, H], not of shape {np.shape(history_BH)}")
  H = 0 if history_BH is None else np.shape(history_BH)[1]
  for name, array in (("segments_BT", segments_BT), ("mask_BT", mask_BT)):
    if array is not None and _shape(array) not in ((B, T), (B, H + T)):
      raise ValueError(f"{name} is [{B}, {T}] or [{B}, {H + T}], not of shape {_shape(array)}")
  if segments_BT is not None:
    check_visible_ids(segments_BT, None, "segment id")
  if mask_BT is not None:
    mask_BT = mask_BT if hasattr(mask_BT, "dtype") else np.asarray(mask_BT)
    if mask_BT.dtype != bool:
      raise ValueError(f"mask_BT is bool, not {mask_BT.dtype}")


def _shape(array: Any) -> tuple[int, ...] | None:
  """An array's shape; None for lists that differ in length."""
  try:
    return np.shape(array)
  except ValueError:
    return None
