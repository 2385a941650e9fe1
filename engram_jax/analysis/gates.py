"""Engram's gates over text: each token coloured by how far its gate was open.

A gate is the scalar in (0, 1) that scales what a position reads from the memory; it comes from
`probes["gate"]` of a model's or an Engram's forward pass, shaped [B, T, G] with one gate for each
residual branch. These functions draw one sequence, after a mean over G or the choice of one branch.
"""

import html
import pathlib
from collections.abc import Sequence

import numpy as np

OPEN_RGB = (204, 51, 17)
"""Colour of a gate of 1 on white; a gate of 0 leaves the page white."""


def gates_html(pieces: Sequence[str], gates: np.ndarray) -> str:
  """One <span> per token, its background deeper the wider its gate; a legend below.

  Args:
    pieces: T decoded tokens; their text is escaped.
    gates: [T] floats in [0, 1].

  Raises:
    ValueError: lengths differ, or a gate is not a number in [0, 1].
  """
  gates = _checked(pieces, gates)
  spans = "".join(
    f'<span title="{gate:.3f}" style="background:{_colour(gate)}">{html.escape(piece)}</span>'
    for piece, gate in zip(pieces, gates, strict=True)
  )
  ramp = f"linear-gradient(to right, {_colour(0.0)}, {_colour(1.0)})"
  legend = (
    f'<div style="width:12em;padding:0 4px;display:flex;justify-content:space-between;'
    f'background:{ramp}"><b>gate 0</b><b>1</b></div>'
  )
  style = "font-family:monospace;white-space:pre-wrap;color:black;background:white"
  return f'<div style="{style}"><div>{spans}</div>{legend}</div>'


def gates_png(
  pieces: Sequence[str], gates: np.ndarray, path: pathlib.Path | str, width: int = 72
) -> None:
  """Writes the same as a picture: the text in lines of `width` characters, and a legend, as PNG.

  Needs the extra `colab`. Arguments and errors as `gates_html`.
  """
  gates = _checked(pieces, gates)
  # Imported here: matplotlib is an extra, and slow to import. A Figure of its own, without pyplot,
  # needs no display and leaves no global state.
  from matplotlib.figure import Figure
  from matplotlib.patches import Rectangle

  # A dollar sign would start matplotlib's mathematics; whitespace alone would not show.
  shown = [piece.replace("\n", "↵").replace("$", r"\$") for piece in pieces]
  lines = _lines([len(piece.replace("\n", "↵")) for piece in pieces], width)
  figure = Figure(figsize=(0.115 * width, 0.32 * (lines[-1][0] + 3)), dpi=120)
  axes = figure.add_axes((0.01, 0.02, 0.98, 0.96))
  axes.set(xlim=(0, width), ylim=(lines[-1][0] + 3, 0))
  axes.axis("off")
  text = {"family": "monospace", "fontsize": 11, "va": "center"}
  cells = [(*cell, *what) for cell, what in zip(lines, zip(shown, gates, strict=True), strict=True)]
  end = lines[-1][0] + 2
  legend = [(end, 11 + i, 1, "", i / 10) for i in range(11)]
  for line, column, size, piece, gate in (*cells, *legend):
    box = Rectangle((column, line + 0.08), size, 0.84, color=_colour(gate), linewidth=0)
    axes.add_patch(box)
    axes.text(column, line + 0.5, piece, **text)
  axes.text(10.5, end + 0.5, "gate 0", ha="right", **text)
  axes.text(22.5, end + 0.5, "1", **text)
  figure.savefig(path, format="png")


def _lines(sizes: Sequence[int], width: int) -> list[tuple[int, int, int]]:
  """(line, column, size) of pieces of so many characters, broken into lines of `width`."""
  cells, line, column = [], 0, 0
  for size in sizes:
    if column and column + size > width:
      line, column = line + 1, 0
    cells.append((line, column, size))
    column += size
  return cells


def _checked(pieces: Sequence[str], gates: np.ndarray) -> np.ndarray:
  gates = np.asarray(gates, np.float32)
  if gates.shape != (len(pieces),):
    raise ValueError(f"gates have shape {gates.shape}; {len(pieces)} pieces need ({len(pieces)},)")
  if not np.all((gates >= 0) & (gates <= 1)):
    raise ValueError("gates must be numbers from 0 to 1")
  return gates


def _colour(gate: float) -> str:
  red, green, blue = (round(255 + (full - 255) * float(gate)) for full in OPEN_RGB)
  return f"#{red:02x}{green:02x}{blue:02x}"
