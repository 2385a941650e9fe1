"""Constants of a model's hash: multipliers, primes, and where each head's table starts.

A layout is one frozen, hashable value (usable as a static argument of jit) that holds the constants
of every layer as Python integers. Released models differ in a few rules, which are a `Dialect`;
memory/dialects has a file for each. In all of them the primes of a model are distinct: for each
layer, then order, then head, the next prime from that order's `rows_per_head` on that no head has
taken.
"""

import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import pydantic

from engram_jax.config import DIALECTS, MAX_ROWS, EngramConfig
from engram_jax.config.bounded import cut, shorten
from engram_jax.errors import ConfigError
from engram_jax.memory.compress import TokenCompressor


class Dialect(NamedTuple):
  """The rules in which released hashes differ.

  Attributes:
    multipliers: `(layout, layer) -> N odd integers`, one for each token of an n-gram, the newest
      first. N is `layout.max_ngram`; a product with any canonical id must be below 2^63, which
      `2 * n + 1` is for n below `largest_half(layout)`.
    hashes_raw_ids: the tokenizer's own ids are hashed, not canonical ones.
    pad_ends_look_back: a token whose id is the layout's `pad_id` ends look-back.
  """

  multipliers: "Callable[[HashLayout, int], tuple[int, ...]]"
  hashes_raw_ids: bool = False
  pad_ends_look_back: bool = False


def find_dialect(name: str) -> Dialect:
  """The dialect of that name: `DIALECT` in the file memory/dialects/NAME.py."""
  if name not in DIALECTS:
    raise ValueError(f"dialect={name!r} is none of {', '.join(DIALECTS)}")
  module = importlib.import_module(f"engram_jax.memory.dialects.{name}")
  dialect = getattr(module, "DIALECT", None)
  if not isinstance(dialect, Dialect):
    raise ConfigError(f"{module.__file__} must define DIALECT, a Dialect")
  return dialect


