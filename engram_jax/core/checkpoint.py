"""Checkpoints: Orbax writes the arrays, a manifest says which steps can be trusted.

    with Checkpoints(directory, keep=2) as checkpoints:
      step = checkpoints.newest_valid(report=print)
      if step is not None:
        state = checkpoints.restore(step, like=state)
      ...
      checkpoints.save(step, state, meta)

A checkpoint is a folder `step_00000100/` holding `state/` (Orbax; one flat dict from leaf path to
array) and `manifest.json` (engram_jax.core.manifest). It is written under another name, in this
order: arrays, Orbax's commit, the manifest, and last the rename to its own name; only then are
older ones deleted, and they are renamed first. So whenever the process dies, a folder with a step's
name is complete, and what is not is told by its name and removed when the folder is next opened for
writing.

With several processes (engram_jax.core.distributed) the folder is one that all of them see, and all
call every method, in the same order and from their main threads. Each writes and reads the shards
on its own devices, in chunks, so none ever holds a whole table; process 0 alone makes folders and
manifests, verifies and deletes; what goes wrong in one is raised in all. Two jobs never write to
one folder at once: the caller sees to it.
"""

import concurrent.futures
import contextlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from engram_jax.core import manifest
from engram_jax.core.distributed import agree, is_main, on_main, several
from engram_jax.core.saved_arrays import (
  CHUNK_BYTES,
  PyTree,
  SavedArray,
  as_storage_error,
  leaves_by_path,
  own_copies,
  placed,
  require_array,
  require_same_tree,
  restore_args,
  signature,
)
from engram_jax.errors import StorageError

