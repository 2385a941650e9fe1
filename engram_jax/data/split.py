"""Exact duplicates out, and each document to training or validation by the hash of its text.

The hash decides, not the order or the file: adding documents moves none of the others, and a text
that occurs twice can never stand on both sides.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from engram_jax.config import DataConfig
from engram_jax.data.files import Document
from engram_jax.errors import ConfigError


class Hashed(NamedTuple):
  key: int  # 64 bits of the text's hash: decides the split, and the order within it
  source: str
  text: str


def unique(documents: Iterable[Document]) -> Iterator[Hashed]:
  """Documents that hold text, the first of each set of equal ones."""
  seen: set[bytes] = set()
  for source, text in documents:
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    if text.strip() and digest not in seen:
      seen.add(digest)
      yield Hashed(int.from_bytes(digest[:8], "big"), source, text)


def is_validation(key: int, fraction: float) -> bool:
  """Whether the document with this key is held out; `fraction` of all keys are."""
  return key < fraction * 2**64


def training_texts(documents: Iterable[Hashed], cfg: DataConfig) -> Iterator[str]:
  """The texts a tokenizer may learn from. At the end, the split has passed `check_split`."""
  counts = [0, 0]
  for document in documents:
    held_out = is_validation(document.key, cfg.validation_fraction)
    counts[held_out] += 1
    if not held_out:
      yield document.text
  check_split(counts[0], counts[1], cfg)


def check_split(training: int, validation: int, cfg: DataConfig) -> None:
  """ConfigError where one side has no documents."""
  where = f"data.source={cfg.source!r}" + (f" at {cfg.path!r}" if cfg.path else "")
  if training + validation == 0:
    raise ConfigError(f"{where}: an empty corpus, no document with any text")
  if training == 0 or validation == 0:
    raise ConfigError(
      f"{where}: data.validation_fraction={cfg.validation_fraction} leaves {training} documents "
      f"for training and {validation} for validation (the hash of each text decides): "
      f"both need one; change the fraction or give more documents"
    )
