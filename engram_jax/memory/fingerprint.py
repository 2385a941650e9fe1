"""What a checkpoint's numbers mean: the tokenizer, token map, hash constants and text behind them.

Rows addressed with other constants are other rows, and nothing in an array's shape would tell, so
every checkpoint carries these and no run goes on without finding them equal.
"""

from typing import Any

from engram_jax.errors import ConfigError
from engram_jax.memory.compress import TokenCompressor
from engram_jax.memory.hashing import HashLayout


def identity(
  tokenizer_digest: str,
  compressor: TokenCompressor,
  layout: HashLayout | None,
  corpus_digest: str,
) -> dict[str, Any]:
  """JSON values for a checkpoint's meta. The corpus is the training text, in its order."""
  return {
    "tokenizer_digest": tokenizer_digest,
    "token_map_digest": compressor.digest,
    "hash_layout_digest": layout.digest if layout else None,
    "hash_layout": layout.describe() if layout else None,
    "corpus_digest": corpus_digest,
  }


_MEANING = {
  "tokenizer_digest": "tokenizer",
  "token_map_digest": "token map",
  "hash_layout_digest": "hash layout",
  "corpus_digest": "training text",
}


def check_identity(saved: dict[str, Any], now: dict[str, Any], where: str) -> None:
  """ConfigError naming the first of the values in `now` that was another one in `saved`."""
  for key, name in _MEANING.items():
    if key in now and saved.get(key) != now[key]:
      raise ConfigError(
        f"{where} was trained with another {name}: {key} {saved.get(key)} there, {now[key]} here; "
        f"use the {name} of that run (its tokenizer.json and config.yaml), or start another run"
      )
