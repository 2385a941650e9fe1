"""Differences between arms, paired by seed, and what may be said of them.

Two arms with the same seed see the same windows in the same order, so their difference varies less
than either loss. For n seeds with differences d: the mean,
the interval mean +- t(0.975, n-1) sd / sqrt(n), and p of a paired t-test. Over a sweep's claims it
is adjusted by Holm's method (Scand. J. Statist. 6, 1979): of families with no true effect one in
twenty makes any claim at all. The smallest effect that would have been seen is the one that such a
test finds four times in five at this spread (power 0.8, 5 % level, before the adjustment).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

LEVEL = 0.05
POWER = 0.8
SEEDS_FOR_A_CLAIM = 6


def describe(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
  """Number, mean, deviation and 95 % interval of a sample; None for what n = 1 leaves open."""
  from scipy import stats

  x = np.asarray(values, np.float64)
  n, mean = len(x), float(x.mean())
  if n < 2:
    return {"n": n, "mean": mean, "sd": None, "low": None, "high": None}
  sd = float(x.std(ddof=1))
  half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * sd / math.sqrt(n)
  return {"n": n, "mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def paired(a: dict[int, float], b: dict[int, float]) -> dict[str, Any]:
  """The difference a - b of the losses {seed: nats} of two arms, over the seeds that both have.

  Returns `describe` of the differences with "p" (two-sided; None below two seeds) and "smallest",
  the smallest effect that would have been seen.
  """
  from scipy import stats

  seeds = sorted(set(a) & set(b))
  if not seeds:
    return {
      "n": 0,
      "mean": None,
      "sd": None,
      "low": None,
      "high": None,
      "p": None,
      "smallest": None,
    }
  differences = np.array([a[s] - b[s] for s in seeds])
  found = describe(differences)
  if len(seeds) < 2:
    return found | {"p": None, "smallest": None}
  if not found["sd"]:  # equal runs: nothing was measured, or nothing differs
    p = 1.0 if found["mean"] == 0 else 0.0
    return found | {"p": p, "smallest": 0.0}
  p = float(stats.ttest_1samp(differences, 0.0).pvalue)
  return found | {"p": p, "smallest": found["sd"] * smallest_effect(len(seeds))}


def smallest_effect(n: int) -> float:
  """The effect, in standard deviations of a difference, that n pairs show four times in five."""
  from statsmodels.stats.power import TTestPower

  if n < 2:
    return math.inf
  power = TTestPower()  # its own solver fails to find a bracket for two or three pairs
  low, high = 1e-3, 1e3
  for _ in range(100):  # bisection: the power rises with the effect
    middle = math.sqrt(low * high)
    enough = not power.power(middle, n, LEVEL) < POWER  # NaN where the power is 1 to all digits
    low, high = (low, middle) if enough else (middle, high)
  return high


def holm(values: Sequence[float]) -> list[float]:
  """p values adjusted for their number by Holm's method, in their order."""
  from statsmodels.stats.multitest import multipletests

  return [float(p) for p in multipletests(list(values), LEVEL, "holm")[1]] if len(values) else []


def judge(
  losses: dict[str, dict[int, float]], claims: Sequence[tuple[str, str, str]]
) -> list[dict[str, Any]]:
  """The verdict of the runs on each claim (question, arm, against): arm - against, above 0 is yes.

  losses: {arm: {seed: nats}}. Of each: `paired`, "p_holm" and "verdict": "yes", "no" (the opposite
  is seen), "not seen", or "too few seeds" below six. A claim without runs counts with p = 1 in the
  adjustment, so that no verdict becomes weaker when its runs come in.
  """
  rows: list[dict[str, Any]] = [
    {"question": q, "arm": a, "against": b, **paired(losses.get(a, {}), losses.get(b, {}))}
    for q, a, b in claims
  ]
  for row, p in zip(rows, holm([1.0 if r["p"] is None else r["p"] for r in rows]), strict=True):
    row["p_holm"] = None if row["p"] is None else p
    row["verdict"] = _verdict(row)
  return rows


def _verdict(row: dict[str, Any]) -> str:
  if row["n"] < SEEDS_FOR_A_CLAIM:
    return "too few seeds"
  if row["p_holm"] >= LEVEL:
    return "not seen"
  return "yes" if row["mean"] > 0 else "no"


def slope(x: dict[str, float], losses: dict[str, dict[int, float]]) -> dict[str, Any] | None:
  """The slope of the loss over log10 x, a line fitted for each seed: `describe` of the slopes.

  x: {arm: its place}. None below three arms.
  """
  fits = _fits(x, losses, 1, 3, np.log10)
  return describe([float(fit[0]) for fit in fits]) if fits else None


def curvature(x: dict[str, float], losses: dict[str, dict[int, float]]) -> dict[str, Any] | None:
  """The bend of the loss over x, by which it is a U or not: a parabola fitted for each seed.

  Returns {"curvature": `describe`, "minimum": `describe` of its lowest point, "inside": the
  fraction of seeds whose parabola opens upwards with its lowest point strictly within the range of
  x}. None below four arms.
  """
  fits = _fits(x, losses, 2, 4, np.asarray)
  if not fits:
    return None
  places = [x[arm] for arm in losses if arm in x]
  low, high = min(places), max(places)
  bottoms = [-fit[1] / (2 * fit[0]) for fit in fits if fit[0] > 0]
  inside = sum(low < bottom < high for bottom in bottoms) / len(fits)
  return {
    "curvature": describe([float(fit[0]) for fit in fits]),
    "minimum": describe([float(b) for b in bottoms]) if bottoms else None,
    "inside": inside,
  }


def _fits(x, losses, degree: int, least: int, scale) -> list[np.ndarray]:
  """Coefficients of a polynomial for each seed that all arms with a place have."""
  arms = [arm for arm in losses if arm in x and losses[arm]]
  if len(arms) < least:
    return []
  seeds = set.intersection(*(set(losses[arm]) for arm in arms))
  places = scale(np.array([x[arm] for arm in arms], np.float64))
  return [
    np.polyfit(places, np.array([losses[arm][seed] for arm in arms]), degree)
    for seed in sorted(seeds)
  ]


def steps_saved(curve: Sequence[tuple[int, float]], target: float) -> float | None:
  """The step at which a validation curve [(step, loss)] reaches `target`; None if it never does.

  Between two evaluations the loss is taken to fall along a line.
  """
  before: tuple[int, float] | None = None
  for step, loss in curve:
    if loss <= target:
      if before is None:
        return float(step)
      part = (before[1] - target) / (before[1] - loss)
      return before[0] + part * (step - before[0])
    before = (step, loss)
  return None