@dataclasses.dataclass(frozen=True)
class HashLayout:
  """All constants of a model's hash; make one with `HashLayout.build`.

  Attributes by layer id: `multipliers[layer]` (N ints), `primes[layer]` (a tuple per order of a
  prime per head), `offsets[layer]` (J ints: where each head's table starts), `rows[layer]` (int:
  the sum of the primes).
  """

  dialect: str
  layers: tuple[int, ...]
  rows_per_head: tuple[int, ...]  # one per order
  max_ngram: int
  heads: int
  compressed_vocab: int
  pad_id: int
  seed: int = 0

  @classmethod
  def build(
    cls,
    dialect: str,
    layers: Sequence[int],
    rows_per_head: int | Sequence[int],
    max_ngram: int,
    heads: int,
    compressed_vocab: int,
    pad_id: int,
    seed: int = 0,
  ) -> Self:
    """Makes the layout of a model.

    Args:
      layers: 0-based ids of the layers with a memory, in the order in which they take primes.
      rows_per_head: start of the prime search: one number, or one per order 2..max_ngram.
      compressed_vocab: V'; ids are in [0, V'). A dialect that hashes raw ids has V' = V.
      pad_id: canonical id that stands before the start of a text.
      seed: of the multipliers. 0 is each dialect's released seed.

    Raises ValueError naming the field; a table of 2^31 rows or more has no int32 row ids.
    """
    single = isinstance(rows_per_head, int | np.integer)
    starts: Any = [rows_per_head] * (max_ngram - 1) if single else rows_per_head
    return cls(
      dialect=dialect,
      layers=tuple(map(int, layers)),
      rows_per_head=tuple(map(int, starts)),
      max_ngram=int(max_ngram),
      heads=int(heads),
      compressed_vocab=int(compressed_vocab),
      pad_id=int(pad_id),
      seed=int(seed),
    )

  @classmethod
  def of(
    cls, cfg: EngramConfig, compressor: TokenCompressor, where: str = "model.engram"
  ) -> Self | None:
    """The layout of a config with a token map; None without a memory.

    where: what holds the config, for messages.

    Raises ConfigError naming the field that cannot be.
    """
    if not cfg.layers:
      return None
    ids = len(compressor.table)
    if cfg.pad_id >= ids:
      raise ConfigError(f"{where}.pad_id={cfg.pad_id} is outside the tokenizer's {ids:,} ids")
    try:
      return cls.build(
        cfg.dialect,
        cfg.layers,
        cfg.rows_per_head,
        cfg.max_ngram,
        cfg.heads,
        compressor.size,
        int(compressor.table[cfg.pad_id]),
        cfg.seed,
      )
    except ValueError as error:  # primes may add up to more rows than the config's check allows
      raise ConfigError(f"{where}: {error}") from None

  def __post_init__(self) -> None:
    def require(ok: bool, message: str) -> None:
      if not ok:
        raise ValueError(message)

    orders = self.max_ngram - 1
    find_dialect(self.dialect)
    require(orders >= 1, f"max_ngram={self.max_ngram} must be at least 2")
    require(self.heads >= 1, f"heads={self.heads} must be at least 1")
    require(self.seed >= 0, f"seed={self.seed} must not be negative")
    require(
      len(set(self.layers)) == len(self.layers) and min(self.layers, default=0) >= 0,
      f"layers={list(self.layers)} must be distinct and not negative",
    )
    require(
      len(self.rows_per_head) == orders and min(self.rows_per_head) >= 1,
      f"rows_per_head={list(self.rows_per_head)} must be {orders} positive numbers, "
      f"one per order 2..{self.max_ngram}",
    )
    require(
      1 <= self.compressed_vocab <= MAX_ROWS,
      f"compressed_vocab={self.compressed_vocab} must be in [1, {MAX_ROWS}]",
    )
    require(
      0 <= self.pad_id < self.compressed_vocab,
      f"pad_id={self.pad_id} is outside [0, compressed_vocab={self.compressed_vocab})",
    )
    rows = self.heads * sum(self.rows_per_head)  # a lower bound, before any prime is searched
    for count in itertools.chain([rows], self.rows.values() if rows <= MAX_ROWS else []):
      require(count <= MAX_ROWS, f"a table of {count} rows has no int32 row ids: max {MAX_ROWS}")

  @property
  def hash_heads(self) -> int:
    """J, rows that one token looks up: orders x heads per order."""
    return (self.max_ngram - 1) * self.heads

  @functools.cached_property
  def multipliers(self) -> dict[int, tuple[int, ...]]:
    """Odd multipliers of each position of an n-gram, by layer."""
    draw = find_dialect(self.dialect).multipliers
    drawn = {layer: draw(self, layer) for layer in self.layers}
    largest = self.compressed_vocab - 1
    for layer, factors in drawn.items():
      valid = all(m > 0 and m % 2 and m * largest < 2**63 for m in factors)
      if len(factors) != self.max_ngram or not valid:
        raise ValueError(
          f"dialect={self.dialect!r} gives layer {layer} multipliers {list(factors)}: they must be "
          f"max_ngram={self.max_ngram} positive odd integers, with products below 2^63 for ids of "
          f"up to {largest}"
        )
    return drawn

  @functools.cached_property
  def primes(self) -> dict[int, tuple[tuple[int, ...], ...]]:
    """Sizes of the tables of each hash head, by layer and order."""
    taken: set[int] = set()
    streams = {start: primes_from(start) for start in self.rows_per_head}

    def take(start: int) -> int:
      # One stream per start never looks back: a prime it passed is taken.
      prime = next(p for p in streams[start] if p not in taken)
      taken.add(prime)
      return prime

    return {
      layer: tuple(tuple(take(start) for _ in range(self.heads)) for start in self.rows_per_head)
      for layer in self.layers
    }

  @functools.cached_property
  def offsets(self) -> dict[int, tuple[int, ...]]:
    """First row of each of the J hash heads in the layer's table, by layer."""
    return {
      layer: tuple(itertools.accumulate(itertools.chain(*by_order), initial=0))[:-1]
      for layer, by_order in self.primes.items()
    }

  @functools.cached_property
  def rows(self) -> dict[int, int]:
    """R, rows of the table, by layer."""
    return {layer: sum(map(sum, by_order)) for layer, by_order in self.primes.items()}

  def describe(self) -> dict[str, Any]:
    """The parameters and the constants they give, for JSON.

    Multipliers are strings: they exceed 2^53, and a reader that keeps numbers as float64 would
    corrupt them silently.
    """
    return dataclasses.asdict(self) | {
      "layers": list(self.layers),
      "rows_per_head": list(self.rows_per_head),
      "multipliers": {str(k): list(map(str, v)) for k, v in self.multipliers.items()},
      "primes": {str(k): [list(heads) for heads in v] for k, v in self.primes.items()},
    }

  @classmethod
  def from_description(cls, description: dict[str, Any]) -> Self:
    """Reads the layout that `describe` wrote.

    Raises ValueError, in one line, where the rebuilt constants differ, and for anything that
    `describe` did not write, before any prime is searched.
    """
    if not isinstance(description, dict):
      raise ValueError(f"a hash layout's description is an object (got {shorten(description)})")
    names = {field.name for field in dataclasses.fields(cls)}
    missing = (names | {"multipliers", "primes"}) - description.keys()
    if missing:
      raise ValueError(f"a hash layout's description lacks {', '.join(sorted(missing))}")
    try:
      stored = _Description.model_validate(description)
    except pydantic.ValidationError as error:
      first = error.errors(include_url=False)[0]
      where = ".".join(cut(str(part), 40) for part in first["loc"])
      raise ValueError(f"{where}: {first['msg']} (got {shorten(first['input'])})") from None
    stored.require_primes()
    layout = cls.build(**{name: description[name] for name in names})
    rebuilt = layout.describe()
    for name in ("multipliers", "primes"):
      if rebuilt[name] != description[name]:
        old, new = shorten(description[name], 200), shorten(rebuilt[name], 200)
        raise ValueError(f"{name}: stored {old} but rebuilt {new}")
    return layout

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 (hex) over every parameter and constant."""
    return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()


Whole = Annotated[int, pydantic.Field(ge=0, lt=2**63)]
Prime = Annotated[int, pydantic.Field(ge=2, le=MAX_ROWS)]


class _Description(pydantic.BaseModel):
  """The types of what `HashLayout.describe` writes."""

  model_config = pydantic.ConfigDict(strict=True)

  dialect: str
  layers: list[Whole]
  rows_per_head: list[Annotated[int, pydantic.Field(ge=1, le=MAX_ROWS)]]
  max_ngram: Annotated[int, pydantic.Field(ge=2, le=64)]
  heads: Annotated[int, pydantic.Field(ge=1, le=MAX_ROWS)]
  compressed_vocab: Whole
  pad_id: Whole
  seed: Annotated[int, pydantic.Field(ge=0)]
  multipliers: dict[str, list[str]]
  primes: dict[str, list[list[Prime]]]

  def require_primes(self) -> None:
    """Raises ValueError unless there is a prime for each layer, order and head.

    A description of a few bytes could else ask for a billion of them.
    """
    counts = [len(heads) for orders in self.primes.values() for heads in orders]
    orders = (self.max_ngram - 1) * len(self.layers)
    if not 0 < len(counts) == orders or set(counts) != {self.heads}:
      raise ValueError("its primes are not one for each layer, order and head")
    for layer, stored in self.primes.items():
      if (rows := sum(map(sum, stored))) > MAX_ROWS:
        raise ValueError(f"its primes give layer {shorten(layer)} {rows} rows: at most {MAX_ROWS}")


def largest_half(layout: HashLayout) -> int:
  """Half the largest factor whose product with any id stays below 2^63."""
  return max(1, ((2**63 - 1) // layout.compressed_vocab) // 2)


# With these bases Miller-Rabin is a proof below 3,215,031,751 (Jaeschke 1993); we stay below 2^31.
BASES = (2, 3, 5, 7)


def is_prime(n: int) -> bool:
  """Says whether n is prime, for 0 <= n < 2^31."""
  if n < 2:
    return False
  for base in BASES:
    if n % base == 0:
      return n == base
  shift = ((n - 1) & -(n - 1)).bit_length() - 1
  return all(_passes(n, base, shift) for base in BASES)


def _passes(n: int, base: int, shift: int) -> bool:
  """One round of Miller-Rabin, where n - 1 = odd * 2^shift."""
  x = pow(base, (n - 1) >> shift, n)
  if x in (1, n - 1):
    return True
  for _ in range(shift - 1):
    x = x * x % n
    if x == n - 1:
      return True
  return False


def primes_from(start: int) -> Iterator[int]:
  """The primes >= start, rising."""
  n = max(start, 2)
  while True:
    if is_prime(n):
      yield n
    n += 1
