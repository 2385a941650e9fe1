"""Engram's gates over text: each token coloured by how far its gate was open.

A gate is the scalar in (0, 1) that scales what a position reads from the memory. A model's or an
Engram's forward pass returns it as `probes["gate"]`, [B, T, G], one for each residual branch. These
functions draw one sequence, whose gates are means over G or those of one branch.
"""

import html
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

OPEN_RGB = (204, 51, 17)
"""Colour of a gate of 1 on white; a gate of 0 leaves the page white."""


def gates_html(tokens: Sequence[str], gates_T: np.ndarray) -> str:
  """HTML of a text: one <span> per token, coloured by its gate, and a legend below.

  Args:
    tokens: T decoded tokens; they are escaped.
    gates_T: floats [T] in [0, 1].

  Raises:
    ValueError: lengths differ, or a gate is not a number in [0, 1].
  """
  gates_T = _check_gates(tokens, gates_T)
  spans = "".join(
    f'<span title="{gate:.3f}" style="background:{_colour(gate)}">{html.escape(token)}</span>'
    for token, gate in zip(tokens, gates_T, strict=True)
  )
  ramp = f"linear-gradient(to right, {_colour(0.0)}, {_colour(1.0)})"
  legend = (
    f'<div style="width:12em;padding:0 4px;display:flex;justify-content:space-between;'
    f'background:{ramp}"><b>gate 0</b><b>1</b></div>'
  )
  style = "font-family:monospace;white-space:pre-wrap;color:black;background:white"
  return f'<div style="{style}"><div>{spans}</div>{legend}</div>'


def gates_png(
  tokens: Sequence[str], gates_T: np.ndarray, path: pathlib.Path | str, width: int = 72
) -> None:
  """Writes a PNG of a text: coloured tokens in lines of `width` characters, and a legend below.

  Needs the extra `colab`. Arguments and errors are as in `gates_html`.
  """
  gates_T = _check_gates(tokens, gates_T)
  # Imported here: matplotlib is an extra, and slow to import. A Figure made without pyplot needs no
  # display and leaves no global state.
  from matplotlib.figure import Figure
  from matplotlib.patches import Rectangle

  # A dollar sign would start matplotlib's mathematics; whitespace alone would not show.
  labels = [token.replace("\n", "↵").replace("$", r"\$") for token in tokens]
  boxes = _boxes(list(map(len, tokens)), width)
  legend_line = boxes[-1][0] + 2
  figure = Figure(figsize=(0.115 * width, 0.32 * (legend_line + 1)), dpi=120)
  axes = figure.add_axes((0.01, 0.02, 0.98, 0.96))
  axes.set(xlim=(0, width), ylim=(legend_line + 1, 0))
  axes.axis("off")
  font: dict[str, Any] = {"family": "monospace", "fontsize": 11, "va": "center"}

  def draw(line: int, column: int, size: int, label: str, gate: float) -> None:
    axes.add_patch(Rectangle((column, line + 0.08), size, 0.84, color=_colour(gate), linewidth=0))
    axes.text(column, line + 0.5, label, **font)

  for box, label, gate in zip(boxes, labels, gates_T, strict=True):
    draw(*box, label, gate)
  for i in range(11):
    draw(legend_line, 11 + i, 1, "", i / 10)
  axes.text(10.5, legend_line + 0.5, "gate 0", ha="right", **font)
  axes.text(22.5, legend_line + 0.5, "1", **font)
  figure.savefig(path, format="png")


def _boxes(sizes: Sequence[int], width: int) -> list[tuple[int, int, int]]:
  """(line, column, size) of tokens of `sizes` characters, broken into lines of `width`."""
  boxes, line, column = [], 0, 0
  for size in sizes:
    if column and column + size > width:
      line, column = line + 1, 0
    boxes.append((line, column, size))
    column += size
  return boxes


def _check_gates(tokens: Sequence[str], gates_T: np.ndarray) -> np.ndarray:
  gates_T = np.asarray(gates_T, np.float32)
  if gates_T.shape != (len(tokens),):
    raise ValueError(
      f"gates have shape {gates_T.shape}; {len(tokens)} pieces need ({len(tokens)},)"
    )
  if not np.all((gates_T >= 0) & (gates_T <= 1)):
    raise ValueError("gates must be numbers from 0 to 1")
  return gates_T


def _colour(gate: float) -> str:
  red, green, blue = (round(255 + (full - 255) * float(gate)) for full in OPEN_RGB)
  return f"#{red:02x}{green:02x}{blue:02x}"
