"""The first steps of training on eight devices give the numbers that are checked in."""

import golden_steps
import pytest

OTHERS = ("adam", "adam_catch_up", "adagrad")  # Adam's steps on eight devices are in test_step.py
SLOW = [pytest.param(t, marks=pytest.mark.slow) for t in OTHERS]


@pytest.mark.parametrize("table", ["sinkhorn", *SLOW])
def test_first_steps(table):
  found = golden_steps.run(table, "eight")
  golden_steps.assert_close(found, golden_steps.golden(table, "eight"))
