"""Hypothesis strategies of ids that are no ids, and of what else does not fit beside them.

A bad value is invalid for one reason, and carries what a message about it should name.
"""

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

HOSTILE = (-1, -(2**31), -(2**63), 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**40, 2**63 - 1, 2**64 - 1)
INTEGERS = tuple(np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))
OTHERS = ("f2", "f4", "f8", "?", "c8", "U8", "S8", "O", "M8[s]", "m8[s]")
JAX_KINDS = "biufc"  # kinds of dtypes that jax has too

Shape = tuple[int, ...]


class Bad(NamedTuple):
  """A bad value, and parts of messages: one at least must be in the message that refuses it."""

  value: Any
  names: tuple[str, ...]


def valid(shape: Shape, size: int) -> np.ndarray:
  """Ids of this shape in [0, size), not all equal."""
  return np.random.default_rng(size % 1000).integers(0, min(size, 100), shape)


@st.composite
def outside(draw, shape: Shape, size: int) -> Bad:
  """Integers of any dtype, one of them outside [0, size)."""
  fits = lambda dtype, x: np.iinfo(dtype).min <= x <= np.iinfo(dtype).max
  candidates = [x for x in (*HOSTILE, size, size + 1, -size) if not 0 <= x < size]
  dtype = draw(st.sampled_from([d for d in INTEGERS if any(fits(d, x) for x in candidates)]))
  value = draw(st.sampled_from([x for x in candidates if fits(dtype, x)]))
  ids = np.zeros(shape, dtype)
  ids[tuple(draw(st.integers(0, n - 1)) for n in shape)] = value
  return Bad(ids, (str(value),))


@st.composite
def no_integers(draw, shape: Shape, size: int) -> Bad:
  """Valid ids as another type than integers, some with NaN, infinity or a fraction."""
  kind = draw(st.sampled_from(OTHERS))
  array = valid(shape, size).astype(kind)
  if kind[0] in "fc" and draw(st.booleans()):
    array.flat[0] = draw(st.sampled_from([np.nan, np.inf, 0.5]))
  return Bad(array, ("integer", "Python objects", "Object arrays"))


@st.composite
def another_rank(draw, shape: Shape, size: int) -> Bad:
  """Valid ids with an axis more or fewer."""
  other = draw(st.sampled_from([(*shape, 1), (1, *shape), shape[1:], ()]))
  return Bad(valid(other, size).astype(draw(st.sampled_from(["i4", "i8"]))), ("shape", "["))


@st.composite
def another_length(draw, shape: Shape, size: int) -> Bad:
  """Valid ids of the same rank, one axis of another length, possibly none."""
  axis = draw(st.integers(0, len(shape) - 1))
  length = draw(st.sampled_from([n for n in (0, 1, 3, 4, 9) if n != shape[axis]]))
  other = (*shape[:axis], length, *shape[axis + 1 :])
  return Bad(valid(other, size).astype(np.int32), ("shape", "["))


@st.composite
def no_array(draw, shape: Shape, size: int) -> Bad:
  """Ragged lists, lists that NumPy makes no integers of, and what is no list at all."""
  ids = valid(shape, size).tolist()
  last = ids
  while isinstance(last[0], list):
    last = last[-1]
  kinds = ["number", "text", "dict", "huge", "mixed", "hole", "fraction"]
  kind = draw(st.sampled_from([*kinds, "ragged"] if len(shape) > 1 else kinds))
  match kind:
    case "ragged":
      del last[-1]
      return Bad(ids, ("differ in length",))
    case "huge":
      last[0] = 10**30
      return Bad(ids, (str(10**30),))
    case "mixed":  # NumPy makes floats of these
      last[:2] = [-1, 2**63]
      return Bad(ids, ("-1",))
    case "hole" | "fraction":
      last[0] = None if kind == "hole" else 0.5
      return Bad(ids, ("integer",))
    case _:
      return Bad({"number": 0.5, "text": "abc", "dict": {"a": 1}}[kind], ("integer", "shape"))


def bad_ids(shape: Shape, size: int, more: str = "") -> st.SearchStrategy[Bad]:
  """Bad ids for a function that sees values and takes ids of `shape` in [0, size).

  more: "rank" if it takes that rank alone; "length" if that shape alone, which is more.
  """
  kinds = [outside(shape, size), no_integers(shape, size), no_array(shape, size)]
  return st.one_of([*kinds, *_shapes(shape, size, more)])


def bad_dtypes(shape: Shape, size: int, more: str = "") -> st.SearchStrategy[Bad]:
  """`bad_ids` for a function that may be traced: NumPy arrays of dtypes that jax has."""
  return traceable(st.one_of([no_integers(shape, size), *_shapes(shape, size, more)]))


def traceable(bad: st.SearchStrategy[Bad]) -> st.SearchStrategy[Bad]:
  """Those of dtypes that jax has too."""
  return bad.filter(lambda x: np.asarray(x.value).dtype.kind in JAX_KINDS)


def _shapes(shape: Shape, size: int, more: str) -> list[st.SearchStrategy[Bad]]:
  ranks = [another_rank(shape, size)] if more else []
  return [*ranks, another_length(shape, size)] if more == "length" else ranks


@st.composite
def bad_masks(draw, shape: Shape) -> Bad:
  """Masks of another dtype or shape."""
  if draw(st.booleans()):
    kind = draw(st.sampled_from(["i4", "i8", "u1", "f4", "U5", "O"]))
    return Bad(np.zeros(shape, bool).astype(kind), ("bool",))
  other = draw(st.sampled_from([(*shape, 1), shape[1:], (), (shape[0], shape[1] + 9), (0, 0)]))
  return Bad(np.zeros(other, bool), ("shape",))


@st.composite
def bad_floats(draw, shape: Shape) -> Bad:
  """Numbers of another dtype than floats, or of a shape that does not fit."""
  if draw(st.booleans()):
    return Bad(np.zeros(shape, draw(st.sampled_from(["i4", "u1", "?", "c8"]))), ("float",))
  other = [(*shape, 2), shape[1:], shape[:1], (), (*shape[:-1], shape[-1] + 1), (0, *shape[1:])]
  return Bad(np.zeros(draw(st.sampled_from(other)), np.float32), ("shape", "["))


@st.composite
def bad_prompts(draw, size: int, *, empty: bool = True) -> Bad:
  """Two prompts, of which the second is none. empty: it may be empty."""
  fixed = [Bad(None, ("integer",)), Bad([[1, 2], [3]], ("differ",)), Bad([[1, 2]], ("shape", "["))]
  fixed += [Bad([], ("empty",))] if empty else []
  ids = st.one_of(outside((4,), size), no_integers((4,), size), no_array((4,), size))
  bad = draw(st.one_of(ids, st.sampled_from(fixed)))
  value = bad.value
  if isinstance(value, np.ndarray) and value.dtype.kind not in "OMm" and draw(st.booleans()):
    value = value.tolist()
  return Bad([[1, 2, 3], value], bad.names)


@st.composite
def bad_token_files(draw, length: int, size: int) -> Bad:
  """Tokens of a corpus, one of them outside the vocabulary, or of another dtype or rank."""
  if draw(st.booleans()):
    return draw(st.one_of(no_integers((length,), size), another_rank((length,), size)))
  dtype = draw(st.sampled_from([np.uint16, np.uint32]))
  value = draw(st.sampled_from([size, size + 1, 2**16 - 1, 2**31, 2**32 - 1]))
  value = min(value, np.iinfo(dtype).max)
  tokens = np.zeros(length, dtype)
  tokens[draw(st.integers(0, length - 1))] = value
  return Bad(tokens, (str(value),))
