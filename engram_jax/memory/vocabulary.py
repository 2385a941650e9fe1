"""Everything from text to row ids: a tokenizer, its token map, and the hash layout of a model.

Local letter: L, layers with a memory.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import tokenizers

from engram_jax.config import ModelConfig
from engram_jax.config.bounded import cut, read_bounded, shorten
from engram_jax.errors import ConfigError, EngramError, StorageError
from engram_jax.memory.compress import (
  TokenCompressor,
  as_integers,
  check_ids,
  tokenizer_digest,
)
from engram_jax.memory.hash_layout import HashLayout, find_dialect
from engram_jax.memory.hashing import row_ids

MAX_TOKENIZER_BYTES = 64 << 20  # the largest published, of 262,144 ids, has 33 MB


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
  """Everything that row ids follow from, built in one place.

  Attributes:
    tokenizer: as it encodes training text. compressor: the token map P: V -> V', the identity in a
      dialect that hashes raw ids. layout: hash layout of the layers with a memory; None without.
      address: `model.engram.address`; a control has row ids in the batches of a pipeline alone.
  """

  tokenizer: tokenizers.Tokenizer
  compressor: TokenCompressor
  layout: HashLayout | None
  address: str = "ngrams"

  @classmethod
  def build(
    cls, cfg: ModelConfig, tokenizer: tokenizers.Tokenizer, cache: pathlib.Path | None = None
  ) -> "Vocabulary":
    """The vocabulary of a model with a tokenizer.

    cache: a folder where token maps are kept; none is if left out.

    Raises ConfigError naming a field of `model.engram` that cannot be.
    """
    if find_dialect(cfg.engram.dialect).hashes_raw_ids or not cfg.engram.compress:
      compressor = TokenCompressor.identity(cfg.vocab_size)
    else:
      with failures_as(lambda message: ConfigError(f"the tokenizer fails to decode: {message}")):
        compressor = TokenCompressor.from_tokenizer(tokenizer, cache)
    address = cfg.engram.address if cfg.engram.is_control else "ngrams"
    return cls(tokenizer, compressor, HashLayout.of(cfg.engram, compressor), address)

  @functools.cached_property
  def tokenizer_digest(self) -> str:
    """SHA-256 (hex) of the tokenizer's JSON."""
    return tokenizer_digest(self.tokenizer)

  def row_ids(self, tokens_BT: np.ndarray, segments_BT: np.ndarray | None = None) -> np.ndarray:
    """int32 [L, B, T, J] of raw token ids, offsets included: one [B, T, J] a layer, in order.

    Raises ValueError for an id outside the token map, naming it, or shapes that do not agree;
    ConfigError where the rows are addressed as a control.
    """
    require_ngrams(self.address)
    return stacked_row_ids(self.layout, self.compressor, tokens_BT, segments_BT)

  def fingerprint(self, corpus_digest: str, content_digest: str) -> dict[str, Any]:
    """Digests of all that a checkpoint's numbers mean, as JSON values for its meta.

    Rows addressed with other constants are other rows, and nothing in an array's shape would tell,
    so every checkpoint carries these and no run goes on without finding them equal.

    corpus_digest, content_digest: of a sample and of all of the training text, in its order.
    """
    layout = self.layout
    return {
      "tokenizer_digest": self.tokenizer_digest,
      "token_map_digest": self.compressor.digest,
      "hash_layout_digest": layout.digest if layout else None,
      "hash_layout": layout.describe() if layout else None,
      "corpus_digest": corpus_digest,
      "corpus_content_digest": content_digest,
    }


def require_ngrams(address: str) -> None:
  """ConfigError for a control of experiments, whose rows do not follow from a text's n-grams."""
  if address != "ngrams":
    raise ConfigError(
      f"model.engram.address={address!r} is a control of experiments: its rows follow from no "
      "text, so it has losses over its own data (train.py, eval.py) and nothing else"
    )


def read_tokenizer(
  path: pathlib.Path, check: Callable[[bytes], None] | None = None
) -> tokenizers.Tokenizer:
  """The tokenizer of a tokenizer.json; ConfigError where there is none.

  check: is given the file's content before it is parsed, and raises ValueError to refuse it.
  """
  where = f"data.tokenizer={shorten(str(path), 1000)}"
  try:
    text = read_bounded(path, MAX_TOKENIZER_BYTES)
    if check is not None:
      check(text)
  except FileNotFoundError:
    no_file = "no such file; give 'bpe', 'deepseek', or a tokenizer.json"
    raise ConfigError(f"{where}: {no_file}") from None
  except OSError as error:
    raise ConfigError(f"{where}: {error.strerror or error}") from None
  except ValueError as error:
    raise ConfigError(f"{where}: {error}") from None
  with failures_as(lambda message: ConfigError(f"{where}: not a tokenizer.json: {message}")):
    return tokenizers.Tokenizer.from_str(text.decode("utf-8"))


