"""A comparison of the bytes that tokens stand for with those of texts, as bits per byte need it.

They differ where a tokenizer loses something of a text: what it does not know, whether letters were
large, which white space stood between words. Then a figure per byte would be of another text.
"""

import contextlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import tokenizers

from engram_jax.config.bounded import cut
from engram_jax.data.corpus import HashedDocument, is_validation
from engram_jax.errors import EngramError
from engram_jax.memory.token_text import TokenPieces
from engram_jax.memory.vocabulary import encode_texts

RULE = 1  # part of a verdict's name: raise it when bytes are counted in another way
SAMPLE = 1 << 20  # characters of validation text that are compared
READ = 64 << 20  # characters that are read to find them


def check_bytes(
  folder: pathlib.Path,
  tokenizer: tokenizers.Tokenizer,
  counts: np.ndarray,
  read: Callable[[], Iterable[HashedDocument]],
  validation_fraction: float,
) -> str | None:
  """Says why the validation text's bytes are not known from its tokens; None where they are.

  Args:
    folder: of the corpus; the verdict is kept there.
    counts: int32 [V], bytes of each id.
    read: yields the documents of the source; called where there is no verdict.
  """
  path = folder / f"bytes-{RULE}.json"
  with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
    why = json.loads(path.read_text(encoding="utf-8"))["why"]
    if why is None or isinstance(why, str):
      return why
  try:
    texts = list(_sample(read(), validation_fraction))
  except (EngramError, OSError) as error:
    return f"the validation text cannot be read again: {cut(str(error), 200)}"
  ids = encode_texts(tokenizer, texts, "validation text")
  why = compare_bytes(tokenizer, counts, texts, ids)
  with contextlib.suppress(OSError):  # a cache that is not ours to write: compared next time again
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps({"why": why}), encoding="utf-8")
    os.replace(partial, path)
  return why


def compare_bytes(
  tokenizer: tokenizers.Tokenizer,
  counts: np.ndarray,
  texts: Sequence[str],
  ids: Sequence[Sequence[int]],
) -> str | None:
  """Says how the bytes of texts differ from those that their tokens stand for; None if they agree.

  A space that the tokenizer puts before a text's first word is passed over.
  """
  pieces, unknown = TokenPieces(tokenizer), _unknown_id(tokenizer)
  sizes, made, lost = [], [], 0
  for text, tokens in zip(texts, ids, strict=True):
    sizes.append(len(text.encode()))
    made.append(int(counts[list(tokens)].sum()))
    lost += sum(i == unknown for i in tokens)
    if _begins_with_space(pieces, counts, tokens):
      made[-1] -= not text.startswith(" ") or made[-1] > sizes[-1]
  if made == sizes and not lost:
    return None
  which = "the text has" if len(texts) == 1 else f"{len(texts):,} texts have"
  return (
    f"{which} {sum(sizes):,} bytes, but the tokens made of them stand for {sum(made):,}, and "
    f"{lost:,} of them for something unknown: what this tokenizer reads is not what was written"
  )


def _begins_with_space(pieces: TokenPieces, counts: np.ndarray, tokens: Sequence[int]) -> bool:
  """Says whether the first token's bytes begin with a space that is counted."""
  first = list(itertools.islice((i for i in tokens if not pieces.is_special(i)), 3))
  if first and (pieces.name(first[0]) or "").startswith(("▁", "Ġ")):  # however it is decoded
    return True
  if not first or counts[first[0]] != len(pieces[first[0]]):
    return False
  return b"".join(pieces[i] for i in first).startswith((b" ", "▁".encode()))


def _unknown_id(tokenizer: tokenizers.Tokenizer) -> int | None:
  """The id that stands for whatever the vocabulary lacks; None where all is known."""
  rule = json.loads(tokenizer.model.__getstate__())
  if isinstance(name := rule.get("unk_token"), str):
    return tokenizer.token_to_id(name)
  return rule.get("unk_id")


def _sample(documents: Iterable[HashedDocument], validation_fraction: float) -> Iterator[str]:
  """Yields the first validation texts, the beginnings of long ones; others if there are none."""
  size = read = 0
  others = []
  for document in documents:
    text = document.text[:SAMPLE]
    read += len(document.text)
    if is_validation(document.key, validation_fraction):
      size += len(text)
      yield text
    elif read < SAMPLE:
      others.append(text)
    if size >= SAMPLE or read >= READ:
      break
  if not size:
    yield from others
