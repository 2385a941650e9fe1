"""How often a cache has the row: hit rates by its size, on real text, for tables of several sizes.

    python benchmarks/cache.py [--source wiki stdlib] [--rows-per-head 20000 200000] [--json]

Rows are counted over training documents and asked for by validation documents, which training never
saw. The configuration is configs/tiny.yaml's, with its 16 columns a token: orders 2 and 3, 8 heads.
For each table and each share of its rows that a cache holds:

    fixed      the most frequent rows of the training documents (`hot_ids`), for a device
    adaptive   a HostCache that has read as many training windows first

A hit rate is of rows asked for: `lookups` counts each, `distinct` each once a window of 256 tokens.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator

import numpy as np

from engram_jax.config import load_config
from engram_jax.data.pipeline import Pipeline, Prepared, prepare
from engram_jax.inference.stores.cache import HostCache
from engram_jax.inference.stores.device_cache import count_ids, hot_ids
from engram_jax.inference.stores.host import HostRows

SHARES = (0.001, 0.003, 0.01, 0.03, 0.1)  # of a table's rows
PLACE = 4 + 41  # bytes of a row of width 1 in a HostCache


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--source", nargs="+", default=["wiki"])
  parser.add_argument("--rows-per-head", type=int, nargs="+", default=[20_000, 200_000, 2_000_000])
  parser.add_argument("--windows", type=int, default=20_000, help="training windows to read")
  parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
  args = parser.parse_args()
  found = [
    one
    for source, rows in itertools.product(args.source, args.rows_per_head)
    for one in measure(source, rows, args.windows)
  ]
  for one in found:
    print(
      "  ".join(
        f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v:,}" if isinstance(v, int) else v
        for k, v in one.items()
      ),
      file=sys.stderr,
    )
  if args.json:
    print(json.dumps({"hit_rates": found}))


def measure(source: str, rows_per_head: int, windows: int) -> list[dict]:
  """Hit rates of one table at each share of its rows."""
  say = lambda text: print(text, file=sys.stderr)
  changes = {"model.engram.heads": 8, "model.engram.rows_per_head": rows_per_head}
  data = prepare(load_config("configs/tiny.yaml", changes | {"data.source": source}), say)
  seen = min(windows, len(data.training_pipeline(1).examples))
  training = list(itertools.islice(row_ids(data.training_pipeline(1)), seen))
  validation = list(row_ids(data.validation_pipeline(1)))
  counts = count_ids(training, 1)
  rows = data.vocabulary.layout.rows[data.vocabulary.layout.layers[0]]
  result = []
  for share in SHARES:
    places = int(share * rows)
    hot = hot_ids(counts, places)[0]
    lookups, distinct = fixed(hot, validation)
    result.append(
      {
        "source": source,
        "rows": rows,
        "rows_in_training": len(counts[0].ids),
        "training_tokens": seen * 256,
        "share": share,
        "places": places,
        "fixed_lookups": lookups,
        "fixed_distinct": distinct,
        "adaptive_distinct": adaptive(places, data, training, validation),
      }
    )
  return result


def row_ids(pipeline: Pipeline) -> Iterator[np.ndarray]:
  """Row ids [1, n, J] of each window's tokens; filling at a corpus' end is left out."""
  for step in itertools.count():
    if pipeline.seed is None and step == pipeline.steps:
      return
    batch = pipeline.batch_at(step)
    yield batch["row_ids"][:, batch["mask"]]


def fixed(hot: np.ndarray, validation: list[np.ndarray]) -> tuple[float, float]:
  """(of all lookups, of distinct rows a window) the share that is among `hot`."""
  hits = np.zeros(2)
  asked = np.zeros(2)
  for ids in validation:
    for i, some in enumerate((ids.reshape(-1), np.unique(ids))):
      hits[i] += np.isin(some, hot).sum()
      asked[i] += some.size
  return tuple((hits / asked).tolist())


def adaptive(
  places: int, data: Prepared, training: list[np.ndarray], validation: list[np.ndarray]
) -> float:
  """Of distinct rows a window, the share that a HostCache has; rows are one number wide."""
  tables = [
    np.zeros((data.vocabulary.layout.rows[x], 1), np.float32) for x in data.vocabulary.layout.layers
  ]
  cache = HostCache(
    HostRows.from_tables(tables, data.vocabulary.layout, data.vocabulary.compressor.digest),
    places * PLACE,
  )
  for ids in training:
    cache.fetch(ids)
  cache.telemetry.reset()
  for ids in validation:
    cache.fetch(ids)
  return cache.telemetry.as_dict()["hit_rate"]


if __name__ == "__main__":
  main()
