"""Deduplicates documents, splits them by the hash of their text, and keeps their tokens on disk.

The hash decides between training and validation, not the order or the file: adding documents moves
none of the others, and a text that occurs twice can never be in both splits.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple, Self

import numpy as np
import tokenizers

from engram_jax.config import DataConfig
from engram_jax.data.download import Log
from engram_jax.data.files import Document
from engram_jax.data.split_digest import split_digest
from engram_jax.data.tokenizer import vocabulary_size
from engram_jax.errors import ConfigError, DataError, StorageError
from engram_jax.memory.vocabulary import failures_as


class HashedDocument(NamedTuple):
  """A document with the hash that decides its split."""

  key: int  # 64 bits of the text's hash: decides the split, and the order within it
  source: str
  text: str


def deduplicate(documents: Iterable[Document]) -> Iterator[HashedDocument]:
  """Yields the documents that hold text, the first of each set of equal ones."""
  seen: set[bytes] = set()
  for source, text in documents:
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    if text.strip() and digest not in seen:
      seen.add(digest)
      yield HashedDocument(int.from_bytes(digest[:8], "big"), source, text)


def is_validation(key: int, fraction: float) -> bool:
  """Says whether the document with this key is held out; `fraction` of all keys are."""
  return key < fraction * 2**64


def training_texts(documents: Iterable[HashedDocument], cfg: DataConfig) -> Iterator[str]:
  """Yields the texts that a tokenizer may learn from, then runs `check_split` on the counts."""
  counts = [0, 0]
  for document in documents:
    held_out = is_validation(document.key, cfg.validation_fraction)
    counts[held_out] += 1
    if not held_out:
      yield document.text
  check_split(counts[0], counts[1], cfg)


def check_split(training: int, validation: int, cfg: DataConfig) -> None:
  """Raises ConfigError where a split has no documents."""
  where = f"data.source={cfg.source!r}" + (f" at {cfg.path!r}" if cfg.path else "")
  if training + validation == 0:
    raise ConfigError(f"{where}: an empty corpus, no document with any text")
  if training == 0 or validation == 0:
    raise ConfigError(
      f"{where}: data.validation_fraction={cfg.validation_fraction} leaves {training} documents "
      f"for training and {validation} for validation (the hash of each text decides): "
      f"both need one; change the fraction or give more documents"
    )


FORMAT_VERSION = 1  # part of a cache entry's name: raise it when the files or the split change
CHUNK_CHARACTERS = 1 << 20  # encoded at once
PROGRESS_SECONDS = 10
_DIGEST_STRIDE = 1021  # a corpus's digest covers one token of so many
SPLITS = ("training", "validation")


@dataclasses.dataclass(frozen=True)
class Corpus:
  """One split, memory-mapped. It pickles as its path, so that worker processes map it themselves.

  Attributes:
    tokens: uint16 or uint32, the ids of all documents end to end.
    offsets: int64 [documents + 1], where each document begins in `tokens`.
    source_ids: int32 [documents], indices of source names.
  """

  path: pathlib.Path
  tokens: np.ndarray = dataclasses.field(repr=False, compare=False)
  offsets: np.ndarray = dataclasses.field(repr=False, compare=False)
  source_ids: np.ndarray = dataclasses.field(repr=False, compare=False)

  @classmethod
  def open(cls, path: pathlib.Path) -> Self:
    """Maps the files of a split; StorageError where they are damaged."""
    try:
      tokens = np.load(path / "tokens.npy", mmap_mode="r")
      offsets, source_ids = np.load(path / "offsets.npy"), np.load(path / "sources.npy")
    except (OSError, ValueError, EOFError) as error:
      raise damaged(path, str(error)) from None
    if problem := _problem(tokens, offsets, source_ids):
      raise damaged(path, problem)
    return cls(path, tokens, offsets, source_ids)

  def __reduce__(self):
    return Corpus.open, (self.path,)

  def require_ids(self, ids: np.ndarray, places: np.ndarray, vocabulary: int) -> None:
    """Raises StorageError for a token id outside [0, vocabulary), saying where it is.

    places: the index in `tokens` of each of the ids, which are of this split.
    """
    if ids.size and ids.max() >= vocabulary:
      at = np.unravel_index(np.argmax(ids >= vocabulary), ids.shape)
      raise damaged(
        self.path,
        f"token id {ids[at]} of token {places[at]} is outside the vocabulary: 0..{vocabulary - 1}",
      )

  @property
  def document_count(self) -> int:
    """Documents in this split."""
    return len(self.source_ids)

  @property
  def content_digest(self) -> str:
    """SHA-256 (hex) of all tokens; StorageError where they are not as they were written."""
    return split_digest(self.path)

  @property
  def digest(self) -> str:
    """SHA-256 (hex) of where documents end and of a sample of the tokens.

    Checkpoints of before `content_digest` know a corpus by it.
    """
    hasher = hashlib.sha256(np.ascontiguousarray(self.offsets, np.int64).data)
    hasher.update(np.ascontiguousarray(self.tokens[::_DIGEST_STRIDE], np.int64).data)
    return hasher.hexdigest()


def damaged(path: pathlib.Path, problem: str) -> StorageError:
  """The error for the files of a split that are not as they were written."""
  return StorageError(
    f"{path}: a damaged token file: {problem}; delete {path.parent} and it is made again"
  )


def _problem(tokens: np.ndarray, offsets: np.ndarray, source_ids: np.ndarray) -> str | None:
  """Says what does not fit in the arrays of a split; None if all does. Reads no token."""
  if tokens.dtype not in (np.uint16, np.uint32) or tokens.ndim != 1:
    return f"tokens are uint16 or uint32 integers [n], not {tokens.dtype} {list(tokens.shape)}"
  if offsets.dtype.kind not in "iu" or offsets.ndim != 1 or not offsets.size:
    return f"offsets are integers [documents + 1], not {offsets.dtype} {list(offsets.shape)}"
  wrong = np.append(offsets[1:] < offsets[:-1], offsets[-1] != len(tokens))
  wrong[0] |= offsets[0] != 0
  if wrong.any():
    i = int(np.argmax(wrong))
    near = ", ".join(map(str, offsets[i : i + 2]))
    return f"offsets do not rise from 0 to its {len(tokens)} tokens: {near} at document {i}"
  if source_ids.dtype.kind not in "iu" or source_ids.shape != (len(offsets) - 1,):
    expected, found = [len(offsets) - 1], list(source_ids.shape)
    return f"sources are integers {expected}, one a document, not {source_ids.dtype} {found}"
  return None


def open_or_build(
  folder: pathlib.Path,
  documents: Iterable[HashedDocument],
  tokenizer: tokenizers.Tokenizer,
  end_of_text: int,
  cfg: DataConfig,
  log: Log,
) -> tuple[Corpus, Corpus, tuple[str, ...]]:
  """Opens (training corpus, validation corpus, source names) of `folder`, building them if needed.

  Documents are read once and never all held in memory.

  Args:
    folder: where the two splits lie, or will.
    documents: without duplicates; read only where `folder` does not exist.
    end_of_text: the id appended to each document.

  Raises ConfigError where a split would be empty, and what reading `documents` raises; `folder` is
  not made then.
  """
  if not folder.is_dir():
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
    try:
      _build(part, documents, tokenizer, end_of_text, cfg, log)
      _publish(part, folder)
    finally:
      shutil.rmtree(part, ignore_errors=True)
  names = tuple(json.loads((folder / "meta.json").read_text())["sources"])
  for split in SPLITS:
    split_digest(folder / split)
  training, validation = (Corpus.open(folder / split) for split in SPLITS)
  for corpus in (training, validation):
    ids = corpus.source_ids
    if ids.size and not 0 <= ids.min() <= ids.max() < len(names):
      raise damaged(corpus.path, f"sources {ids.min()}..{ids.max()} are not in 0..{len(names) - 1}")
  return training, validation, names


def _publish(part: pathlib.Path, folder: pathlib.Path) -> None:
  try:
    os.rename(part, folder)
  except OSError:
    if not folder.is_dir():  # else another process made the same corpus meanwhile: use that one
      raise


def _build(
  part: pathlib.Path,
  documents: Iterable[HashedDocument],
  tokenizer: tokenizers.Tokenizer,
  end_of_text: int,
  cfg: DataConfig,
  log: Log,
) -> None:
  """Encodes documents in the order of reading, then copies each split out in hash order."""
  dtype = np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32
  names: dict[str, int] = {}
  keys, lengths, source_ids = [], [], []
  raw = part / "raw.bin"
  log("tokenising ...")
  last_log = time.monotonic()
  with open(raw, "wb") as file:
    for chunk in _chunks(documents):
      if time.monotonic() - last_log > PROGRESS_SECONDS:
        last_log = time.monotonic()
        log(f"tokenising ... {len(keys):,} documents, {sum(lengths):,} tokens")
      lengths += _encode(file, [d.text for d in chunk], tokenizer, end_of_text, dtype)
      keys += [d.key for d in chunk]
      source_ids += [names.setdefault(d.source, len(names)) for d in chunk]
  held_out = np.array([is_validation(key, cfg.validation_fraction) for key in keys], bool)
  check_split(int((~held_out).sum()), int(held_out.sum()), cfg)
  log(f"tokenised {len(keys):,} documents: {sum(lengths):,} tokens")
  order = np.argsort(np.array(keys, np.uint64), kind="stable")
  tokens = np.memmap(raw, dtype, mode="r+")
  if cfg.shuffle_tokens:
    _shuffle(tokens, lengths, keys)
  for split, in_split in zip(SPLITS, (~held_out, held_out), strict=True):
    _write_split(part / split, order[in_split[order]], tokens, lengths, source_ids)
    split_digest(part / split)
  (part / "meta.json").write_text(json.dumps({"sources": list(names)}))
  del tokens
  raw.unlink()


def _shuffle(tokens: np.ndarray, lengths: list[int], keys: list[int]) -> None:
  """Puts each document's tokens in an order drawn from its key; its end of text stays its end."""
  begin = 0
  for length, key in zip(lengths, keys, strict=True):
    np.random.default_rng(key).shuffle(tokens[begin : begin + length - 1])
    begin += length


