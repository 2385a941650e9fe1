"""A trial of a tokenizer.json from elsewhere, in a process of its own with little time and memory.

Its rules are programs: a regex may backtrack without end, replacements may double a text forty
times, and a rule that the library does not expect ends in a panic. Whether it does shows when it is
used, so it is used here first, on short texts with what such rules look for. It is no proof: a rule
that spares these texts may still meet one that it does not.

As a script, this file is that process; it imports nothing of the package.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import resource
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

SECONDS = 10  # of processor time
MEMORY = 2 << 30
GROWTH = 32  # characters that one may become: NFKC makes 18 of one
_VERSION = 1  # part of a verdict's name: raise it when the trial changes
_RUN = 2000  # characters of a text
_TEXTS = 200  # of them at most


def require_harmless(text: bytes, verdicts: pathlib.Path) -> None:
  """Tries a tokenizer.json, unless the same one passed before.

  Args:
    text: the file's content.
    verdicts: a folder that keeps an empty file for each one that passed, made if it is not there.

  Raises ValueError saying what happened where it did not end well, OSError where `verdicts` cannot
  be written.
  """
  import tokenizers

  key = f"{_VERSION} {tokenizers.__version__} {hashlib.sha256(text).hexdigest()}"
  verdict = verdicts / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.ok"
  if verdict.exists():
    return
  problem = _try_apart(text)
  if problem:
    raise ValueError(problem)
  verdicts.mkdir(parents=True, exist_ok=True)
  verdict.touch()


def _try_apart(text: bytes) -> str | None:
  """Runs `_try` in a process of its own; returns why the tokenizer is refused, if it is."""
  single = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}
  # -P: the modules beside this one are none of its own.
  command = [sys.executable, "-P", __file__, str(SECONDS), str(MEMORY)]
  try:
    done = subprocess.run(
      command, input=text, capture_output=True, env=os.environ | single, timeout=30 + 10 * SECONDS
    )
  except subprocess.TimeoutExpired:
    return _too_much()
  if done.returncode == 0:
    return None
  if said := done.stdout.decode(errors="replace").strip():
    return said
  if done.returncode < 0:  # the system ended it
    return _too_much()
  raise OSError(f"it could not be tried: {done.stderr.decode(errors='replace').strip()[-200:]}")


def _too_much() -> str:
  return (
    f"a text of {_RUN:,} characters takes it more than {SECONDS} s or {MEMORY >> 20:,} MiB, or "
    "crashes it: a rule of its normalizer, pre_tokenizer or decoder has no end"
  )


def _try(text: bytes) -> str | None:
  import tokenizers

  try:
    tokenizer = tokenizers.Tokenizer.from_str(text.decode("utf-8"))
  except Exception as error:  # the library raises bare Exception for whatever it cannot parse
    return f"not a tokenizer.json: {error}"
  tokenizer.no_truncation()
  tokenizer.no_padding()
  tokenizer.encode_special_tokens = True
  for sample in _texts(json.loads(text)):
    try:
      grown = _grows(tokenizer, sample)
    except Exception:
      continue  # it does not know some character, which the corpus need not have
    if grown:
      return f"it makes {grown:,} characters of {len(sample):,}: at most {GROWTH} of each"
  vocabulary = tokenizer.get_vocab(with_added_tokens=True)
  lengths = sum(map(len, vocabulary))
  texts = tokenizer.decode_batch([[i] for i in vocabulary.values()], skip_special_tokens=False)
  decoded = sum(map(len, texts))
  if decoded > GROWTH * (lengths + _RUN):
    return f"its {lengths:,} characters of tokens decode to {decoded:,}: at most {GROWTH} of each"
  return None


def _grows(tokenizer: Any, text: str) -> int | None:
  """Encodes and decodes a text; returns its length on the way where that is beyond all measure."""
  if tokenizer.normalizer is not None:
    normalized = len(tokenizer.normalizer.normalize_str(text))
    if normalized > GROWTH * len(text):
      return normalized
  encoding = tokenizer.encode(text, add_special_tokens=False)
  if len(encoding.ids) > GROWTH * len(text):
    return len(encoding.ids)
  decoded = len(tokenizer.decode(encoding.ids, skip_special_tokens=False))
  return decoded if decoded > GROWTH * (sum(map(len, encoding.tokens)) + len(text)) else None


def _texts(config: dict[str, Any]) -> Iterator[str]:
  """Yields what the rules of a tokenizer.json may look for, in runs that end with something else.

  Runs of letters, digits, marks and spaces, mixtures, the strings in the rules themselves, and runs
  of each character in those.
  """
  rules = [config.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
  strings = list(dict.fromkeys(s for s in _strings(rules) if 0 < len(s) <= _RUN))
  letters = "".join(chr(i) for i in range(32, 127)) + "\t\n\r\0é你😀\u0301\u200b"
  of_rules = dict.fromkeys(character for string in strings for character in string)
  runs = ["a", "0", " ", "A", "\n", ".", "é", "你", "ab ", "a1", " \n", "aB", letters]
  for run in list(dict.fromkeys([*runs, *strings[:60], *of_rules]))[:_TEXTS]:
    yield (run * _RUN)[: _RUN - 1] + ("!" if run[-1] != "!" else "?")
  yield letters


def _strings(tree: Any) -> Iterator[str]:
  if isinstance(tree, str):
    yield tree
  elif isinstance(tree, dict | list):
    for part in tree.values() if isinstance(tree, dict) else tree:
      yield from _strings(part)


def _limit(what: int, most: int) -> None:
  _, given = resource.getrlimit(what)
  most = most if given == resource.RLIM_INFINITY else min(most, given)
  with contextlib.suppress(ValueError):  # macOS has no limit of memory
    resource.setrlimit(what, (most, most))


def _main() -> int:
  seconds, memory = map(int, sys.argv[1:])
  _limit(resource.RLIMIT_CORE, 0)
  _limit(resource.RLIMIT_CPU, seconds)
  _limit(resource.RLIMIT_AS, memory)
  try:
    problem = _try(sys.stdin.buffer.read())
  except BaseException as error:  # a panic of the library's is no Exception
    problem = f"it fails on a text of {_RUN:,} characters: {error!r}"
  if problem:
    sys.stdout.buffer.write(" ".join(problem.split())[:400].encode("utf-8", "replace"))
  return 1 if problem else 0


if __name__ == "__main__":
  sys.exit(_main())
