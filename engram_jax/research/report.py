"""From the results of a sweep to a CSV, and from a CSV to a table, statistics and a plot."""

import csv
import importlib.util
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from engram_jax.config import load_config
from engram_jax.core.manifest import replace_file
from engram_jax.errors import ConfigError, DataError
from engram_jax.research import statistics
from engram_jax.research.arms import MEMORY, TWIN
from engram_jax.research.plots import draw
from engram_jax.research.sweep import CONFIGS, Sweep

NUMBERS = {
  "index": int,
  "seed": int,
  "steps": int,
  "tokens": int,
  "total_parameters": int,
  "active_parameters": int,
  "flops_per_token": float,
  "loss": float,
  "bits_per_byte": float,
  "training_loss": float,
  "seconds": float,
  "cpus": int,
}
COLUMNS = (
  "index",
  "arm",
  "seed",
  "commit",
  *[name for name in NUMBERS if name not in ("index", "seed")],
)
COLUMNS += ("curve", "sources")  # JSON


def require_libraries() -> None:
  """ConfigError unless the extra `research` is installed, before any run is begun."""
  missing = [n for n in ("scipy", "statsmodels", "matplotlib") if not importlib.util.find_spec(n)]
  if missing:
    raise ConfigError(
      f"a sweep ends in statistics and a plot, which need {', '.join(missing)}: "
      "pip install 'engram_jax[research]'"
    )


def report_sweep(sweep: Sweep, path: pathlib.Path) -> dict[str, Any] | None:
  """Writes the CSV of a sweep's results, and what `report_csv` makes of it; None without results.

  Beside the CSV lies a JSON file of the same name, with the arms and claims that give it meaning.
  """
  found = [sweep.result(run) for run in sweep.runs]
  results = [result for result in found if result is not None]
  if not results:
    return None
  path.parent.mkdir(parents=True, exist_ok=True)
  write_csv(path, results)
  design = {k: v for k, v in sweep.describe().items() if k not in ("format", "seeds")}
  design["runs"] = {"done": len(results), "of": len(found)}
  files = sorted((sweep.folder / CONFIGS).glob("budget*.yaml"))
  design["configs"] = {file.stem: load_config(file).model_dump(mode="json") for file in files}
  replace_file(path.with_suffix(".design.json"), json.dumps(design, indent=1).encode())
  return report_csv(path)