def _chunks(documents: Iterable[HashedDocument]) -> Iterator[list[HashedDocument]]:
  chunk, size = [], 0
  for document in documents:
    chunk.append(document)
    size += len(document.text)
    if size >= CHUNK_CHARACTERS:
      yield chunk
      chunk, size = [], 0
  if chunk:
    yield chunk


def _encode(
  file: BinaryIO,
  texts: list[str],
  tokenizer: tokenizers.Tokenizer,
  end_of_text: int,
  dtype: type,
) -> list[int]:
  """Appends each text's ids and the end of text to a file; returns how many tokens each became."""
  with failures_as(lambda message: DataError(f"the tokenizer fails on a text: {message}")):
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
  documents = [np.array([*encoding.ids, end_of_text], dtype) for encoding in encodings]
  for tokens in documents:
    file.write(tokens.data)
  return list(map(len, documents))


def _write_split(
  folder: pathlib.Path,
  order: np.ndarray,
  tokens: np.ndarray,
  lengths: list[int],
  source_ids: list[int],
) -> None:
  """Writes the documents `order` of the raw tokens, whose lengths are in the order of reading."""
  folder.mkdir()
  ends = np.cumsum(np.array(lengths, np.int64))
  sizes = np.array(lengths, np.int64)[order]
  offsets = np.concatenate([[0], np.cumsum(sizes)])
  out = np.lib.format.open_memmap(
    folder / "tokens.npy", mode="w+", dtype=tokens.dtype, shape=(int(offsets[-1]),)
  )
  for i, document in enumerate(order):
    out[offsets[i] : offsets[i + 1]] = tokens[ends[document] - sizes[i] : ends[document]]
  out.flush()
  np.save(folder / "offsets.npy", offsets)
  np.save(folder / "sources.npy", np.array(source_ids, np.int32)[order])
