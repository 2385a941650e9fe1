"""From text to batches, in NumPy alone: this package imports no jax.

  sources    documents, each with the name of where it came from   (files: the user's own formats)
  split      exact duplicates out; training or validation by the hash of the text
  tokenizer  a byte-level BPE trained on the training documents, or a tokenizer.json
  corpus     token ids on disk, documents in the order of their hash
  windows    tokens, targets, segments, positions and row ids of a batch of windows
  pipeline   `prepare(config)` does all that; its batches are a function of the step alone

What costs time is done once and kept in the cache folder, under a name that says what it was made
from; it is written beside and renamed, so that processes can share the folder.
"""