STATE = "state"
UNFINISHED = ".unfinished"  # being written
REMOVED = ".removed"  # being deleted
_COMMITTED = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(rf"step_\d{{8,}}({UNFINISHED}|{REMOVED})".replace(".", r"\."))
_PATIENCE_SECONDS = 600  # for the other processes' writes
_LIBRARIES = ("engram_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Checkpoints:
  """The checkpoints of one run: asynchronous saves, verified restores, the last few kept."""

  def __init__(self, directory: str | os.PathLike, keep: int | None):
    """Opens `directory`; when writing, makes it and removes what a killed process left behind.

    Args:
      directory: holds one folder per step.
      keep: how many of the newest checkpoints stay; None opens the folder for reading only.

    Raises:
      ValueError: keep is below 1.
      StorageError: the folder cannot be written, or one of the processes does not see it.
    """
    if keep is not None and keep < 1:
      raise ValueError(f"keep={keep} must be at least 1: the newest checkpoint always stays")
    self.directory = pathlib.Path(directory).absolute()
    self._keep = keep
    self._sound: set[int] = set()  # steps whose files were seen to match their manifest
    self._damaged: set[int] = set()
    if keep is not None:
      on_main(self._make_directory)
      if problem := agree(None if self.directory.is_dir() else f"does not see {self.directory}"):
        raise StorageError(f"{problem}: run.root must be a folder that all processes share")
    # Float weights do not compress; trying costs more than all the rest of a save.
    self._orbax = ocp.AsyncCheckpointer(
      ocp.PyTreeCheckpointHandler(use_compression=False),
      async_options=ocp.options.AsyncOptions(timeout_secs=_PATIENCE_SECONDS),
    )
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._pending: concurrent.futures.Future[None] | None = None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    if kind is not None and several():
      self._stop()  # the others may be elsewhere: nobody to agree with
    else:
      self.close()

  def save(
    self,
    step: int,
    state: PyTree,
    meta: dict[str, Any],
    files: Callable[[pathlib.Path], None] | None = None,
  ) -> None:
    """Starts writing a checkpoint; the arrays may be donated or overwritten once this returns.

    Waits for the save before it, if that is still running.

    Args:
      step: the number of steps behind this state.
      state: a tree whose leaves are jax arrays with a definite dtype, or NumPy arrays.
      meta: JSON values to be handed back by `meta`.
      files: writes what is no array into the folder it is given, before this returns; the manifest
        covers it, and `folder` says where it is then.

    Raises:
      ValueError: a leaf is not such an array, meta is not JSON, or the step is already saved.
      StorageError: this save cannot be started, or the one before it failed in the background.
    """
    if self._keep is None:
      raise ValueError(f"{self.directory} was opened for reading only (keep=None)")
    self.wait()
    leaves = leaves_by_path(state)
    for path, leaf in leaves.items():
      require_array(path, leaf)
    meta = json.loads(json.dumps(meta, allow_nan=False))  # as it is now: the caller's may change
    on_main(lambda: self._prepare(step))
    arrays = own_copies({path: leaf for path, leaf in leaves.items() if leaf.size})
    unfinished = self._unfinished(step)
    chunked = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
    try:
      with as_storage_error(unfinished, "cannot be written"):
        if files is not None:
          files(unfinished)
        self._orbax.save(
          unfinished / STATE,
          args=ocp.args.PyTreeSave(arrays, save_args=dict.fromkeys(arrays, chunked)),
        )
    except BaseException:
      if is_main():
        shutil.rmtree(unfinished, ignore_errors=True)  # a full disk needs the room
      raise
    tree = {path: signature(leaf) for path, leaf in leaves.items()}
    self._pending = self._thread.submit(self._commit, step, tree, meta)

  def wait(self) -> None:
    """Returns once the last save is on the disk; StorageError if it failed, in any process."""
    if self._pending is None:
      return
    failed = self._own_failure()
    problem = agree(None if failed is None else str(failed))
    if failed is not None:
      raise failed
    if problem:
      raise StorageError(problem)

  def _own_failure(self) -> Exception | None:
    concurrent.futures.wait([self._pending])  # an interrupt here leaves it pending
    pending, self._pending = self._pending, None
    return pending.exception()

  def steps(self) -> list[int]:
    """The steps that have a checkpoint, rising: the last save's too, and damaged ones'."""
    self.wait()
    return on_main(self._steps)

  def newest_valid(self, report: Callable[[str], None]) -> int | None:
    """The newest step whose files all match its manifest; None if there is none.

    Every newer one that is damaged is reported in one line and stays where it is, until the run
    saves that step again or newer checkpoints take its place. Process 0 verifies and reports.
    """
    self.wait()
    return on_main(lambda: self._newest_valid(report))

  def _newest_valid(self, report: Callable[[str], None]) -> int | None:
    for step in reversed(self._steps()):
      problem = self._problem(step)
      if problem is None:
        return step
      report(f"checkpoint of step {step} cannot be used: {problem}")
    return None

  def meta(self, step: int) -> dict[str, Any]:
    """What was given as `meta` when the step was saved; StorageError if its manifest is damaged."""
    self.wait()
    return on_main(lambda: manifest.read(self._folder(step))["meta"])

  def restore(
    self,
    step: int,
    like: PyTree,
    *,
    partial: bool = False,
    rows: Mapping[str, int] | None = None,
  ) -> PyTree:
    """The state of a step, bit for bit, in the form and on the devices of `like`.

    Args:
      step: one of `steps`; its files are verified unless `newest_valid` has just done so.
      like: a tree of jax arrays or jax.ShapeDtypeStructs with the saved paths, shapes and dtypes.
        A leaf that is committed to devices is restored with its sharding, which may differ from
        the one it was saved with; any other goes to the default device, uncommitted.
      partial: leave out what the checkpoint has and `like` has not, such as optimizer moments.
      rows: {path: R} for tables and what goes with them, such as {"tables/0": 1234}: leaves at or
        below the path may have another leading size than was saved, as the number of devices asks,
        as long as it holds the first R. Those are restored; zeros fill up what follows.

    Raises StorageError if the files are damaged or a path, shape or dtype differs.
    """
    self.wait()
    tree = on_main(lambda: self._sound_tree(step))
    folder, wanted = self._folder(step), leaves_by_path(like)
    require_same_tree(folder, tree, wanted, partial, rows or {})
    stored = {path: leaf for path, leaf in wanted.items() if leaf.size}
    with as_storage_error(folder, "cannot be read"):
      arrays = self._orbax.restore(
        folder / STATE,
        args=ocp.args.PyTreeRestore(
          item=stored,
          restore_args={path: restore_args(leaf) for path, leaf in stored.items()},
          partial_restore=True,
        ),
      )
    leaves = [placed(arrays.get(path), leaf) for path, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)

  def folder(self, step: int) -> pathlib.Path:
    """Where the files of a step are; StorageError if they are damaged."""
    self.wait()
    on_main(lambda: self._sound_tree(step))
    return self._folder(step)

  def open_array(self, step: int, path: str) -> "SavedArray":
    """One array of a step, such as "tables/0", none of it read yet; the files are verified first.

    Raises StorageError if they are damaged or hold no array of that path.
    """
    self.wait()
    tree = on_main(lambda: self._sound_tree(step))
    folder = self._folder(step)
    if path not in tree:
      raise StorageError(f"{folder} holds no array {path}")
    return SavedArray(folder / STATE, path)

  def close(self) -> None:
    """Finishes the last save and stops the threads; StorageError if that save failed."""
    try:
      self.wait()
    finally:
      self._stop()

  def _stop(self) -> None:
    self._thread.shutdown()
    self._orbax.close()

  def _make_directory(self) -> None:
    with as_storage_error(self.directory, "cannot be written"):
      self.directory.mkdir(parents=True, exist_ok=True)
      self._remove_leftovers()

  def _prepare(self, step: int) -> None:
    folder, unfinished = self._folder(step), self._unfinished(step)
    if folder.exists() and self._problem(step) is None:
      raise ValueError(f"{folder} already holds a good checkpoint, which is never overwritten")
    with as_storage_error(unfinished, "cannot be written"):
      shutil.rmtree(unfinished, ignore_errors=True)  # of a save that failed
      unfinished.mkdir()

  def _sound_tree(self, step: int) -> dict[str, str]:
    if step not in self._sound and (problem := self._problem(step)):
      raise StorageError(f"checkpoint of step {step} cannot be used: {problem}")
    return manifest.read(self._folder(step))["tree"]

  def _unfinished(self, step: int) -> pathlib.Path:
    folder = self._folder(step)
    return folder.with_name(folder.name + UNFINISHED)

  def _folder(self, step: int) -> pathlib.Path:
    return self.directory / f"step_{step:08d}"

  def _steps(self) -> list[int]:
    if not self.directory.is_dir():
      return []
    names = (_COMMITTED.fullmatch(path.name) for path in self.directory.iterdir())
    return sorted(int(match[1]) for match in names if match)

  def _problem(self, step: int) -> str | None:
    folder = self._folder(step)
    problem = manifest.verify(folder)
    if problem is None and (written := manifest.read(folder)["step"]) != step:
      problem = f"{folder} holds step {written}: it was renamed"
    self._mark(step, sound=problem is None)
    return problem

  def _mark(self, step: int, sound: bool) -> None:
    (self._sound if sound else self._damaged).add(step)
    (self._damaged if sound else self._sound).discard(step)

  def _commit(self, step: int, tree: dict[str, str], meta: dict[str, Any]) -> None:
    """What happens after the arrays were copied; runs in the background.

    Here processes wait for one another only through Orbax, whose barriers are no collectives: those
    of the step that is running meanwhile come in the same order everywhere.
    """
    with as_storage_error(self._folder(step), "cannot be written"):
      try:
        self._orbax.wait_until_finished()  # by every process
        if is_main():
          self._publish(step, tree, meta)
      except Exception:
        if is_main():
          shutil.rmtree(self._unfinished(step), ignore_errors=True)  # a full disk needs the room
        raise

  def _publish(self, step: int, tree: dict[str, str], meta: dict[str, Any]) -> None:
    folder, unfinished = self._folder(step), self._unfinished(step)
    content = manifest.build(unfinished, step=step, tree=tree, meta=meta, versions=_versions())
    manifest.write(unfinished, content)
    self._remove(step)  # a damaged checkpoint of the same step
    unfinished.rename(folder)
    manifest.sync_directory(self.directory)
    self._mark(step, sound=True)
    self._remove_older(step)

  def _remove_older(self, newest: int) -> None:
    older = [step for step in self._steps() if step < newest]
    good = [step for step in older if step not in self._damaged]
    stay = good[max(0, len(good) - (self._keep - 1)) :]
    for step in older:
      if step not in stay:
        self._remove(step)

  def _remove(self, step: int) -> None:
    folder = self._folder(step)
    if folder.exists():
      # Under its own name a half-deleted checkpoint would look like a damaged one.
      removed = folder.with_name(folder.name + REMOVED)
      folder.rename(removed)
      shutil.rmtree(removed)

  def _remove_leftovers(self) -> None:
    for path in self.directory.iterdir():
      if _LEFTOVER.fullmatch(path.name):
        shutil.rmtree(path)


def _versions() -> dict[str, str]:
  found = {}
  for name in _LIBRARIES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from a source tree
      found[name] = importlib.metadata.version(name)
  return found
