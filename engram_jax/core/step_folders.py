"""The folders of checkpoints, `step_00000100/`: their names, their verification, their deletion.

A folder gets its step's name in one rename, when all of it is on the disk, and loses it in another
before it is deleted. So whenever the process dies, a folder with a step's name is complete; one
that is not has a suffix and is removed when the directory is next opened for writing.
"""

import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

from engram_jax.core import manifest
from engram_jax.core.saved_arrays import as_storage_error
from engram_jax.errors import StorageError

UNFINISHED = ".unfinished"  # being written
REMOVED = ".removed"  # being deleted
_COMMITTED = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(rf"step_\d{{8,}}({UNFINISHED}|{REMOVED})".replace(".", r"\."))


class StepFolders:
  """The step folders of one directory, for the one process that changes them."""

  def __init__(self, directory: pathlib.Path):
    self.directory = directory
    self._valid: set[int] = set()  # steps whose files were seen to match their manifest
    self._damaged: set[int] = set()

  def path(self, step: int) -> pathlib.Path:
    """The folder of a complete checkpoint."""
    return self.directory / f"step_{step:08d}"

  def unfinished(self, step: int) -> pathlib.Path:
    """The folder of a checkpoint that is being written."""
    return self.directory / f"step_{step:08d}{UNFINISHED}"

  def make_directory(self) -> None:
    """Makes the directory and removes the folders that a killed process left in it."""
    with as_storage_error(self.directory, "cannot be written"):
      self.directory.mkdir(parents=True, exist_ok=True)
      for path in self.directory.iterdir():
        if _LEFTOVER.fullmatch(path.name):
          shutil.rmtree(path)

  def steps(self) -> list[int]:
    """The steps that have a folder, rising."""
    if not self.directory.is_dir():
      return []
    names = (_COMMITTED.fullmatch(path.name) for path in self.directory.iterdir())
    return sorted(int(match[1]) for match in names if match)

  def newest_valid(self, report: Callable[[str], None]) -> int | None:
    """Returns the newest step that is undamaged, and reports each newer one in a line."""
    for step in reversed(self.steps()):
      problem = self._verify(step)
      if problem is None:
        return step
      report(f"checkpoint of step {step} cannot be used: {problem}")
    return None

  def tree(self, step: int) -> dict[str, str]:
    """Dtype and shape of each leaf by path, of a step that is verified unless it has been."""
    if step not in self._valid and (problem := self._verify(step)):
      raise StorageError(f"checkpoint of step {step} cannot be used: {problem}")
    return manifest.read(self.path(step))["tree"]

  def begin(self, step: int) -> None:
    """Makes the folder that a step is written to; ValueError if it has a valid checkpoint."""
    folder, unfinished = self.path(step), self.unfinished(step)
    if folder.exists() and self._verify(step) is None:
      raise ValueError(f"{folder} already holds a good checkpoint, which is never overwritten")
    with as_storage_error(unfinished, "cannot be written"):
      shutil.rmtree(unfinished, ignore_errors=True)  # of a save that failed
      unfinished.mkdir()

  def abandon(self, step: int) -> None:
    """Removes the folder of a save that failed: a full disk needs the room."""
    shutil.rmtree(self.unfinished(step), ignore_errors=True)

  def publish(self, step: int, tree: dict[str, str], meta: dict[str, Any], keep: int) -> None:
    """Completes a step whose arrays are on the disk, then deletes all but the `keep` newest."""
    folder, unfinished = self.path(step), self.unfinished(step)
    manifest.write(unfinished, manifest.build(unfinished, step=step, tree=tree, meta=meta))
    self._remove(step)  # a damaged checkpoint of the same step
    unfinished.rename(folder)
    manifest.sync_directory(self.directory)
    self._mark(step, valid=True)
    older = [other for other in self.steps() if other < step]
    good = [other for other in older if other not in self._damaged]
    remaining = good[max(0, len(good) - (keep - 1)) :]
    for other in older:
      if other not in remaining:
        self._remove(other)

  def _remove(self, step: int) -> None:
    folder = self.path(step)
    if folder.exists():
      # Under its own name a half-deleted checkpoint would look like a damaged one.
      removed = folder.with_name(folder.name + REMOVED)
      folder.rename(removed)
      shutil.rmtree(removed)

  def _verify(self, step: int) -> str | None:
    folder = self.path(step)
    problem = manifest.verify(folder)
    if problem is None and (written := manifest.read(folder)["step"]) != step:
      problem = f"{folder} holds step {written}: it was renamed"
    self._mark(step, valid=problem is None)
    return problem

  def _mark(self, step: int, valid: bool) -> None:
    (self._valid if valid else self._damaged).add(step)
    (self._damaged if valid else self._valid).discard(step)
