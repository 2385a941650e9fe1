"""engram_jax: conditional memory (Engram, arXiv 2601.07372) for language models in JAX and Flax.

A transformer has no primitive for looking knowledge up; Engram gives it one. Canonical token ids
form suffix n-grams, a multiplicative-XOR hash sends each to rows of prime-sized tables, a gate
driven by the hidden state decides whether to trust what came back, and a short causal convolution
and the residual branches take it in. Row ids depend on tokens alone, so rows are an argument of the
model, whether they were read from a sharded table, host memory or a file.

`x_BTD` is an array of shape [B, T, D]. These nine letters mean one thing everywhere:

  B batch    T time    D model width    G residual branches (mHC streams)    V vocabulary
  J hash heads: (orders) x (heads per order)    C width of one row
  M = J C memory width of a token    R rows of one table

Any other letter is local to its file, whose first docstring declares it. A capital is a complete
axis, lower case this device's share of it (t_rC).

Importing the package touches no device and imports no jax.
"""

__version__ = "0.1.0"
