"""Checkpoints: Orbax writes the arrays, a manifest tells which steps can be trusted.

    with Checkpoints(directory, keep=2) as checkpoints:
      step = checkpoints.newest_valid(report=print)
      if step is not None:
        state = checkpoints.restore(step, like=state)
      ...
      checkpoints.save(step, state, meta)

A checkpoint is a folder `step_00000100/` holding `state/` (Orbax; one flat dict from leaf path to
array) and `manifest.json` (engram_jax.core.manifest). It is written in this order: arrays, Orbax's
commit, the manifest, and last the rename to its own name (engram_jax.core.step_folders); only then
are older ones deleted.

With several processes (engram_jax.core.distributed) all of them see the folder, and all call every
method, in the same order and from their main threads. Each writes and reads the shards on its own
devices, in chunks, so none ever holds a full table; process 0 alone makes folders and manifests,
verifies and deletes; an error of one is raised in all. The caller sees to it that two jobs never
write to one folder at once.
"""

import concurrent.futures
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from engram_jax.core import manifest
from engram_jax.core.distributed import first_error, is_main, is_multiprocess, on_main
from engram_jax.core.library_noise import quiet_failed_saves
from engram_jax.core.saved_arrays import (
  CHUNK_BYTES,
  PyTree,
  SavedArray,
  as_storage_error,
  copy_host_arrays,
  leaves_by_path,
  put_like,
  require_array,
  require_compatible,
  restore_args,
  signature,
)
from engram_jax.core.step_folders import UNSOUND, StepFolders
from engram_jax.errors import StorageError

STATE = "state"
_TIMEOUT_SECONDS = 600  # for the other processes' writes
_LOGGER = logging.getLogger(__name__)


class Saved(NamedTuple):
  """The step of a finished save, the seconds from its start to the end, the bytes of its files."""

  step: int
  seconds: float
  bytes: int


