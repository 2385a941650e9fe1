"""The first steps of training give the numbers that are checked in, wherever the tables lie."""

import golden_steps
import pytest

QUICK = (("default", "device"), ("adam", "device"), ("adam_catch_up", "host"))
OTHERS = [(t, p) for t in golden_steps.TABLES for p in ("device", "host") if (t, p) not in QUICK]


@pytest.mark.parametrize(
  ("table", "placement"),
  [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)],
)
def test_first_steps(table, placement):
  found = golden_steps.run(table, placement)
  golden_steps.assert_close(found, golden_steps.golden(table, placement))
