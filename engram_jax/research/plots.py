"""The picture of a sweep: a curve over the arms' places, or a bar an arm, every seed a dot."""

import pathlib
from typing import Any

from engram_jax.research.arms import MEMORY, SHUFFLED, TWIN

COLOUR, PALE, GREY = "#1f4e79", "#8fb4d9", "#666666"


def draw(path: pathlib.Path, found: dict[str, Any], axis: str) -> None:
  """Writes a PNG.

  Args:
    found: the statistics of the sweep; arms without a place are lines across a curve.
    axis: what the places are; empty for bars.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  arms = found["arms"]
  figure = Figure(figsize=(7.5, 4.5 if axis else 1.4 + 0.38 * len(arms)), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  if axis and found["kind"] == "ladder":
    _ladder(axes, arms)
  elif axis:
    _curve(axes, arms, found["kind"] == "capacity")
  else:
    _bars(axes, arms)
  if axis:
    axes.set_xlabel(axis)
    axes.set_ylabel("validation loss (nats a token)")
  seeds = {arm["loss"]["n"] for arm in arms}
  count = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
  axes.set_title(
    f"sweep {found['kind']}, {found['budget']}, {count} seeds, mean and 95 % interval",
    fontsize=10,
    loc="right",
  )
  axes.grid(alpha=0.25)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
  partial = path.with_name(path.name + ".partial")
  figure.savefig(partial, dpi=130, format="png", metadata={"Software": None})
  partial.replace(path)


def _half(loss: dict[str, Any]) -> float:
  return 0.0 if loss["low"] is None else loss["high"] - loss["mean"]


def _curve(axes: Any, arms: list[dict[str, Any]], is_log: bool) -> None:
  placed = sorted((arm for arm in arms if arm["x"] is not None), key=lambda arm: arm["x"])
  places = [arm["x"] for arm in placed]
  means = [arm["loss"]["mean"] for arm in placed]
  for arm in placed:
    values = list(arm["seeds"].values())
    axes.plot([arm["x"]] * len(values), values, ".", color=PALE, zorder=1)
  errors = [_half(arm["loss"]) for arm in placed]
  axes.errorbar(places, means, errors, color=COLOUR, marker="o", capsize=3, zorder=2)
  for arm in arms:
    if arm["x"] is None:
      axes.axhline(arm["loss"]["mean"], color=GREY, linestyle="--", linewidth=1)
      axes.annotate(
        arm["about"], (places[0], arm["loss"]["mean"]), fontsize=8, color=GREY, va="bottom"
      )
  if is_log:
    axes.set_xscale("log")


def _ladder(axes: Any, arms: list[dict[str, Any]]) -> None:
  for kind, colour, marker in ((MEMORY, COLOUR, "o"), (TWIN, GREY, "s")):
    line = sorted((a for a in arms if a["name"].endswith(kind)), key=lambda arm: arm["x"])
    places, means = [a["x"] for a in line], [a["loss"]["mean"] for a in line]
    errors = [_half(a["loss"]) for a in line]
    axes.errorbar(places, means, errors, color=colour, marker=marker, capsize=3, label=kind)
  axes.set_xscale("log")
  axes.legend(frameon=False)


def _bars(axes: Any, arms: list[dict[str, Any]]) -> None:
  # Arms on shuffled text lie so far off that no other difference would be seen beside them.
  shown = [arm for arm in arms if not arm["name"].startswith(SHUFFLED)] or arms
  order = sorted(shown, key=lambda arm: arm["loss"]["mean"], reverse=True)
  for y, arm in enumerate(order):
    values = list(arm["seeds"].values())
    axes.plot(values, [y] * len(values), ".", color=PALE, zorder=1)
    axes.errorbar(
      arm["loss"]["mean"], y, xerr=_half(arm["loss"]), color=COLOUR, marker="o", capsize=3, zorder=2
    )
  axes.set_yticks(
    range(len(order)), [f"{arm['name']}: {arm['about']}" for arm in order], fontsize=8
  )
  rest = "" if len(shown) == len(arms) else "; shuffled text is beyond the picture"
  axes.set_xlabel(f"validation loss (nats a token{rest})", loc="right")
