"""Text from tokens: the bytes that are each token's own, and the text of many, in their context.

What a decoder makes of a token depends on its place. SentencePiece's drops the space of a text's
first word, WordPiece's puts one before a word unless it is the first, and a character may need
several tokens. So a token's own bytes are those that it adds in the middle of a text, and tokens
that continue a text are decoded behind its last ones.
"""

import codecs
import json
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers

from engram_jax.errors import ConfigError
from engram_jax.memory.vocabulary import failures_as

REPLACEMENT = "\ufffd"  # what decoding puts where the bytes are no UTF-8
LEFT, RIGHT = "x", "y"  # stand around a token whose own text is looked for
CONTEXT = 64  # tokens that are decoded again with each new one, at most about so many


def decode(tokenizer: tokenizers.Tokenizer, ids: Sequence[int], *, special: bool = False) -> str:
  """The text of token ids, with that of special tokens if `special`.

  Raises ConfigError where the tokenizers library fails.
  """
  with failures_as(lambda message: ConfigError(f"the tokenizer fails to decode: {message}")):
    return tokenizer.decode(list(ids), skip_special_tokens=not special)


class TokenPieces:
  """The bytes of each token that are its own: `pieces[id]`, empty for an id that is none.

  A special token's are those of its name. Raises ConfigError where the tokenizers library fails.
  """

  def __init__(self, tokenizer: tokenizers.Tokenizer):
    self._tokenizer, self._decoder = tokenizer, tokenizer.decoder
    kinds = {rule["type"] for rule in rules(self._decoder)}
    self._byte_level, self._byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
    self._added = dict(tokenizer.get_added_tokens_decoder().items())
    self._found: dict[int, bytes] = {}
    self._right = self.join([LEFT, RIGHT])[len(LEFT) :]

  def __getitem__(self, token: int) -> bytes:
    if token not in self._found:
      self._found[token] = self._find(token)
    return self._found[token]

  def name(self, token: int) -> str | None:
    """The token as its vocabulary spells it; None for an id that is none."""
    return self._tokenizer.id_to_token(token) if token >= 0 else None

  def is_special(self, token: int) -> bool:
    """Says whether decoding leaves the id out: special tokens, and ids that are no token."""
    if token in self._added:
      return self._added[token].special
    return self.name(token) is None

  def is_byte(self, token: int) -> bool:
    """Says whether it is one of the 256 that stand for a byte where there is no other token."""
    return self._byte_fallback and byte_of(self.name(token) or "") is not None

  def join(self, tokens: list[str]) -> str:
    """Decodes tokens as the vocabulary spells them."""
    with failures_as(lambda message: ConfigError(f"the tokenizer fails to decode: {message}")):
      return " ".join(tokens) if self._decoder is None else self._decoder.decode(tokens)

  def _find(self, token: int) -> bytes:
    if token in self._added:
      return self._added[token].content.encode()
    name = self.name(token)
    if name is None:
      return b""
    if self._byte_fallback and (byte := byte_of(name)) is not None:
      return bytes([byte])
    text = self.join([LEFT, name, RIGHT])
    text = text[len(LEFT) :].removesuffix(self._right) if text.startswith(LEFT) else name
    if REPLACEMENT in text and self._byte_level:
      return byte_level_bytes(name)
    return text.encode()


class Detokenizer:
  """The text of tokens that come one by one, after a prompt that they continue.

  The text of `push`, all calls together with `close`, is what the tokenizer decodes from prompt and
  tokens, without the prompt's. It is final: tokens that end in the middle of a character are held
  back. Where decoding would take back what has been said, as that of a run of byte tokens does once
  one of them is wrong, what was said stays and the rest is decoded anew.

  Attributes:
    held: tokens at the end, of the prompt's even, whose character is not complete.

  Raises ConfigError where the tokenizers library fails.
  """

  def __init__(self, tokenizer: tokenizers.Tokenizer, prompt: Sequence[int] = ()):
    self._tokenizer, self._pieces = tokenizer, TokenPieces(tokenizer)
    self._is_anchored = False  # something stands before the context, and is none of it
    ids = [i for i in prompt if not self._pieces.is_special(i)]
    ready, self.held = self._split(ids)
    self._context = self._last_ones(ready)
    self._said = self._decode(self._context)

  def push(self, token: int) -> str:
    """The text that is certain with this token."""
    if self._pieces.is_special(token):
      return ""
    self.held.append(token)
    ready, self.held = self._split(self.held)
    return self._say(ready) if ready else ""

  def close(self) -> str:
    """The text of the tokens held back, at the end of all."""
    ready, self.held = self.held, []
    return self._say(ready) if ready else ""

  def _say(self, ready: list[int]) -> str:
    text = self._decode([*self._context, *ready])
    if text.startswith(self._said):
      new = text[len(self._said) :]
      self._context = [*self._context, *ready]
    else:  # start anew, behind what was said
      self._is_anchored, self._context = True, ready
      new = text = self._decode(ready)
    last = self._last_ones(self._context)
    if len(last) < len(self._context):
      self._is_anchored = False
    elif len(last) > CONTEXT:  # a long run of bytes: whole characters are said, so it may be cut
      self._is_anchored, last = True, []
    if len(last) < len(self._context):
      self._context, text = last, self._decode(last)
    self._said = text
    return new

  def _decode(self, ids: list[int]) -> str:
    if not self._is_anchored:
      return decode(self._tokenizer, ids)
    names = [self._pieces.name(i) or "" for i in ids]
    text = self._pieces.join([LEFT, *names])
    return text.removeprefix(LEFT)

  def _last_ones(self, ids: list[int]) -> list[int]:
    """The last tokens, from one on that shares no character and no run of bytes with others."""
    for first in range(len(ids) - 1, 0, -1):
      if not self._pieces.is_byte(ids[first]) and is_text(self._pieces[ids[first]]):
        return ids[first:]
    return ids

  def _split(self, ids: list[int]) -> tuple[list[int], list[int]]:
    """The tokens up to the last one that ends with a whole character, and the others."""
    cut, following = len(ids), b"\x80"
    while following[:1] and following[0] & 0xC0 == 0x80 and (count := self._incomplete(ids[:cut])):
      cut -= count  # this one's character may go on in the next token, if that has such a byte
      following = b"".join(self._pieces[i] for i in ids[cut : cut + count])
    return ids[:cut], ids[cut:]

  def _incomplete(self, ids: list[int]) -> int:
    """Counts the tokens at the end that have bytes of a character that is not complete."""
    tail, count = b"", 0
    for token in reversed(ids):
      tail, count = self._pieces[token] + tail, count + 1
      if len(tail) >= 3:  # it lacks a byte at least, and has at most four
        break
    missing = _incomplete_bytes(tail)
    if not missing:
      return 0
    for used in range(1, count + 1):
      missing -= len(self._pieces[ids[-used]])
      if missing <= 0:
        return used
    return count


