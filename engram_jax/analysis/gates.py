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


def gates_png(pieces: Sequence[str], gates: np.ndarray, path: pathlib.Path | str) -> None:
  """Writes a bar chart, one bar per token, to `path` as PNG. Needs the extra `colab`.

  Arguments and errors as `gates_html`.
  """
  gates = _checked(pieces, gates)
  # Imported here: matplotlib is an extra, and slow to import. A Figure of its own, without pyplot,
  # needs no display and leaves no global state.
  from matplotlib.figure import Figure

  figure = Figure(figsize=(max(4.0, 0.25 * len(pieces)), 3.0), layout="constrained")
  axes = figure.subplots()
  positions = np.arange(len(pieces))
  axes.bar(positions, gates, color=[_colour(gate) for gate in gates], edgecolor="grey")
  # A dollar sign would start matplotlib's mathematics; whitespace alone would not show.
  labels = [piece.replace("\n", "\\n").replace(" ", "·").replace("$", r"\$") for piece in pieces]
  axes.set_xticks(positions, labels, rotation=90, family="monospace", fontsize=8)
  axes.set(ylim=(0, 1), ylabel="gate")
  figure.savefig(path, format="png", dpi=120)


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
