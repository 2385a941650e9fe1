"""Batches of windows: what the model is shown, and the rows its memory will be asked for.

The documents of a corpus lie end to end; window w shows tokens w T .. w T + T - 1 and is asked for
the token after each. A document that goes on from the window before starts anew in this one: its
positions from 0, its n-grams from the pad id.
"""

import dataclasses

import numpy as np

from engram_jax.data.corpus import Corpus
from engram_jax.memory.compress import TokenCompressor
from engram_jax.memory.hash_layout import HashLayout
from engram_jax.memory.vocabulary import stacked_row_ids

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class RowIdEncoder:
  """Tokens -> canonical ids -> row ids of each memory layer's table."""

  layout: HashLayout
  compressor: TokenCompressor
  reset_at_documents: bool

  def __call__(self, tokens_BT: np.ndarray, segments_BT: np.ndarray) -> np.ndarray:
    """int32 [L, B, T, J], offsets included: one [B, T, J] per memory layer, in their order."""
    segments_BT = segments_BT if self.reset_at_documents else None
    return stacked_row_ids(self.layout, self.compressor, tokens_BT, segments_BT)


@dataclasses.dataclass(frozen=True)
class PackedExamples:
  """The windows of a corpus, T tokens each; called with window indices, it makes their batch."""

  corpus: Corpus
  length: int
  row_ids: RowIdEncoder | None

  def __len__(self) -> int:
    """Whole windows; a tail shorter than T + 1 tokens is not among them."""
    return (len(self.corpus.tokens) - 1) // self.length

  @property
  def with_tail(self) -> int:
    """Windows that together show every token; the last is filled up with masked ends of text."""
    return -(-(len(self.corpus.tokens) - 1) // self.length)

  def __call__(self, windows_B: np.ndarray) -> Batch:
    """The batch of windows `windows_B` (int [B]):

    tokens, targets int32 [B, T]; mask bool [B, T], False where the target belongs to another
    document or lies past the end of the corpus; segments int32 [B, T], 0.. rising per document;
    positions int32 [B, T], restarting at 0 with each; source int32 [B, T], of each token; and
    row_ids int32 [L, B, T, J] where there is a memory.
    """
    corpus, total = self.corpus, len(self.corpus.tokens)
    start_B1 = np.asarray(windows_B, np.int64)[:, None] * self.length
    at_Bt = start_B1 + np.arange(self.length + 1)
    inside_Bt = np.minimum(at_Bt, total - 1)
    ids_Bt = corpus.tokens[inside_Bt].astype(np.int32)
    document_Bt = np.searchsorted(corpus.offsets, inside_Bt, side="right") - 1
    document_BT = document_Bt[:, :-1]
    begin_BT = np.maximum(corpus.offsets[document_BT], start_B1)
    batch = {
      "tokens": ids_Bt[:, :-1],
      "targets": ids_Bt[:, 1:],
      "mask": (document_BT == document_Bt[:, 1:]) & (at_Bt[:, 1:] < total),
      "segments": document_BT - document_BT[:, :1],
      "positions": at_Bt[:, :-1] - begin_BT,
      "source": corpus.sources[document_BT],
    }
    batch = {
      name: np.ascontiguousarray(array, bool if name == "mask" else np.int32)
      for name, array in batch.items()
    }
    if self.row_ids is not None:
      batch["row_ids"] = self.row_ids(batch["tokens"], batch["segments"])
    return batch


@dataclasses.dataclass(frozen=True)
class BatchSlice:
  """Called with the windows of a whole batch, it makes only some of the batch's rows."""

  examples: PackedExamples
  rows: np.ndarray | slice

  def __call__(self, windows_B: np.ndarray) -> Batch:
    return self.examples(np.asarray(windows_B)[self.rows])
