"""The first steps of training on eight devices give the numbers that are checked in."""

import golden_steps
import pytest

OTHERS = ("adam_catch_up", "adagrad")
SLOW = [pytest.param(t, marks=pytest.mark.slow) for t in OTHERS]


@pytest.mark.parametrize("table", ["adam", "sinkhorn", *SLOW])
def test_first_steps(table):
  found = golden_steps.run(table, "eight")
  golden_steps.assert_close(found, golden_steps.golden(table, "eight"))