def continuation(tokenizer: tokenizers.Tokenizer, prompt: Sequence[int], new: Iterable[int]) -> str:
  """The text of token ids that continue a prompt: behind the prompt's, it makes that of all."""
  stream = Detokenizer(tokenizer, prompt)
  return "".join([*map(stream.push, new), stream.close()])


def token_texts(tokenizer: tokenizers.Tokenizer, ids: Iterable[int]) -> list[str]:
  """The text of each token that is its own; bytes that are no character are U+FFFD."""
  pieces = TokenPieces(tokenizer)
  return [pieces[i].decode(errors="replace") for i in ids]


def token_names(tokenizer: tokenizers.Tokenizer, count: int) -> list[str]:
  """A name for each of the ids below `count`, by which an API tells them apart: no two are equal.

  A token that is a text is called by it, another by its bytes, as OpenAI does: "bytes:\\xe6". Of
  several with one text, such as A and the byte 0x41, one has it for its name, and the others the
  bytes, or what the vocabulary calls them.
  """
  pieces = TokenPieces(tokenizer)
  names, taken = [""] * count, set()
  for choose in (_text, _text_of_byte, _bytes, _spelling, _numbered):
    for i in range(count):
      name = "" if names[i] else choose(pieces, i)
      if name and name not in taken:
        names[i] = name
        taken.add(name)
  return names


def _text(pieces: TokenPieces, token: int) -> str:
  return "" if pieces.is_byte(token) else _text_of_byte(pieces, token)


def _text_of_byte(pieces: TokenPieces, token: int) -> str:
  return pieces[token].decode() if is_text(pieces[token]) else ""


def _bytes(pieces: TokenPieces, token: int) -> str:
  is_named = not is_text(pieces[token]) or pieces.is_byte(token)
  spelt = "".join(f"\\x{byte:02x}" for byte in pieces[token])
  return f"bytes:{spelt}" if spelt and is_named else ""


def _spelling(pieces: TokenPieces, token: int) -> str:
  return pieces.name(token) or ""


def _numbered(pieces: TokenPieces, token: int) -> str:
  return f"{pieces.name(token) or ''}#{token}"


def is_text(piece: bytes) -> bool:
  """Says whether bytes are whole characters, one at least."""
  try:
    return bool(piece.decode())
  except UnicodeDecodeError:
    return False


def byte_of(name: str) -> int | None:
  """The byte that a token such as <0xE6> stands for where bytes are the last resort."""
  if len(name) != 6 or not (name.startswith("<0x") and name.endswith(">")):
    return None
  try:
    return bytes.fromhex(name[3:5])[0]
  except (ValueError, IndexError):
    return None


def byte_level_bytes(name: str) -> bytes:
  """The bytes of a token in GPT-2's alphabet, one character a byte; others stand for themselves."""
  try:
    return bytes(_ALPHABET[character] for character in name)
  except KeyError:
    return name.encode()


def _alphabet() -> dict[str, int]:
  """GPT-2's: printable bytes are characters of their own number, the others follow from 256 on."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_ALPHABET = _alphabet()


def _incomplete_bytes(tail: bytes) -> int:
  """Counts the bytes at the end that begin a character and need more."""
  for count in range(1, min(3, len(tail)) + 1):
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
      text = decoder.decode(tail[-count:])
    except UnicodeDecodeError:
      continue
    return 0 if text else count
  return 0


def rules(part: Any) -> list[dict[str, Any]]:
  """The rules of a tokenizer's normalizer, pre-tokenizer or decoder, as a tokenizer.json has them.

  part: None has none. Those of a sequence are all in the list.
  """
  return [] if part is None else list(_rules(json.loads(part.__getstate__())))


def _rules(tree: Any) -> Iterable[dict[str, Any]]:
  if isinstance(tree, dict):
    if isinstance(tree.get("type"), str):
      yield tree
    tree = list(tree.values())
  for part in tree if isinstance(tree, list) else []:
    yield from _rules(part)
