"""Tables in docs/experiments are what their CSV gives, and the page quotes them as they are."""

import json
import shutil

import chex
import pytest
from conftest import ROOT

from engram_jax.research.report import report_csv

FOLDER = ROOT / "docs" / "experiments"
PUBLISHED = sorted(path.stem for path in FOLDER.glob("*.csv"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_csv_gives_the_published_numbers(name, tmp_path):
  for suffix in (".csv", ".design.json"):
    shutil.copy(FOLDER / f"{name}{suffix}", tmp_path)
  found = report_csv(tmp_path / f"{name}.csv")
  published = json.loads((FOLDER / f"{name}.statistics.json").read_text())
  again = json.loads((tmp_path / f"{name}.statistics.json").read_text())
  chex.assert_trees_all_close(numbers(again), numbers(published), rtol=1e-9)
  assert found["text"] == (FOLDER / f"{name}.md").read_text()


def numbers(statistics):
  """Names and numbers of a tree, without the words."""
  keep = lambda x: isinstance(x, int | float)
  if isinstance(statistics, dict):
    return {k: numbers(v) for k, v in statistics.items() if keep(v) or isinstance(v, dict | list)}
  return [numbers(v) for v in statistics] if isinstance(statistics, list) else statistics


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_page_quotes_the_table_and_shows_the_plot(name):
  page = (ROOT / "docs" / "experiments.md").read_text()
  assert (FOLDER / f"{name}.md").read_text().strip() in page
  assert f"experiments/{name}.png" in page
