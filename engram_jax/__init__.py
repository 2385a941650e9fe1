"""engram_jax: conditional memory (Engram, arXiv 2601.07372) for language models in JAX and Flax.

A transformer has no primitive for looking knowledge up; Engram gives it one. Canonical token ids
form suffix n-grams, a multiplicative-XOR hash sends each to rows of prime-sized tables, a gate
driven by the hidden state decides whether to trust what came back, and a short causal convolution
and the residual branches take it in. Row ids depend on tokens alone, so rows are an argument of the
model: it never knows whether they came from a sharded table, host memory, a file, or are zeros.

The alphabet, in configs, names and einsums (x_BTD is an array of shape [B, T, D]):

  B batch    T time    D model width    G residual branches (mHC streams)    V vocabulary
  N largest n-gram order    K hash heads per order    J = (N-1) K columns
  C width of one row    M = J C memory width of one token    R rows of one layer's table
  E routed experts

Importing the package touches no device and imports no jax.
"""

__version__ = "0.1.0"