class Checkpoints:
  """The checkpoints of one run: asynchronous saves, verified restores, the last few retained."""

  def __init__(self, directory: str | os.PathLike, keep: int | None, verify: bool = True):
    """Opens `directory`, and changes nothing in it.

    Args:
      directory: holds one folder per step.
      keep: how many of the newest checkpoints stay; None opens the folder for reading only.
      verify: compare the digest of every file before a step is used; False compares names and
        sizes alone, which notices no changed bit.

    Raises ValueError where keep is below 1.
    """
    if keep is not None and keep < 1:
      raise ValueError(f"keep={keep} must be at least 1: the newest checkpoint always stays")
    self.directory = pathlib.Path(directory).absolute()
    self._keep = keep
    self._folders = StepFolders(self.directory, verify)
    self._is_prepared = False
    if keep is not None:
      quiet_failed_saves()
    self._saved: Saved | None = None
    # Float weights do not compress; trying costs more than all the rest of a save.
    self._orbax = ocp.AsyncCheckpointer(
      ocp.PyTreeCheckpointHandler(use_compression=False),
      async_options=ocp.options.AsyncOptions(timeout_secs=_TIMEOUT_SECONDS),
    )
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._pending: concurrent.futures.Future[None] | None = None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, _: object
  ) -> None:
    if error is None:
      self.close()
    elif is_multiprocess():
      self._stop()  # the others may be elsewhere: none to agree with
    else:
      try:
        self.close()
      except StorageError as failed:
        error.add_note(f"besides, the save before it failed: {failed}")

  def prepare(self) -> None:
    """Makes the directory, and removes what a killed process left there; the first save does too.

    Raises StorageError: it cannot be written, or one of the processes does not see it.
    """
    if self._is_prepared:
      return
    on_main(self._folders.make_directory)
    unseen = None if self.directory.is_dir() else f"does not see {self.directory}"
    if problem := first_error(unseen):
      raise StorageError(f"{problem}: run.root must be a folder that all processes share")
    self._is_prepared = True

  def save(
    self,
    step: int,
    state: PyTree,
    meta: dict[str, Any],
    files: Callable[[pathlib.Path], None] | None = None,
    is_sound: bool = True,
  ) -> None:
    """Starts writing a checkpoint; the arrays may be donated or overwritten once this returns.

    Waits for the save before it, if that is still running.

    Args:
      step: the number of steps behind this state.
      state: a tree whose leaves are jax arrays with a definite dtype, or NumPy arrays.
      meta: JSON values, which `meta` returns.
      files: writes more files into the folder it is called with, before this returns; the manifest
        covers them, and `folder` returns where they are then.
      is_sound: False keeps the newest checkpoint that was saved with True from being deleted.

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
    meta |= {} if is_sound else {UNSOUND: True}
    self.prepare()
    begin = time.monotonic()
    _LOGGER.debug("save of step %d begins", step)
    on_main(lambda: self._folders.begin(step))
    arrays = copy_host_arrays({path: leaf for path, leaf in leaves.items() if leaf.size})
    unfinished = self._folders.unfinished(step)
    chunked = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
    written: dict[str, int] = {}
    try:
      with as_storage_error(unfinished, "cannot be written"):
        if files is not None:
          files(unfinished)
          written = _sizes(unfinished)
        self._orbax.save(
          unfinished / STATE,
          args=ocp.args.PyTreeSave(arrays, save_args=dict.fromkeys(arrays, chunked)),
        )
    except BaseException:
      if is_main():
        self._folders.abandon(step)
      raise
    tree = {path: signature(leaf) for path, leaf in leaves.items()}
    self._pending = self._thread.submit(self._commit, step, tree, meta, self._keep, written, begin)

  def _commit(
    self,
    step: int,
    tree: dict[str, str],
    meta: dict[str, Any],
    keep: int,
    written: Mapping[str, int],
    begin: float,
  ) -> None:
    """Completes a checkpoint in the background, once its arrays are written.

    Here processes wait for one another only through Orbax, whose barriers are no collectives: those
    of the step that is running meanwhile come in the same order everywhere.
    """
    with as_storage_error(self._folders.path(step), "cannot be written"):
      try:
        self._orbax.wait_until_finished()  # by every process
        if is_main():
          size = self._folders.publish(step, tree, meta, keep, written)
          self._saved = Saved(step, time.monotonic() - begin, size)
          _LOGGER.debug("step %d saved: %d bytes in %.2f s", step, size, self._saved.seconds)
      except Exception:
        if is_main():
          self._folders.abandon(step)
        raise

  def wait(self) -> None:
    """Returns once the last save is on the disk; StorageError if it failed, in any process."""
    if self._pending is None:
      return
    concurrent.futures.wait([self._pending])  # an interrupt here leaves it pending
    failure, self._pending = self._pending.exception(), None
    problem = first_error(None if failure is None else str(failure))
    if failure is not None:
      raise failure
    if problem:
      raise StorageError(problem)

  def last_saved(self) -> Saved | None:
    """The save that was finished since the last call, in process 0; None if none was."""
    saved, self._saved = self._saved, None
    return saved

  def steps(self) -> list[int]:
    """The steps that have a checkpoint, rising: the last save's too, and damaged ones'."""
    self.wait()
    return on_main(self._folders.steps)

  def newest_valid(self, report: Callable[[str], None]) -> int | None:
    """The newest step whose files all match its manifest; None if none was ever saved.

    Every newer one that cannot be used is reported in one line and stays where it is, until the run
    saves that step again or newer checkpoints take its place. Process 0 verifies and reports.

    Raises NoUsableCheckpoint, a StorageError, naming the steps that were saved and why none of them
    can be used; and where the folder is open for writing and its newest step cannot be read, as
    without permission.
    """
    self.wait()
    writing = self._keep is not None
    return on_main(lambda: self._folders.newest_valid(report, writing))

  def meta(self, step: int) -> dict[str, Any]:
    """The `meta` that the step was saved with; StorageError if its manifest is damaged."""
    self.wait()
    return on_main(lambda: manifest.read(self._folders.path(step))["meta"])

  def restore(
    self,
    step: int,
    like: PyTree,
    *,
    partial: bool = False,
    rows: Mapping[str, int] | None = None,
  ) -> PyTree:
    """Returns the state of a step, bit for bit, as a tree like `like` and on its devices.

    Args:
      step: one of `steps`; its files are verified unless `newest_valid` has just done so.
      like: a tree of jax arrays or jax.ShapeDtypeStructs with the saved paths, shapes and dtypes.
        A leaf that is committed to devices is restored with its sharding, which may differ from
        the one it was saved with; any other goes to the default device, uncommitted.
      partial: leave out what the checkpoint has and `like` has not, such as optimizer moments.
      rows: {path: R} for tables and what goes with them, such as {"tables/0": 1234}: leaves at or
        below the path may have another leading size than was saved, as the number of devices asks,
        as long as it holds the first R. Those are restored, and followed by zeros.

    Raises StorageError if the files are damaged or a path, shape or dtype differs.
    """
    self.wait()
    tree = on_main(lambda: self._folders.tree(step))
    folder, leaves = self._folders.path(step), leaves_by_path(like)
    require_compatible(folder, tree, leaves, partial, rows or {})
    stored = {path: leaf for path, leaf in leaves.items() if leaf.size}
    with as_storage_error(folder, "cannot be read"):
      arrays = self._orbax.restore(
        folder / STATE,
        args=ocp.args.PyTreeRestore(
          item=stored,
          restore_args={path: restore_args(leaf) for path, leaf in stored.items()},
          partial_restore=True,
        ),
      )
    restored = [put_like(arrays.get(path), leaf) for path, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(like), restored)

  def folder(self, step: int) -> pathlib.Path:
    """The folder that holds the files of a step; StorageError if they are damaged."""
    self.wait()
    on_main(lambda: self._folders.tree(step))
    return self._folders.path(step)

  def open_array(self, step: int, path: str) -> SavedArray:
    """One array of a step, such as "tables/0", none of it read yet; the files are verified first.

    Raises StorageError if they are damaged or hold no array of that path.
    """
    self.wait()
    tree = on_main(lambda: self._folders.tree(step))
    folder = self._folders.path(step)
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


def _sizes(folder: pathlib.Path) -> dict[str, int]:
  """Bytes of all files below a folder, by path in it."""
  files = (path for path in folder.rglob("*") if path.is_file())
  return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
