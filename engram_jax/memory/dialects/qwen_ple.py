"""Qwen3.8-Flash-Next: raw ids, SplitMix64 multipliers, one set for all layers.

What stands before a text is the end-of-text id (`pad_id` carries it), and an end-of-text token ends
look-back.
"""

from engram_jax.memory.hash_layout import Dialect, HashLayout, largest_half

SEED = 1234  # of the released model; its config does not say it
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MASK_64 = 2**64 - 1


def multipliers(layout: HashLayout, layer: int) -> tuple[int, ...]:
  """2 n + 1 for N outputs n of SplitMix64, modulo `largest_half`."""
  del layer  # the released model has one memory, and its rule no layer in it
  seed = layout.seed or SEED
  states = ((seed + GOLDEN_GAMMA * (i + 1)) & MASK_64 for i in range(layout.max_ngram))
  return tuple(2 * (_splitmix64(state) % largest_half(layout)) + 1 for state in states)


def _splitmix64(state: int) -> int:
  """One output of SplitMix64 (Steele, Lea and Flood 2014)."""
  z = (state + GOLDEN_GAMMA) & MASK_64
  z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
  z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK_64
  return z ^ (z >> 31)


DIALECT = Dialect(multipliers, hashes_raw_ids=True, pad_ends_look_back=True)
