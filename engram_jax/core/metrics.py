"""Metrics of a run: a file with one JSON object a line, and TensorBoard events beside it.

Measuring never ends a run: what cannot be written is counted and said, and training goes on.
"""

import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from engram_jax.core.appended_file import AppendedFile
from engram_jax.core.distributed import on_main
from engram_jax.core.event_file import EventFile
from engram_jax.core.manifest import PARTIAL, sync_directory
from engram_jax.errors import StorageError

NAME = "metrics.jsonl"
DAMAGED = "metrics.damaged.jsonl"  # lines that were no metrics when a run was resumed
LOST = "metrics_lines_lost"


class MetricsWriter:
  """Appends to `directory/metrics.jsonl` and, if wanted, to event files in `directory/tensorboard`.

  A line is `{"step": 100, "loss": 4.2, ...}`. JSON has no NaN or infinity: such a value is written
  as null and named, `{"step": 100, "loss": null, "nonfinite": {"loss": "nan"}}`. A line that cannot
  be written, as on a full disk, is left out whole; `report` is told, and the lines after it hold
  how many were lost so far as `metrics_lines_lost`.

  With several processes all call its methods and process 0 alone writes.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    tensorboard: bool,
    resume_step: int | None,
    *,
    expected: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = lambda _: None,
  ):
    """Opens the files and removes the lines that a resumed run is about to write again.

    Args:
      directory: folder of the run, made if it is not there.
      tensorboard: write event files too.
      resume_step: the step of the restored checkpoint: later lines are removed, as is a last line
        that was cut off when the process was killed. None removes every line. A line that is no
        metrics at all moves to metrics.damaged.jsonl.
      expected: the `summary` of the lines up to there, when they were written.
      report: is told in a line what was found damaged or changed, and what could not be written.

    Raises StorageError if the files cannot be read or written.
    """
    self._path = pathlib.Path(directory) / NAME
    self._report = report
    self._file: AppendedFile | None = None
    self._board: EventFile | None = None
    self._hasher, self._lost = hashlib.sha256(), 0
    on_main(lambda: self._open(tensorboard, resume_step, expected))

  def _open(
    self, tensorboard: bool, resume_step: int | None, expected: Mapping[str, Any] | None
  ) -> None:
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self._keep_until(-1 if resume_step is None else resume_step)
      self._file = AppendedFile(self._path)
    except OSError as error:
      raise StorageError(f"{self._path} cannot be written: {error}") from error
    if expected and self.summary() != expected:
      self._report(
        f"{self._path} is not as it was when step {resume_step} was saved: "
        f"{expected.get('bytes')} bytes with SHA-256 {expected.get('sha256')} then, "
        f"{self._file.size} bytes with {self._hasher.hexdigest()} now; it is kept as it is"
      )
    if tensorboard:
      first = 0 if resume_step is None else resume_step + 1
      self._board = EventFile(self._path.parent / "tensorboard", first)

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def summary(self) -> dict[str, Any]:
    """The number of bytes written so far and their SHA-256, as JSON values; process 0's alone."""
    size = self._file.size if self._file is not None else 0
    return {"bytes": size, "sha256": self._hasher.hexdigest()}

  def write(self, step: int, values: dict[str, Any]) -> None:
    """Writes one line, which is in the file when this returns, or counted as lost.

    Args:
      step: the step the values belong to.
      values: numbers by name: Python's, or NumPy or JAX arrays of one element.

    Raises TypeError for anything else.
    """
    numbers = {name: _number(name, value) for name, value in values.items()}
    if self._file is None:
      return
    if self._lost:
      numbers[LOST] = self._lost
    finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
    line: dict[str, Any] = {"step": int(step)} | {name: finite.get(name) for name in numbers}
    if len(finite) < len(numbers):
      line["nonfinite"] = {name: str(numbers[name]) for name in numbers if name not in finite}
    self._append(self._file, json.dumps(line, allow_nan=False).encode() + b"\n")
    if self._board is not None:
      self._on_board(lambda board: board.scalars(step, finite))

  def text(self, step: int, name: str, text: str) -> None:
    """Shows a text, such as a sample, in TensorBoard; `metrics.jsonl` holds numbers only."""
    if self._board is not None:
      self._on_board(lambda board: board.text(step, name, text))

  def close(self) -> None:
    """Closes the files, and says how many lines are missing."""
    if self._file is not None:
      self._file.close()
      self._file = None
      if self._lost:
        self._report(f"{self._path} lacks {self._lost} lines, which could not be written")
    if self._board is not None:
      self._board.close()

  def _append(self, file: AppendedFile, line: bytes) -> None:
    was_failing = file.is_failing
    try:
      file.append(line)
    except OSError as error:
      self._lost += 1
      if not was_failing:
        reason = error.strerror or error
        self._report(f"{self._path} cannot be written: {reason}; training goes on without the line")
      return
    if was_failing:
      self._report(f"{self._path} is written again; {self._lost} lines are lost")
    self._hasher.update(line)

  def _on_board(self, action: Callable[[EventFile], None]) -> None:
    assert self._board is not None
    was_failing = self._board.is_failing
    try:
      action(self._board)
    except OSError as error:
      if not was_failing:
        self._report(f"{self._board.folder} cannot be written: {error.strerror or error}")

  def _keep_until(self, step: int) -> None:
    """Keeps the complete lines of steps up to `step`, and moves away those that are no metrics."""
    if not self._path.exists():
      return
    partial = self._path.with_name(self._path.name + PARTIAL)
    damaged: list[int] = []
    with open(self._path, "rb") as old, open(partial, "wb") as new:
      for number, line in enumerate(old, 1):
        if not line.endswith(b"\n"):
          break  # it was being written when the process died
        found = step_of(line)
        if found is None:
          damaged.append(number)
          with open(self._path.with_name(DAMAGED), "ab") as file:
            file.write(line)
        elif found <= step:
          new.write(line)
          self._hasher.update(line)
      new.flush()
      os.fsync(new.fileno())
    os.replace(partial, self._path)
    sync_directory(self._path.parent)
    if damaged:
      shown = ", ".join(map(str, damaged[:5])) + (" and more" if len(damaged) > 5 else "")
      self._report(f"{self._path}: line {shown} is no metrics, and was moved to {DAMAGED}")


def last_step(directory: pathlib.Path) -> int:
  """The highest step that metrics.jsonl of a run holds; 0 without any."""
  try:
    with open(directory / NAME, "rb") as file:
      return max((step_of(line) or 0 for line in file), default=0)
  except FileNotFoundError:
    return 0
  except OSError as error:
    raise StorageError(f"{directory / NAME} cannot be read: {error.strerror}") from None


def step_of(line: bytes) -> int | None:
  """The step of a line of metrics; None for anything else."""
  try:
    content = json.loads(line)
  except (ValueError, RecursionError):
    return None
  step = content.get("step") if isinstance(content, dict) else None
  return step if type(step) is int and step >= 0 else None


def _number(name: str, value: Any) -> bool | int | float:
  number = value.item() if hasattr(value, "item") else value
  if not isinstance(number, bool | int | float):
    raise TypeError(f"{name}={value!r} is not a number")
  return number
