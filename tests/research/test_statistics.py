"""Statistics against numbers worked out by hand, and against simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram_jax.research.statistics import (
  curvature,
  describe,
  holm,
  judge,
  paired,
  slope,
  smallest_effect,
  steps_saved,
)


def test_a_paired_difference_by_hand():
  found = paired({0: 1.1, 1: 2.2, 2: 3.3, 9: 7.0}, {0: 1.0, 1: 2.0, 2: 3.0})
  assert found["n"] == 3  # a seed that one arm lacks is left out
  assert found["mean"] == pytest.approx(0.2)
  assert found["sd"] == pytest.approx(0.1)
  half = 4.302653 * 0.1 / math.sqrt(3)  # t(0.975, 2)
  assert found["low"] == pytest.approx(0.2 - half, abs=1e-6)
  assert found["high"] == pytest.approx(0.2 + half, abs=1e-6)
  assert found["p"] == pytest.approx(0.0741799, abs=1e-6)  # t = 3.4641 with 2 degrees of freedom


def test_what_few_seeds_leave_open_is_none():
  assert describe([3.0]) == {"n": 1, "mean": 3.0, "sd": None, "low": None, "high": None}
  assert paired({0: 1.0}, {1: 2.0})["mean"] is None
  assert paired({0: 3.0}, {0: 2.0})["p"] is None
  assert paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})["p"] == 1.0


def test_holm_by_hand():
  assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
  assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_raises_p_and_keeps_its_order(values):
  adjusted = holm(values)
  assert all(p <= q + 1e-12 and q <= 1 for p, q in zip(values, adjusted, strict=True))
  order = np.argsort(values, kind="stable")
  assert (np.diff(np.array(adjusted)[order]) >= -1e-12).all()


@pytest.mark.parametrize("n", [3, 6, 10])
def test_the_smallest_effect_is_seen_four_times_in_five(n):
  from scipy import stats

  draws = np.random.default_rng(0).normal(smallest_effect(n), 1.0, (20_000, n))
  seen = (stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05).mean()
  assert seen == pytest.approx(0.8, abs=0.01)


def seeds(*values):
  return dict(enumerate(values))


def test_a_claim_needs_six_seeds_and_p_over_all_claims():
  rng = np.random.default_rng(1)
  base = {s: 4 + 0.01 * rng.normal() for s in range(6)}
  worse = {s: base[s] + 0.1 + 0.002 * rng.normal() for s in base}
  same = {s: base[s] + 0.01 * rng.normal() for s in base}
  losses = {"base": base, "worse": worse, "same": same, "few": {s: worse[s] for s in range(5)}}
  rows = judge(
    losses,
    [
      ("is worse worse?", "worse", "base"),
      ("is base worse?", "base", "worse"),
      ("is same worse?", "same", "base"),
      ("are few enough?", "few", "base"),
      ("what of none?", "none", "base"),
    ],
  )
  assert [row["verdict"] for row in rows] == ["yes", "no", "not seen", "too few seeds"] + [
    "too few seeds"
  ]
  assert rows[0]["p_holm"] >= 3 * rows[0]["p"]
  assert rows[4]["p"] is rows[4]["p_holm"] is None


def test_slopes_and_parabolas_are_found_again():
  x = {"a": 10.0, "b": 100.0, "c": 1000.0}
  losses = {name: seeds(*(5 + s - 0.3 * math.log10(v) for s in range(4))) for name, v in x.items()}
  found = slope(x, losses)
  assert found["mean"] == pytest.approx(-0.3)
  assert found["high"] - found["low"] < 1e-9
  assert slope(x, {"a": losses["a"], "b": losses["b"]}) is None

  x = {str(v): v for v in (0.1, 0.4, 0.6, 1.0)}
  losses = {name: seeds(*(4 + (v - 0.7) ** 2 + s for s in range(3))) for name, v in x.items()}
  found = curvature(x, losses)
  assert found["curvature"]["mean"] == pytest.approx(1.0)
  assert found["minimum"]["mean"] == pytest.approx(0.7)
  assert found["inside"] == 1.0
  falling = {name: seeds(*(4 - v + 0.01 * v * v for _ in range(3))) for name, v in x.items()}
  assert curvature(x, falling)["inside"] == 0.0


def test_steps_saved_between_two_evaluations():
  curve = [(100, 5.0), (200, 4.0), (300, 3.5)]
  assert steps_saved(curve, 4.5) == 150
  assert steps_saved(curve, 5.5) == 100  # no earlier than it is known
  assert steps_saved(curve, 3.5) == 300
  assert steps_saved(curve, 3.4) is None
