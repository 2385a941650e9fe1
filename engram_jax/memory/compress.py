"""Token compression: a surjection from a tokenizer's ids onto canonical ids (paper, section 2.2).

Tokens whose text is the same but for case, accents, compatibility forms and surrounding space
share one canonical id, so "Apple", " apple" and "APPLE" read the same rows. The model's own
embedding and head keep the original vocabulary. NumPy only.
"""

import hashlib
import pathlib
import tempfile
import zipfile
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import tokenizers
from tokenizers import normalizers

from engram_jax.errors import StorageError

REPLACEMENT = "\ufffd"  # what decoding puts where the bytes are no UTF-8
LONE_SPACE = "\ue000"  # private use: shelters a token that is one space from Strip
RULE = 1  # raise when the rule below changes: caches of the older rule are then passed over


def _normalizer() -> normalizers.Normalizer:
  """The paper's normalisation (appendix C), in the order that gives its counts."""
  return normalizers.Sequence(
    [
      normalizers.NFKC(),
      normalizers.NFD(),
      normalizers.StripAccents(),
      normalizers.Lowercase(),
      normalizers.Replace(tokenizers.Regex(r"[ \t\r\n]+"), " "),
      normalizers.Replace(tokenizers.Regex(r"^ $"), LONE_SPACE),
      normalizers.Strip(),
      normalizers.Replace(LONE_SPACE, " "),
    ]
  )


def tokenizer_digest(tokenizer: tokenizers.Tokenizer) -> str:
  """SHA-256 (hex) of the tokenizer's whole JSON: vocabulary, merges, added tokens and rules."""
  return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


class TokenCompressor:
  """The token map P: V -> V' as a table; calling it maps an array of ids.

  Attributes:
    table: int32 [V], read-only; canonical id of each id, numbered in order of first appearance.
    size: V', how many canonical ids there are.
    digest: SHA-256 (hex) of the table. Hash multipliers depend on V', so a checkpoint keeps it.
  """

  def __init__(self, table: np.ndarray):
    table = check_ids(table, 2**31, "token map: canonical id").astype("<i4")
    if table.ndim != 1 or table.size == 0:
      raise ValueError(f"a token map is a non-empty [V] array, not of shape {table.shape}")
    canonical, first = np.unique(table, return_index=True)
    size = canonical.size
    if canonical[0] != 0 or canonical[-1] != size - 1 or np.any(np.diff(first) < 0):
      raise ValueError("canonical ids must be 0, 1, 2, ... in order of first appearance")
    table.flags.writeable = False
    self.table = table
    self.size = int(size)
    self.digest = hashlib.sha256(table.tobytes()).hexdigest()

  @classmethod
  def from_tokenizer(
    cls, tokenizer: tokenizers.Tokenizer, cache: pathlib.Path | None = None
  ) -> Self:
    """The map of a tokenizer, read from or left in the folder `cache`, by the tokenizer's digest.

    V is the largest id + 1, added tokens included. Ids in a gap of the vocabulary, which no text
    can produce, read as the empty text. Raises StorageError where `cache` cannot be written.
    """
    if cache is None:
      return cls._build(tokenizer)
    name = f"token_map-{RULE}-{tokenizer_digest(tokenizer)[:32]}.npz"
    path = pathlib.Path(cache) / name
    found = _load(path)
    if found is not None:
      return cls(found)
    made = cls._build(tokenizer)
    _save(path, made.table)
    return made

  @classmethod
  def _build(cls, tokenizer: tokenizers.Tokenizer) -> Self:
    ids = range(max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1)
    texts = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
    return cls.from_texts(texts, [tokenizer.id_to_token(i) or "" for i in ids])

  @classmethod
  def from_texts(cls, texts: Sequence[str], raws: Sequence[str]) -> Self:
    """The map of ids whose decoded texts and raw token strings are given, in the ids' order."""
    if len(texts) != len(raws):
      raise ValueError(f"{len(texts)} texts but {len(raws)} raw tokens: one of each per id")
    normalise = _normalizer().normalize_str
    seen: dict[str, int] = {}
    table = np.empty(len(texts), np.int32)
    for i, (text, raw) in enumerate(zip(texts, raws, strict=True)):
      key = raw if REPLACEMENT in text else normalise(text) or text
      table[i] = seen.setdefault(key, len(seen))
    return cls(table)

  @classmethod
  def identity(cls, vocab_size: int) -> Self:
    """No compression: V' = V. For dialects that hash raw ids, and for the paper's ablation."""
    return cls(np.arange(vocab_size, dtype=np.int32))

  def __call__(self, ids: np.ndarray) -> np.ndarray:
    """int32 canonical ids of integer ids of any shape; ValueError on an id outside [0, V)."""
    return self.table[check_ids(ids, self.table.size, "token id")]

  def classes(self, limit: int | None = None) -> list[tuple[int, ...]]:
    """Ids that share a canonical id, the largest such classes first (paper, table 6)."""
    counts = np.bincount(self.table, minlength=self.size)
    order = np.argsort(-counts, kind="stable")[:limit]
    members = np.split(np.argsort(self.table, kind="stable"), np.cumsum(counts)[:-1])
    return [tuple(members[canonical].tolist()) for canonical in order]