def encode_texts(
  tokenizer: tokenizers.Tokenizer, texts: Sequence[str], name: str, *, special: bool = False
) -> list[list[int]]:
  """Token ids of each text; with those that the tokenizer puts around one if `special`.

  name: what the texts are, for the message of the ConfigError where the tokenizer fails on one.
  """
  with failures_as(lambda message: ConfigError(f"{name}: the tokenizer fails on it: {message}")):
    batch = tokenizer.encode_batch(list(texts), add_special_tokens=special)
  return [encoding.ids for encoding in batch]


@contextlib.contextmanager
def failures_as(make_error: Callable[[str], EngramError]) -> Generator[None]:
  """Turns what the tokenizers library raises into the error that is made of its message."""
  try:
    yield
  except BaseException as error:
    # It raises bare Exception for everything, and its panics are not even that.
    is_ours = isinstance(error, EngramError)
    if is_ours or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
      raise
    raise make_error(cut(str(error), 400)) from None


def stacked_row_ids(
  layout: HashLayout | None,
  compressor: TokenCompressor,
  tokens_BT: np.ndarray,
  segments_BT: np.ndarray | None = None,
) -> np.ndarray:
  """See `Vocabulary.row_ids`; for worker processes, which need no tokenizer."""
  tokens_BT = check_ids(tokens_BT, compressor.table.size, "token id", "BT")
  if layout is None:
    return np.zeros((0, *tokens_BT.shape, 0), np.int32)
  ids_BT = compressor(tokens_BT)
  out_LBTJ = np.empty((len(layout.layers), *tokens_BT.shape, layout.hash_heads), np.int32)
  for out, layer in zip(out_LBTJ, layout.layers, strict=True):
    out[...] = row_ids(layout, layer, ids_BT, segments_BT)
  return out_LBTJ


def check_tokenizer_file(path: pathlib.Path, digest: str) -> None:
  """StorageError where a run's tokenizer.json is not the tokenizer with this digest."""
  try:
    found = tokenizer_digest(read_tokenizer(path))
  except ConfigError as error:
    found = f"none ({error})"
  if found != digest:
    raise StorageError(
      f"{path} is not the tokenizer that this run is trained with: digest {found} there, {digest} "
      "by its config; put the old one back, or delete the file and it is written again"
    )


def check_prompt(prompt: Any, vocabulary: int) -> np.ndarray:
  """The token ids of a prompt as an array; ConfigError unless it has some, all in [0, vocabulary).

  vocabulary: V, ids of the tokenizer.
  """
  try:
    ids = as_integers(prompt, vocabulary, "token id")
  except ValueError as error:
    raise ConfigError(f"prompt: {error}") from None
  if ids.ndim != 1:
    raise ConfigError(f"prompt: a list of token ids, not of shape {ids.shape}")
  if not ids.size:
    raise ConfigError("prompt: an empty prompt has nothing to continue; give at least one token")
  if ids.min() < 0 or ids.max() >= vocabulary:
    wrong = ids[(ids < 0) | (ids >= vocabulary)][0]
    raise ConfigError(f"prompt: token id {wrong} is outside the vocabulary: 0..{vocabulary - 1}")
  return ids


_NAMES = {
  "tokenizer_digest": "tokenizer",
  "token_map_digest": "token map",
  "hash_layout_digest": "hash layout",
  "corpus_digest": "training text",
  "corpus_content_digest": "training text",
  "validation_content_digest": "validation text",
}
# Older checkpoints have none of these.
_LATER = ("corpus_content_digest", "validation_content_digest")


def _shown(value: Any) -> str:
  """A value of a fingerprint, in a message; a model without a memory has no hash layout."""
  return "none" if value is None else cut(str(value), 100)


def check_fingerprint(saved: dict[str, Any], now: dict[str, Any], where: str) -> None:
  """ConfigError naming the first of the values in `now` that was another one in `saved`.

  where: what was saved, for the message.

  Raises StorageError where `saved` is no fingerprint.
  """
  kinds = dict.fromkeys(_NAMES, str) | {"hash_layout": dict}
  for key, kind in kinds.items():
    if key in _LATER and key not in saved:
      continue
    if key not in saved or not isinstance(saved[key], kind | None):
      got = shorten(saved[key]) if key in saved else "missing"
      raise StorageError(f"{where} is damaged: {key} in its checkpoint's meta is {got}")
  for key, name in _NAMES.items():
    if key in now and key in saved and saved[key] != now[key]:
      raise ConfigError(
        f"{where} was trained with another {name}: {key} {_shown(saved[key])} there, "
        f"{_shown(now[key])} here; use the {name} of that run (its tokenizer.json and "
        "config.yaml), or start another run"
      )
