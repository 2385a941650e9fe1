"""The jitted half of `hashing`: 64-bit hashing in 32-bit lanes, exact without jax_enable_x64.

A mix is two uint32 limbs. Its remainder by a prime p < 2^31 is a long division in base 2^21: with
the mix = l2 2^42 + l1 2^21 + l0,

    r <- l2 mod p,   r <- (r 2^21 + l1) mod p,   r <- (r 2^21 + l0) mod p.

A quotient q is estimated in float32 and rounded to the nearest integer; r 2^21 + l - q p is then
exact in wrapping 32-bit integers as long as the result fits a signed one. So an estimate that is
off costs range, never correctness, and it is enough that |r| < p after each division: the last
line of `_remainder` brings (-p, p) into [0, p).

Why |r| < p. Let |r| <= a p before a division, x = (r 2^21 + l) / p, and e the error of its
estimate r C + l D (C = 2^21/p, D = 1/p). After it |r| <= (1/2 + e) p. Roundings cost a factor
1 +- 2^-24 each: the constant, the product, the sum, and r itself where r >= 2^24. |x| is at most
2^21 (a + 1/p).

- p < 2^24, three divisions: r and l are exact, so e <= 3/8 (a + 1/p), and in the first, of l2
  alone, e <= 1/(4p). This gives a <= .50 + .25/p, then .69 + .47/p, then .76 + .56/p < 1 for
  p >= 3; with p = 2 all operations are exact.
- 2^21 < p < 2^24: l2 < p, so the first division is left out: a <= 1, then .88, then .83.
- p > 2^24: l2 < p/8, so a <= .13, then .55 (l2 is exact), then .78 with all four roundings.

The margins cover the terms left out (below 10^-5), a fused multiply-add only removes a rounding,
and |x| < 2^22 throughout, as `_nearest` needs.

Local letters: H, ids of a history; K, heads per order.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from engram_jax.memory.hash_layout import HashLayout
from engram_jax.memory.hashing import look_back

DIGIT_BITS = 21
DIGIT = np.uint32(2**DIGIT_BITS - 1)
HALF = np.uint32(0xFFFF)
ROUNDER = np.float32(1.5 * 2**23)  # float32s from 2^23 to 2^24 are the integers
ROUNDER_BITS = ROUNDER.view(np.uint32)

Limbs = tuple[jax.Array, jax.Array]  # (high, low): high 2^32 + low


def hash_ids(
  layout: HashLayout,
  layer: int,
  ids_BT: jax.Array | np.ndarray,
  segments_BT: jax.Array | np.ndarray | None = None,
  history_BH: jax.Array | np.ndarray | None = None,
  mask_BT: jax.Array | np.ndarray | None = None,
) -> jax.Array:
  """See `hashing.hash_ids`."""
  ids_BT = _as_int32(ids_BT)
  if history_BH is not None:
    history_BH = _as_int32(history_BH)
  return _hash_ids(layout, layer, ids_BT, segments_BT, history_BH, mask_BT)


@functools.partial(jax.jit, static_argnames=("layout",))
def _count_invalid(layout: HashLayout, ids: jax.Array) -> jax.Array:
  return jnp.sum(_is_invalid(layout, ids), dtype=jnp.int32)


def invalid_ids(layout: HashLayout, ids: jax.Array | np.ndarray) -> jax.Array:
  """See `hashing.invalid_ids`."""
  return _count_invalid(layout, _as_int32(ids))


@functools.partial(jax.jit, static_argnames=("layout", "layer"))
def _hash_ids(layout, layer, ids_BT, segments_BT, history_BH, mask_BT):
  mask = _mask_invalid(layout, ids_BT, history_BH, mask_BT)
  ids = ids_BT.astype(jnp.uint32)
  history = None if history_BH is None else history_BH.astype(jnp.uint32)
  seen = look_back(jnp, layout, ids, segments_BT, history, mask)
  factors = layout.multipliers[layer]
  mixes = [_multiply(seen[0], factors[0])]
  for older, factor in zip(seen[1:], factors[1:], strict=True):
    mixes.append(tuple(a ^ b for a, b in zip(mixes[-1], _multiply(older, factor), strict=True)))
  high, low = (jnp.stack(limb, axis=-1)[..., None] for limb in zip(*mixes[1:], strict=True))
  primes = np.array(layout.primes[layer], np.uint32)  # [orders, K]
  hashed = _remainder((high, low), primes)
  return hashed.astype(jnp.int32).reshape(*ids_BT.shape, layout.hash_heads)


def _as_int32(ids: jax.Array | np.ndarray) -> jax.Array:
  """Ids as int32; what int32 cannot hold stays invalid, where a cast would keep its low half."""
  xp = jnp if isinstance(ids, jax.Array) else np
  ids = xp.asarray(ids)
  if ids.dtype.kind not in "iu":
    raise ValueError(f"canonical ids are integers, not {ids.dtype}")
  if ids.dtype.itemsize == 8:
    # The largest int32 is no id: compressed_vocab is at most that.
    ids = xp.where((ids < 0) | (ids > 2**31 - 1), 2**31 - 1, ids)
  return jnp.asarray(ids.astype(np.int32))  # a uint32 from 2^31 on turns negative: invalid too


def _is_invalid(layout: HashLayout, ids: jax.Array) -> jax.Array:
  return (ids < 0) | (ids >= layout.compressed_vocab)


def _mask_invalid(layout, ids_BT, history_BH, mask_BT) -> jax.Array:
  """The mask, history included, with every invalid id masked too."""
  mask = jnp.zeros(ids_BT.shape, bool) if mask_BT is None else jnp.asarray(mask_BT, bool)
  if history_BH is not None:
    ids_BT = jnp.concatenate([history_BH, ids_BT], axis=1)
    mask = jnp.pad(mask, ((0, 0), (ids_BT.shape[1] - mask.shape[1], 0)))
  return mask | _is_invalid(layout, ids_BT)


def _multiply(x: jax.Array, factor: int) -> Limbs:
  """x * factor for uint32 x and 0 < factor < 2^63, where the product is below 2^63.

  The low half is a wrapping product; the high half of x * (factor mod 2^32) is summed from 16-bit
  digits, whose partial sums fit 32 bits.
  """
  low_factor, high_factor = np.uint32(factor & 0xFFFFFFFF), np.uint32(factor >> 32)
  f0, f1 = low_factor & HALF, low_factor >> np.uint32(16)
  x0, x1 = x & HALF, x >> 16
  middle = x1 * f0 + (x0 * f0 >> 16)
  carry = x0 * f1 + (middle & HALF)
  high = x1 * f1 + (middle >> 16) + (carry >> 16)
  return high + x * high_factor, x * low_factor


def _remainder(mix: Limbs, primes: np.ndarray) -> jax.Array:
  """mix mod primes, for mixes < 2^63 and primes < 2^31: uint32, broadcast over both."""
  high, low = mix
  l0 = low & DIGIT
  l1 = (low >> DIGIT_BITS | high << (32 - DIGIT_BITS)) & DIGIT
  l2 = high >> (2 * DIGIT_BITS - 32)
  inverse = np.float32(1) / primes.astype(np.float32)
  if primes.min() <= DIGIT:
    l2 = l2 - _nearest(_float(l2) * inverse) * primes
  r = _divide(l2, l1, primes, inverse)
  r = _divide(r, l0, primes, inverse)
  return jnp.minimum(r, r + primes)  # a negative r is a huge uint32


def _divide(r: jax.Array, digit: jax.Array, primes: np.ndarray, inverse: np.ndarray) -> jax.Array:
  """r 2^21 + digit less the nearest multiple of p, or one beside it (see the module's note)."""
  shifted = np.float32(2**DIGIT_BITS) * inverse
  q = _nearest(_float(r) * shifted + _float(digit) * inverse)
  return (r << DIGIT_BITS) + digit - q * primes


def _nearest(x: jax.Array) -> jax.Array:
  """The integer nearest to a float32 with |x| < 2^22, as wrapped uint32.

  Adding ROUNDER leaves it in the low bits; XLA's own conversion to integers guards NaN and
  overflow and takes 1.6 times as long for the whole hash on a CPU.
  """
  return jax.lax.bitcast_convert_type(x + ROUNDER, jnp.uint32) - ROUNDER_BITS


def _float(x: jax.Array) -> jax.Array:
  """float32 of a wrapped uint32 read as signed."""
  return x.astype(jnp.int32).astype(jnp.float32)
