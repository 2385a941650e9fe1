"""DeepSeek-V4.1-Flash: the paper's constants.

Its look-back ends at masked (image) tokens, as it does in all dialects where a mask is given.
"""

from engram_jax.memory.dialects.engram import multipliers
from engram_jax.memory.hash_layout import Dialect

DIALECT = Dialect(multipliers)
