"""Seeded random changes of JSON trees and of bytes."""

import copy
import json
import random
from typing import Any

ODD = [
  None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**64, -(2**70), 10**300, 0.5, -0.0, 1e308, 5e-324,
  "", "x", "0", "1e999", "nan", "null", "../x", "/dev/zero", "~", "a/b", "float32[2]", "float32[",
  "\0", "\n", "é😀", "\ud800", "9" * 40, "ab" * 300, "f" * 64, [], {}, [[]], [None], {"": None},
  {"x": {"y": [1]}}, [1, "2", 3.0],
]  # fmt: skip


def mutate(rng: random.Random, tree: Any) -> Any:
  """A copy of a tree of JSON values with one to three changes, each anywhere in it."""
  root = [copy.deepcopy(tree)]
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    owner, key = rng.choice(list(_places(root)))
    _change(rng, root, owner, key)
  return root[0] if root else None


def _places(node: Any) -> Any:
  """Yields (owner, key or index) of every value below a list or a dict."""
  for key in list(node) if isinstance(node, dict) else range(len(node)):
    yield node, key
    if isinstance(node[key], dict | list):
      yield from _places(node[key])


def _change(rng: random.Random, root: list, owner: Any, key: Any) -> None:
  value, kind = owner[key], rng.randrange(8)
  if kind == 0 and owner is not root:
    del owner[key]
  elif kind == 1 and isinstance(owner, dict):
    owner[_text(rng, key)] = owner.pop(key)
  elif kind == 2:
    owner[key] = rng.choice([[value], {"x": value}, [value, value], str(value)])
  elif kind == 3:
    other, place = rng.choice(list(_places(root)))
    owner[key] = copy.deepcopy(other[place])
  elif kind == 4 and isinstance(value, list) and value:
    value.insert(rng.randrange(len(value) + 1), copy.deepcopy(rng.choice(value)))
  elif kind == 4 and isinstance(value, dict):
    value[rng.choice(["x", "", "0", "-1", "é"])] = copy.deepcopy(rng.choice(ODD))
  elif kind == 5 and isinstance(value, int | float):
    owner[key] = rng.choice([value + 1, value - 1, -value, value * 2**31, float(value), str(value)])
  elif kind == 5 and isinstance(value, str):
    owner[key] = _text(rng, value)
  else:
    owner[key] = copy.deepcopy(rng.choice(ODD))


def _text(rng: random.Random, text: str) -> str:
  i = rng.randrange(len(text) + 1)
  letter = rng.choice(["", "x", "0", "-", "\0", "\n", " ", "/", ".", "[", "é", "\ud800"])
  return rng.choice([text[:i] + letter + text[i + 1 :], text[:i], text + text, text[i:] + letter])


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
  """Bytes with one to four flips, cuts, repetitions or insertions."""
  changed = bytearray(content)
  for _ in range(rng.choice((1, 1, 2, 4))):
    i, j = sorted(rng.randrange(len(changed) + 1) for _ in range(2))
    kind = rng.randrange(5)
    if kind == 0 and i < len(changed):
      changed[i] ^= 1 << rng.randrange(8)
    elif kind == 1:
      del changed[i : min(j, i + rng.choice((1, 8, 10_000)))]
    elif kind == 2:
      changed[i:i] = changed[i : min(j, i + 50)]
    elif kind == 3:
      changed[i:i] = rng.choice([b"\0", b"\xff", b"\n", b"[", b"{", b'"', b"9" * 30, b": ", b"- "])
    elif changed:
      changed = changed[:j]
  return bytes(changed)


def dump(tree: Any) -> bytes:
  """JSON of a tree, with NaN and infinity as Python writes them."""
  return json.dumps(tree).encode()