def check_ids(ids: Any, size: int, what: str, axes: str | None = None) -> np.ndarray:
  """Refuses ids that are no integers or outside [0, size), naming the first and its position.

  ids: an array or nested lists; they are returned as an array. axes: letters of the axes that the
  array must have, such as "BT"; any if left out.

  Raises ValueError.
  """
  ids = as_integers(ids, size, what)
  _check_axes(ids.shape, what, axes)
  if ids.size == 0 or (ids.min() >= 0 and ids.max() < size):
    return ids
  position = np.argwhere((ids < 0) | (ids >= size))[0]
  raise ValueError(
    f"{what} {ids[tuple(position)]} at position {position.tolist()} is outside [0, {size})"
  )


def check_visible_ids(ids: Any, size: int | None, what: str, axes: str | None = None) -> Any:
  """`check_ids` as far as can be seen: of a jax array, traced or not, only dtype and axes.

  Reading the values of one that lies on a device would make the host wait for it, and inside jit
  there are none: whoever has the ids on the host before checks them there.

  size: None for integers of any value.
  """
  if not hasattr(ids, "aval"):
    return as_integers(ids, None, what, axes) if size is None else check_ids(ids, size, what, axes)
  if getattr(ids.dtype, "kind", "") not in "iu":
    raise ValueError(f"{what}s are integers, not {ids.dtype}")
  _check_axes(ids.shape, what, axes)
  return ids


def as_integers(ids: Any, size: int | None, what: str, axes: str | None = None) -> np.ndarray:
  """The ids as an array of integers; ValueError for any others. size: for the message."""
  try:
    array = np.asarray(ids)
  except ValueError:
    raise ValueError(f"{what}s are an array of integers: these lists differ in length") from None
  if array.dtype.kind not in "iu":
    if isinstance(ids, np.ndarray) or array.size:
      raise ValueError(_why_no_integers(ids, array, size, what))
    array = array.astype(np.int32)  # an empty list
  _check_axes(array.shape, what, axes)
  return array


def _why_no_integers(ids: Any, array: np.ndarray, size: int | None, what: str) -> str:
  """Says which of the ids are none. Of lists that hold large integers NumPy makes other types."""
  found = str(array.dtype)
  if not isinstance(ids, np.ndarray):
    values = np.array(ids, dtype=object).reshape(-1).tolist()
    other = [x for x in values if isinstance(x, bool) or not isinstance(x, int | np.integer)]
    if not other:
      valid = "int64" if size is None else f"[0, {size})"
      worst = next(x for x in values if x < 0 or x >= (2**63 if size is None else size))
      return f"{what} {worst} is outside {valid}"
    found += f", such as {str(other[0])[:40]}"
  return f"{what}s are integers, not {found}"


def _check_axes(shape: tuple[int, ...], what: str, axes: str | None) -> None:
  if axes is not None and len(shape) != len(axes):
    raise ValueError(f"{what}s are [{', '.join(axes)}], not of shape {shape}")


def _load(path: pathlib.Path) -> np.ndarray | None:
  """The cached table, or None where there is none or it is damaged: it is then built again."""
  try:
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
      table, digest = arrays["table"], str(arrays["digest"])
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None
  return table if hashlib.sha256(table.tobytes()).hexdigest() == digest else None


def _save(path: pathlib.Path, table: np.ndarray) -> None:
  """Writes beside and renames, so that a reader or a killed process never leaves half a file."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as folder:
      part = pathlib.Path(folder) / path.name
      np.savez(part, table=table, digest=hashlib.sha256(table.tobytes()).hexdigest())
      part.replace(path)
  except OSError as error:
    raise StorageError(f"the token map's cache {path} cannot be written: {error}") from None