def write_csv(path: pathlib.Path, results: Iterable[dict[str, Any]]) -> None:
  """Writes one row a run; floats are written so that they are read back equal."""
  partial = path.with_name(path.name + ".partial")
  with open(partial, "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for result in results:
      row = result | {name: json.dumps(result[name]) for name in ("curve", "sources")}
      writer.writerow({name: row[name] for name in COLUMNS})
  partial.replace(path)


def read_csv(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads what `write_csv` wrote.

  Raises ConfigError where there is no such file, DataError naming the line that is none of its own,
  and for runs of more than one commit.
  """
  try:
    with open(path, newline="", encoding="utf-8") as file:
      rows = list(csv.DictReader(file))
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f"--csv {path}: {error}") from None
  results = []
  for number, row in enumerate(rows, 2):
    try:
      parsed = {name: kind(row[name]) for name, kind in NUMBERS.items()}
      parsed |= {name: json.loads(row[name]) for name in ("curve", "sources")}
      results.append(parsed | {"arm": row["arm"], "commit": row["commit"]})
    except (KeyError, TypeError, ValueError) as error:
      raise DataError(f"{path}, line {number}: no run of a sweep: {error!r}") from None
  commits = {row["commit"] for row in results}
  if len(commits) > 1:
    raise DataError(f"{path} has runs of {len(commits)} commits: they are never pooled")
  if not results:
    raise DataError(f"{path} has no runs")
  return results


def report_csv(path: pathlib.Path) -> dict[str, Any]:
  """The table, claims and fits of a CSV, as JSON values and, under "text", for people.

  Writes NAME.statistics.json, NAME.md and NAME.png beside it.
  """
  require_libraries()
  results, design = read_csv(path), _read_design(path)
  losses: dict[str, dict[int, float]] = {}
  for row in results:
    losses.setdefault(row["arm"], {})[row["seed"]] = row["loss"]
  x = {arm["name"]: arm["x"] for arm in design["arms"] if arm["x"] is not None}
  claims = [(c["question"], c["arm"], c["against"]) for c in design["claims"]]
  statistics_ = {
    "kind": design["kind"],
    "budget": design["budget"],
    "commit": results[0]["commit"],
    "runs": design["runs"],
    "arms": [_arm(arm, results) for arm in design["arms"] if arm["name"] in losses],
    "claims": statistics.judge(losses, claims),
    "fits": _fits(design, x, losses, results),
  }
  text = to_markdown(statistics_)
  replace_file(
    path.with_suffix(".statistics.json"), (json.dumps(statistics_, indent=1) + "\n").encode()
  )
  replace_file(path.with_suffix(".md"), text.encode())
  draw(path.with_suffix(".png"), statistics_, design["axis"])
  return statistics_ | {"text": text, "csv": str(path)}


def _read_design(path: pathlib.Path) -> dict[str, Any]:
  design = path.with_suffix(".design.json")
  try:
    tree = json.loads(design.read_text(encoding="utf-8"))
    missing = {"kind", "budget", "arms", "claims", "axis", "runs"} - tree.keys()
  except (OSError, ValueError, AttributeError) as error:
    raise ConfigError(
      f"--csv {path}: {design} says what its arms are, and is none: {error}"
    ) from None
  if missing:
    raise ConfigError(f"{design} lacks {', '.join(sorted(missing))}")
  return tree


def _arm(arm: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """One row of the table."""
  runs = [row for row in results if row["arm"] == arm["name"]]
  first = runs[0]
  sources = sorted(set.intersection(*(set(row["sources"]) for row in runs)))
  mean = lambda name: sum(row["sources"][name] for row in runs) / len(runs)
  return {
    "name": arm["name"],
    "about": arm["about"],
    "x": arm["x"],
    **{k: first[k] for k in ("total_parameters", "active_parameters", "flops_per_token", "steps")},
    "loss": statistics.describe([row["loss"] for row in runs]),
    "seeds": {row["seed"]: row["loss"] for row in runs},
    "sources": {name: mean(name) for name in sources},
    "seconds": statistics.describe([row["seconds"] for row in runs])["mean"],
  }


def _fits(
  design: dict[str, Any],
  x: dict[str, float],
  losses: dict[str, dict[int, float]],
  results: Sequence[dict[str, Any]],
) -> dict[str, Any]:
  """The fits that belong to a kind of sweep."""
  kind = design["kind"]
  if kind == "capacity":
    return {"slope_per_decade": statistics.slope(x, losses)}
  if kind == "allocation":
    return {"parabola": statistics.curvature(x, losses)}
  if kind in ("ladder", "controls"):
    return {"steps_to_the_twins_loss": _steps_saved(design, results)}
  return {}


def _steps_saved(
  design: dict[str, Any], results: Sequence[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
  """Shares of its steps after which a memory has its twin's last loss, by arm.

  The step lies on the line between two evaluations.
  """
  runs = {(row["arm"], row["seed"]): row for row in results}
  pairs: dict[str, int] = {}
  shares: dict[str, list[float]] = {}
  for claim in design["claims"]:
    twin, memory = claim["arm"], claim["against"]
    if not (twin.endswith(TWIN) and memory.endswith(MEMORY)):
      continue
    for arm, seed in runs:
      if arm != memory or (twin, seed) not in runs:
        continue
      pairs[memory] = pairs.get(memory, 0) + 1
      last = runs[twin, seed]["loss"]
      step = statistics.steps_saved(runs[memory, seed]["curve"], last)
      if step is not None:
        shares.setdefault(memory, []).append(step / runs[memory, seed]["steps"])
  describe = statistics.describe
  return {memory: describe(values) | {"of": pairs[memory]} for memory, values in shares.items()}


def to_markdown(found: dict[str, Any]) -> str:
  """The table of arms, the claims and the fits in Markdown."""
  done = found["runs"]
  lines = [
    f"`sweep {found['kind']}`, budget {found['budget']}, commit `{found['commit'][:12]}`, "
    f"{done['done']} of {done['of']} runs",
    "",
    "| arm | | parameters | active | FLOPs a token | validation loss | sd | seeds |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for arm in found["arms"]:
    loss = arm["loss"]
    size = f"{arm['total_parameters']:,} | {arm['active_parameters']:,}"
    lines.append(
      f"| `{arm['name']}` | {arm['about']} | {size} | {arm['flops_per_token'] / 1e6:.3f} M | "
      f"**{loss['mean']:.4f}** {_interval(loss)} | {_number(loss['sd'])} | {loss['n']} |"
    )
  lines += ["", "| question | difference (nats) | p | p, Holm | smallest seen | answer |"]
  lines += ["|---|---|---|---|---|---|"]
  for row in found["claims"]:
    if row["n"]:
      lines.append(
        f"| {row['question']} `{row['arm']}` - `{row['against']}` | {row['mean']:+.4f} "
        f"{_interval(row)} | {_p(row['p'])} | {_p(row['p_holm'])} | {_number(row['smallest'])} | "
        f"{row['verdict']} |"
      )
  return "\n".join([*lines, *_fit_lines(found["fits"]), *_source_lines(found["arms"])]) + "\n"


def _source_lines(arms: Sequence[dict[str, Any]]) -> list[str]:
  """A table of the first two arms by source of text, where there are several."""
  first = arms[:2]
  if len(first) < 2 or len(first[0]["sources"]) < 2:
    return []
  names = " | ".join(f"`{arm['name']}`" for arm in first)
  lines = ["", f"| validation loss by source | {names} | difference |", "|---|---|---|---|"]
  for source, loss in first[0]["sources"].items():
    other = first[1]["sources"].get(source)
    if other is not None:
      lines.append(f"| {source} | {loss:.4f} | {other:.4f} | {other - loss:+.4f} |")
  return lines


def _fit_lines(fits: dict[str, Any]) -> list[str]:
  lines = []
  if slope := fits.get("slope_per_decade"):
    lines += ["", f"Slope: {slope['mean']:+.4f} {_interval(slope)} nats a decade of rows."]
  if parabola := fits.get("parabola"):
    bend, bottom = parabola["curvature"], parabola["minimum"]
    place = f"{bottom['mean']:.3f} {_interval(bottom)}" if bottom else "nowhere"
    lines += [
      "",
      f"Parabola: curvature {bend['mean']:+.4f} {_interval(bend)}, lowest at rho {place}; within "
      f"the range for {parabola['inside']:.0%} of seeds.",
    ]
  for name, share in (fits.get("steps_to_the_twins_loss") or {}).items():
    after = f"{share['mean']:.0%} of its steps {_interval(share)}"
    seeds = f"{share['n']} of {share['of']} seeds"
    lines += ["", f"`{name}` has the twin's last loss after {after}, {seeds}; the interval is over"]
    lines[-1] += " seeds alone, the step lies on a line between two evaluations."
  return lines


def _interval(row: dict[str, Any]) -> str:
  return "" if row["low"] is None else f"({row['low']:.4f} to {row['high']:.4f})"


def _number(x: float | None) -> str:
  return "" if x is None else f"{x:.4f}"


def _p(p: float | None) -> str:
  if p is None:
    return ""
  return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"
