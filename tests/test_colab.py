"""The notebook is what its source converts to, and its code compiles."""

import json
import pathlib

import pytest

COLAB = pathlib.Path(__file__).parent.parent / "colab"
jupytext = pytest.importorskip("jupytext")


def test_notebook_holds_the_cells_of_its_source():
  source = jupytext.read(COLAB / "tour.py").cells
  notebook = json.loads((COLAB / "tour.ipynb").read_text())["cells"]
  cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook]
  assert cells == [(cell.cell_type, cell.source) for cell in source]
  assert not any(cell.get("outputs") for cell in notebook)


def test_every_code_cell_compiles():
  cells = [c for c in jupytext.read(COLAB / "tour.py").cells if c.cell_type == "code"]
  assert cells
  for i, cell in enumerate(cells):
    compile(cell.source, f"cell {i}", "exec")
