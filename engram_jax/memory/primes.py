"""Primes above a number, by a deterministic test."""

from collections.abc import Iterator

# With these bases Miller-Rabin is a proof below 3,215,031,751 (Jaeschke 1993); we stay below 2^31.
BASES = (2, 3, 5, 7)


def is_prime(n: int) -> bool:
  """Whether n is prime, for 0 <= n < 2^31."""
  if n < 2:
    return False
  for base in BASES:
    if n % base == 0:
      return n == base
  shift = ((n - 1) & -(n - 1)).bit_length() - 1
  return all(_passes(n, base, shift) for base in BASES)


def _passes(n: int, base: int, shift: int) -> bool:
  """One Miller-Rabin round: n - 1 = odd * 2^shift."""
  x = pow(base, (n - 1) >> shift, n)
  if x in (1, n - 1):
    return True
  for _ in range(shift - 1):
    x = x * x % n
    if x == n - 1:
      return True
  return False


def primes_from(start: int) -> Iterator[int]:
  """The primes >= start, rising."""
  n = max(start, 2)
  while True:
    if is_prime(n):
      yield n
    n += 1
