"""The paper and its demo (arXiv 2601.07372): canonical ids, PCG64 multipliers seeded per layer."""

import numpy as np

from engram_jax.memory.hash_layout import Dialect, HashLayout, largest_half

LAYER_STRIDE = 10007  # between the seeds of two layers (the paper's demo)


def multipliers(layout: HashLayout, layer: int) -> tuple[int, ...]:
  """2 n + 1 for N numbers n below `largest_half`, drawn from PCG64(seed + 10007 layer)."""
  generator = np.random.default_rng(layout.seed + LAYER_STRIDE * layer)
  drawn = generator.integers(0, largest_half(layout), size=layout.max_ngram, dtype=np.int64)
  return tuple(2 * int(number) + 1 for number in drawn)


DIALECT = Dialect(multipliers)
