"""Packed examples: what the model is shown, and the ids of the rows that its memory reads.

The documents of a corpus lie end to end; example i holds tokens i T .. i T + T - 1 and its targets
are the tokens after each. A document that continues from the example before starts anew in this
one: its positions from 0, its n-grams from the pad id.

Local letters: L, layers with a memory; t, T + 1 tokens: an example's and the one after them.
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
  """Encodes tokens as canonical ids, and these as row ids of each memory layer's table.

  address: `model.engram.address`, by which controls have other rows than those of the n-grams.
  """

  layout: HashLayout
  compressor: TokenCompressor
  reset_at_documents: bool
  address: str = "ngrams"

  def __call__(self, tokens_BT: np.ndarray, segments_BT: np.ndarray) -> np.ndarray:
    """Returns row ids int32 [L, B, T, J], offsets included: one [B, T, J] per layer, in order."""
    segments = segments_BT if self.reset_at_documents else None
    if self.address == "token":  # each token a document of its own: it sees pads before it
      B, T = tokens_BT.shape
      segments = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    ids_LBTJ = stacked_row_ids(self.layout, self.compressor, tokens_BT, segments)
    if self.address == "one_row":
      for ids_BTJ, layer in zip(ids_LBTJ, self.layout.layers, strict=True):
        ids_BTJ[...] = self.layout.offsets[layer]
    return ids_LBTJ


@dataclasses.dataclass(frozen=True)
class PackedExamples:
  """The packed examples of a corpus; called with their indices, it makes the batch of them.

  Attributes:
    sequence_length: T, tokens of each example.
    row_id_encoder: None without a memory.
    vocabulary_size: V; None takes every id that the file holds.
  """

  corpus: Corpus
  sequence_length: int
  row_id_encoder: RowIdEncoder | None
  vocabulary_size: int | None = None

  def __len__(self) -> int:
    """Complete examples; a tail shorter than T + 1 tokens is not among them."""
    return (len(self.corpus.tokens) - 1) // self.sequence_length

  @property
  def count_with_tail(self) -> int:
    """Examples that together hold every token; the last is padded with masked ends of text."""
    return -(-(len(self.corpus.tokens) - 1) // self.sequence_length)

  def __call__(self, indices_B: np.ndarray) -> Batch:
    """Makes the batch of the examples `indices_B` (int [B]).

    It holds tokens and targets, int32 [B, T]; mask, bool [B, T], False where the target belongs to
    another document or lies past the end of the corpus; segments, int32 [B, T], 0.. rising per
    document; positions, int32 [B, T], restarting at 0 with each; source, int32 [B, T], of each
    token; and row_ids, int32 [L, B, T, J], where there is a memory.

    Raises StorageError for an id that is none of the vocabulary's: the file is damaged.
    """
    corpus, total = self.corpus, len(self.corpus.tokens)
    start_B1 = np.asarray(indices_B, np.int64)[:, None] * self.sequence_length
    offset_Bt = start_B1 + np.arange(self.sequence_length + 1)
    inside_Bt = np.minimum(offset_Bt, total - 1)
    ids_Bt = corpus.tokens[inside_Bt]
    if self.vocabulary_size is not None:
      corpus.require_ids(ids_Bt, inside_Bt, self.vocabulary_size)
    ids_Bt = ids_Bt.astype(np.int32)
    document_Bt = np.searchsorted(corpus.offsets, inside_Bt, side="right") - 1
    document_BT = document_Bt[:, :-1]
    begin_BT = np.maximum(corpus.offsets[document_BT], start_B1)
    batch = {
      "tokens": ids_Bt[:, :-1],
      "targets": ids_Bt[:, 1:],
      "mask": (document_BT == document_Bt[:, 1:]) & (offset_Bt[:, 1:] < total),
      "segments": document_BT - document_BT[:, :1],
      "positions": offset_Bt[:, :-1] - begin_BT,
      "source": corpus.source_ids[document_BT],
    }
    batch = {
      name: np.ascontiguousarray(array, bool if name == "mask" else np.int32)
      for name, array in batch.items()
    }
    if self.row_id_encoder is not None:
      batch["row_ids"] = self._row_ids(np.asarray(indices_B, np.int64), batch)
    return batch

  def _row_ids(self, indices_B: np.ndarray, batch: Batch) -> np.ndarray:
    encoder = self.row_id_encoder
    assert encoder is not None
    if encoder.address != "other_window":
      return encoder(batch["tokens"], batch["segments"])
    # The window half a corpus further: its n-grams are as frequent, and say nothing of this one.
    other = (indices_B + self.count_with_tail // 2) % self.count_with_tail
    plain = dataclasses.replace(encoder, address="ngrams")
    return dataclasses.replace(self, row_id_encoder=plain)(other)["row_ids"]


@dataclasses.dataclass(frozen=True)
class BatchSlice:
  """Some rows of a batch; called with the indices of the full batch, it makes those alone."""

  examples: PackedExamples
  batch_rows: np.ndarray | slice

  def __call__(self, indices_B: np.ndarray) -> Batch:
    """Makes the examples `indices_B[batch_rows]`, as `PackedExamples` does."""
    return self.examples(np.asarray(indices_B)[self.batch_rows])
