"""The folders of checkpoints, `step_00000100/`: their names, their verification, their deletion.

A folder gets its step's name in one rename, when all of it is on the disk, and loses it in another
before it is deleted. So whenever the process dies, a folder with a step's name is complete; one
that is not has a suffix and is removed when the directory is next prepared for writing.

A file beside the directory, `checkpoints.json`, says which step was completed last. So a directory
that was emptied, or that lies on a disk which is not there today, is not taken for a new one.
"""

import contextlib
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from engram_jax.config.bounded import PointerError, read_bounded
from engram_jax.core import manifest
from engram_jax.core.manifest import ManifestError, Problem
from engram_jax.core.saved_arrays import as_storage_error
from engram_jax.errors import NoUsableCheckpoint, StorageError

UNFINISHED = ".unfinished"  # being written
REMOVED = ".removed"  # being deleted
FOREIGN = ".not-a-checkpoint"  # a file that had a step's name
UNSOUND = "unsound"  # in meta: true where the step lies in a streak of steps that were not finite
_COMMITTED = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(rf"step_\d{{8,}}({UNFINISHED}|{REMOVED})".replace(".", r"\."))


class StepFolders:
  """The step folders of one directory, for the one process that changes them."""

  def __init__(self, directory: pathlib.Path, verify: bool = True):
    """Touches nothing.

    verify: read every file and compare its digest; False looks at names and sizes alone.
    """
    self.directory = directory
    self.newest_path = directory.with_name(f"{directory.name}.json")
    self._verify_content = verify
    self._identity: tuple[int, int] | None = None  # of the folder that is being written
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
      self._delete_leftovers()

  def steps(self) -> list[int]:
    """The steps that have a folder, rising; StorageError where the directory cannot be read."""
    with as_storage_error(self.directory, "cannot be read"):
      if not self.directory.is_dir():
        return []
      names = (_COMMITTED.fullmatch(p.name) for p in self.directory.iterdir() if p.is_dir())
      return sorted(int(match[1]) for match in names if match)

  def newest_saved(self) -> int | None:
    """The step that was completed last, whether it is there or not; None if that is not known."""
    try:
      content = json.loads(read_bounded(self.newest_path, 1 << 10))
      step = content["newest"]
    except FileNotFoundError:
      return None
    except OSError as error:
      raise StorageError(f"{self.newest_path} cannot be read: {error.strerror}") from None
    except PointerError as error:
      raise StorageError(f"{self.newest_path} {error}") from None
    except (ValueError, TypeError, KeyError):
      step = None
    if type(step) is not int or step < 0:
      raise StorageError(f"{self.newest_path} is damaged; delete it if {self.directory} is whole")
    return step

  def newest_valid(self, report: Callable[[str], None], writing: bool = False) -> int | None:
    """Returns the newest step that can be used, and reports each newer one that cannot in a line.

    Returns None where no step was ever completed.

    Args:
      writing: also raise where the newest step cannot be read, as without permission: going on from
        an older one would in the end replace what may well be sound.

    Raises NoUsableCheckpoint, which names the steps, where all that were saved are damaged, missing
    or cannot be read.
    """
    saved, problems = self.newest_saved(), []
    try:
      steps = self.steps()
    except StorageError as error:
      known = "" if saved is None else f", which held step {saved}"
      raise NoUsableCheckpoint(f"{error}{known}") from None
    if saved is not None and saved not in steps and (not steps or steps[-1] < saved):
      missing = self.path(saved) if self.directory.is_dir() else self.directory
      problems.append((saved, Problem("missing", f"{missing} is missing")))
    for step in reversed(steps):
      problem = self._examine(step)
      if problem is None:
        for bad, (_, message) in problems:
          report(f"checkpoint of step {bad} cannot be used: {message}")
        return step
      problems.append((step, problem))
      if writing and problem.kind == "unreadable":
        break
    if not problems:
      return None
    said = "; ".join(f"step {step}: {problem.message}" for step, problem in problems[:3])
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    kinds = " or ".join(dict.fromkeys(problem.kind for _, problem in problems))
    raise NoUsableCheckpoint(
      f"{self.directory} holds no checkpoint that can be used ({kinds}): {said}{more}"
    )

  def tree(self, step: int) -> dict[str, str]:
    """Dtype and shape of each leaf by path, of a step that is verified unless it has been."""
    if step not in self._valid and (problem := self._examine(step)):
      raise StorageError(f"checkpoint of step {step} cannot be used: {problem.message}")
    return manifest.read(self.path(step))["tree"]

  def begin(self, step: int) -> None:
    """Makes the folder that a step is written to; ValueError if it has a valid checkpoint."""
    folder, unfinished = self.path(step), self.unfinished(step)
    if folder.is_dir() and self._examine(step) is None:
      raise ValueError(f"{folder} already holds a good checkpoint, which is never overwritten")
    with as_storage_error(unfinished, "cannot be written"):
      self._delete_leftovers()  # of a save that failed: its threads may have gone on for a while
      unfinished.mkdir()
      self._identity = _identity(unfinished)

  def abandon(self, step: int) -> None:
    """Removes the folder of a save that failed, if it can: a full disk needs the room."""
    unfinished = self.unfinished(step)
    was_replaced = _identity(unfinished) not in (None, self._identity)
    shutil.rmtree(unfinished, ignore_errors=True)
    if was_replaced:  # a run that was moved away: what was written since made the folders anew
      with contextlib.suppress(OSError):  # they hold more than that
        self.directory.rmdir()
        self.directory.parent.rmdir()

  def publish(
    self,
    step: int,
    tree: dict[str, str],
    meta: dict[str, Any],
    keep: int,
    expected: Mapping[str, int],
  ) -> int:
    """Completes a step whose arrays are on the disk, then deletes all but the `keep` newest.

    The newest one that is not `UNSOUND` stays beside those.

    expected: sizes of files by path in the folder, which must be there.

    Returns the bytes of its files. Raises StorageError where one of them is missing.
    """
    folder, unfinished = self.path(step), self.unfinished(step)
    if _identity(unfinished) != self._identity:
      raise StorageError(f"{unfinished} was moved or removed while it was written")
    content = manifest.build(unfinished, step=step, tree=tree, meta=meta)
    sizes = {name: entry["bytes"] for name, entry in content["files"].items()}
    for name, size in sorted(expected.items()):
      if sizes.get(name) != size:
        found = "is missing" if name not in sizes else f"has {sizes[name]} bytes"
        raise StorageError(f"{unfinished / name} {found}, though {size} bytes were written")
    manifest.write(unfinished, content)
    self._make_way(step)
    unfinished.rename(folder)
    manifest.sync_directory(self.directory)
    self._mark(step, valid=True)
    manifest.replace_file(self.newest_path, json.dumps({"newest": step}).encode())
    self._delete_older(step, keep, meta.get(UNSOUND, False))
    return sum(sizes.values())

  def _delete_leftovers(self) -> None:
    for path in self.directory.iterdir():
      if _LEFTOVER.fullmatch(path.name):
        _delete(path)

  def _delete_older(self, step: int, keep: int, is_unsound: bool) -> None:
    older = [other for other in self.steps() if other < step]
    good = [other for other in older if other not in self._damaged]
    remaining = set(good[max(0, len(good) - (keep - 1)) :])
    if is_unsound:
      remaining |= set([other for other in good if self._is_sound(other)][-1:])
    for other in older:
      if other not in remaining:
        self._remove(other)

  def _is_sound(self, step: int) -> bool:
    try:
      return not manifest.read(self.path(step))["meta"].get(UNSOUND, False)
    except ManifestError:
      return False

  def _make_way(self, step: int) -> None:
    """Removes a damaged checkpoint of the step, and renames a file that has its name."""
    folder = self.path(step)
    if folder.is_dir():
      self._remove(step)
    elif folder.exists() or folder.is_symlink():
      folder.rename(folder.with_name(folder.name + FOREIGN))

  def _remove(self, step: int) -> None:
    folder = self.path(step)
    # Under its own name a half-deleted checkpoint would look like a damaged one.
    removed = folder.with_name(folder.name + REMOVED)
    folder.rename(removed)
    _delete(removed)

  def _examine(self, step: int) -> Problem | None:
    folder = self.path(step)
    problem = manifest.examine(folder, content=self._verify_content)
    if problem is None and (written := manifest.read(folder)["step"]) != step:
      problem = Problem("damaged", f"{folder} holds step {written}: it was renamed")
    self._mark(step, valid=problem is None)
    return problem

  def _mark(self, step: int, valid: bool) -> None:
    (self._valid if valid else self._damaged).add(step)
    (self._damaged if valid else self._valid).discard(step)


def _identity(path: pathlib.Path) -> tuple[int, int] | None:
  """The number of a folder that it has under any name; None where there is none."""
  try:
    status = path.stat()
  except OSError:
    return None
  return status.st_dev, status.st_ino


def _delete(path: pathlib.Path) -> None:
  """Removes a folder, or a file that has taken its name."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink()
