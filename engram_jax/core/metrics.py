"""Metrics of a run: a file with one JSON object a line, and TensorBoard events beside it."""

import json
import math
import os
import pathlib
from typing import Any

from engram_jax.core.distributed import on_main
from engram_jax.core.manifest import replace_file
from engram_jax.errors import StorageError

NAME = "metrics.jsonl"


class MetricsWriter:
  """Appends to `directory/metrics.jsonl` and, if wanted, to event files in `directory/tensorboard`.

  A line is `{"step": 100, "loss": 4.2, ...}`. JSON has no NaN or infinity: such a value is written
  as null and named, `{"step": 100, "loss": null, "nonfinite": {"loss": "nan"}}`.

  With several processes all call its methods and process 0 alone writes.
  """

  def __init__(self, directory: str | os.PathLike, tensorboard: bool, resume_step: int | None):
    """Opens the files and removes the lines that a resumed run is about to write again.

    Args:
      directory: folder of the run, made if it is not there.
      tensorboard: write event files too (imports tensorboardX).
      resume_step: the step of the restored checkpoint: later lines are removed, as is a last line
        that was cut off when the process was killed. None removes every line.

    Raises StorageError if the files cannot be read or written.
    """
    self._path = pathlib.Path(directory) / NAME
    self._file = self._board = None
    on_main(lambda: self._open(tensorboard, resume_step))

  def _open(self, tensorboard: bool, resume_step: int | None) -> None:
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      _remove_after(self._path, resume_step)
      self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
    except OSError as error:
      raise StorageError(f"{self._path} cannot be written: {error}") from error
    self._board = _open_board(self._path.parent, resume_step) if tensorboard else None

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def write(self, step: int, values: dict[str, Any]) -> None:
    """Writes one line and flushes the file.

    Args:
      step: the step the values belong to.
      values: numbers by name: Python's, or NumPy or JAX arrays of one element.

    Raises TypeError for anything else, StorageError if the file cannot be written.
    """
    numbers = {name: _number(name, value) for name, value in values.items()}
    if self._file is None:
      return
    finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
    line: dict[str, Any] = {"step": int(step)} | {name: finite.get(name) for name in numbers}
    if len(finite) < len(numbers):
      line["nonfinite"] = {name: str(numbers[name]) for name in numbers if name not in finite}
    try:
      self._file.write(json.dumps(line, allow_nan=False) + "\n")
      self._file.flush()
    except OSError as error:
      raise StorageError(f"{self._path} cannot be written: {error}") from error
    if self._board is not None:
      for name, value in finite.items():
        self._board.add_scalar(name, value, step)

  def text(self, step: int, name: str, text: str) -> None:
    """Shows a text, such as a sample, in TensorBoard; `metrics.jsonl` holds numbers only."""
    if self._board is not None:
      self._board.add_text(name, text, step)

  def close(self) -> None:
    """Closes the files."""
    if self._file is not None:
      self._file.close()
    if self._board is not None:
      self._board.close()


def _open_board(directory: pathlib.Path, resume_step: int | None) -> Any:
  from tensorboardX import SummaryWriter  # half a second, and only if wanted

  first = 0 if resume_step is None else resume_step + 1
  return SummaryWriter(str(directory / "tensorboard"), purge_step=first, flush_secs=10)


def _number(name: str, value: Any) -> bool | int | float:
  number = value.item() if hasattr(value, "item") else value
  if not isinstance(number, bool | int | float):
    raise TypeError(f"{name}={value!r} is not a number")
  return number


def _remove_after(path: pathlib.Path, step: int | None) -> None:
  """Rewrites the file with only the complete lines of steps up to `step`."""
  if not path.exists():
    return
  # A line without its newline was being written when the process died.
  lines = path.read_bytes().split(b"\n")[:-1]
  kept = []
  for number, line in enumerate(lines, 1):
    if step is not None and _step_of(path, number, line) <= step:
      kept.append(line + b"\n")
  replace_file(path, b"".join(kept))


def _step_of(path: pathlib.Path, number: int, line: bytes) -> int:
  try:
    return json.loads(line)["step"]
  except (ValueError, TypeError, KeyError):
    raise StorageError(
      f"{path} line {number} is damaged: remove it, or move the file away, and run again"
    ) from None
