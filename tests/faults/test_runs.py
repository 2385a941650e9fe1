"""A run whose files are damaged, gone or refused: nothing is lost, and everything is said."""

import errno
import json
import os
import pathlib
import re
import resource
import shutil
import stat

import jax
import pytest

from engram_jax.core import step_folders
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.metrics import LOST


@pytest.fixture(scope="module")
def whole(lab):
  """The folder of a run of 24 steps that nothing interrupted: steps 16 and 24 are saved."""
  done = lab.training(lab.folder / "whole-run")
  assert done.code == 0, done.err
  return lab.folder / "whole-run" / "t"


@pytest.fixture
def run(whole, tmp_path) -> pathlib.Path:
  """A copy of it, to be damaged."""
  return pathlib.Path(shutil.copytree(whole, tmp_path / "t"))


@pytest.fixture
def at_step(lab, monkeypatch):
  """`at_step(n, action)`: the action happens before step n's metrics are written, when no save is
  running."""
  made = []
  init = Checkpoints.__init__

  def keep(self, *args, **options):
    init(self, *args, **options)
    made.append(self)

  monkeypatch.setattr(Checkpoints, "__init__", keep)

  def at_step(step, action):
    write = lab.train.MetricsWriter.write

    def after_action(self, number, values):
      if number == step:
        if running := made[-1]._pending:
          running.exception()  # which waits, and leaves it to whoever asks
        action()
      write(self, number, values)

    monkeypatch.setattr(lab.train.MetricsWriter, "write", after_action)

  return at_step


def files(folder: pathlib.Path) -> dict[str, bytes]:
  paths = (path for path in folder.rglob("*") if path.is_file())
  return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def lines(run: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: pathlib.Path) -> dict[int, float]:
  return {line["step"]: line["loss"] for line in lines(run)}


def steps(run: pathlib.Path) -> list[str]:
  return sorted(path.name for path in (run / "checkpoints").iterdir())


# --- checkpoints that cannot be used --------------------------------------------------------


def flip(checkpoint: pathlib.Path) -> None:
  largest = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)


def flip_both(run: pathlib.Path, _) -> None:
  for step in ("step_00000016", "step_00000024"):
    flip(run / "checkpoints" / step)


def remove_checkpoints(run: pathlib.Path, _) -> None:
  shutil.rmtree(run / "checkpoints")


def empty_checkpoints(run: pathlib.Path, _) -> None:
  for path in (run / "checkpoints").iterdir():
    shutil.rmtree(path)


def forbid_manifests(run: pathlib.Path, monkeypatch) -> None:
  opening = os.open

  def refuse(path, *args, **options):
    if str(path).endswith("manifest.json"):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return opening(path, *args, **options)

  monkeypatch.setattr(os, "open", refuse)


def remove_manifests(run: pathlib.Path, _) -> None:
  for path in (run / "checkpoints").rglob("manifest.json"):
    path.unlink()


def forbid_folder(run: pathlib.Path, monkeypatch) -> None:
  listing = pathlib.Path.iterdir

  def refuse(path):
    if path == run / "checkpoints":
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return listing(path)

  monkeypatch.setattr(pathlib.Path, "iterdir", refuse)


BOTH = ("step 24: ", "step 16: ")


@pytest.mark.parametrize(
  ("fault", "words"),
  [
    (flip_both, ("(damaged)", *BOTH, "its sha256 is not the manifest's")),
    (remove_manifests, ("(missing)", *BOTH, "the checkpoint was never completed")),
    (remove_checkpoints, ("(missing)", "step 24: ", "checkpoints is missing")),
    (empty_checkpoints, ("(missing)", "step 24: ", "step_00000024 is missing")),
    (forbid_folder, ("Permission denied", "which held step 24")),
    (forbid_manifests, ("(unreadable)", "step 24: ", "Permission denied")),
  ],
)
def test_a_run_without_a_usable_checkpoint_ends_with_5_and_touches_nothing(
  lab, run, monkeypatch, fault, words
):
  fault(run, monkeypatch)
  before = files(run)
  done = lab.training(run.parent)
  monkeypatch.undo()
  assert done.code == 5, done.err
  said = done.err.splitlines()[-1]
  for word in words:
    assert word in said
  assert "--run.start_over True" in said
  assert files(run) == before


def test_a_run_folder_that_may_not_be_read_is_a_storage_error(lab, run, monkeypatch):
  stating = os.stat

  def refuse(path, **options):
    if str(path).startswith(str(run)):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return stating(path, **options)

  monkeypatch.setattr(os, "stat", refuse)
  done = lab.training(run.parent)
  monkeypatch.undo()
  assert done.code == 5, done.err
  assert done.err.startswith(f"error: run folder {run} cannot be read: ")
  assert "Permission denied" in done.err


def test_a_run_of_before_checkpoints_json_whose_folder_is_gone_does_not_start_over(lab, run):
  (run / "checkpoints.json").unlink()
  shutil.rmtree(run / "checkpoints")
  before = files(run)
  done = lab.training(run.parent)
  assert done.code == 5, done.err
  assert "holds no checkpoint, though metrics.jsonl goes to step 24" in done.err
  assert files(run) == before


def test_starting_over_by_name_moves_what_is_there_aside(lab, run, whole):
  flip_both(run, None)
  before = files(run)
  done = lab.training(run.parent, "--run.start_over", "True")
  assert done.code == 0, done.err
  assert f"beginning again at step 0; what was there is in {run / 'before-1'}" in done.err
  assert losses(run) == losses(whole)
  moved = ("checkpoints", "checkpoints.json", "metrics.jsonl", "tensorboard")
  expected = {name: x for name, x in before.items() if name.split("/")[0] in moved}
  assert files(run / "before-1") == expected
  again = lab.training(run.parent, "--run.start_over", "True")
  assert "is finished" in again.err  # what can be used is used


def test_a_newest_step_that_cannot_be_read_is_not_passed_over(lab, run, monkeypatch):
  """Going on from step 16 would replace step 24, which is sound for whoever may read it."""
  opening = os.open

  def refuse(path, *args, **options):
    if "step_00000024" in str(path):
      raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
    return opening(path, *args, **options)

  monkeypatch.setattr(os, "open", refuse)
  done = lab.training(run.parent)
  assert done.code == 5
  assert "(unreadable): step 24: " in done.err
  assert os.strerror(errno.EIO) in done.err


def test_a_missing_newest_step_is_told_and_the_one_before_it_used(lab, run, whole):
  shutil.rmtree(run / "checkpoints" / "step_00000024")
  done = lab.training(run.parent)
  assert done.code == 0, done.err
  assert "checkpoint of step 24 cannot be used" in done.err
  assert "after step 16" in done.err
  assert losses(run) == losses(whole)


def test_verification_is_off_by_name_only(lab, run):
  flip(run / "checkpoints" / "step_00000024")
  done = lab.training(run.parent, "--train.verify_checkpoints", "False")
  assert "is finished" in done.err  # a changed bit has no size
  assert "after step 16" in lab.training(run.parent).err


def test_a_file_with_a_step_s_name_blocks_neither_start_nor_save(lab, tmp_path, whole):
  folder = tmp_path / "t" / "checkpoints"
  shutil.copytree(whole, tmp_path / "t")
  shutil.rmtree(folder)
  folder.mkdir()
  (tmp_path / "t" / "checkpoints.json").unlink()
  (tmp_path / "t" / "metrics.jsonl").unlink()
  (folder / "step_00000008").write_text("mine")
  (folder / "step_00000099").write_text("mine too")
  (folder / "step_00000001.removed").write_text("left")
  done = lab.training(tmp_path)
  assert done.code == 0, done.err
  assert steps(tmp_path / "t") == [
    "step_00000008.not-a-checkpoint",
    "step_00000016",
    "step_00000024",
    "step_00000099",
  ]
  assert (folder / "step_00000008.not-a-checkpoint").read_text() == "mine"


# --- a disk that is full --------------------------------------------------------------------


def limit_file_size(size: int) -> None:
  """No file of this process grows beyond this size, as on a full disk; -1 ends it."""
  hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
  resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size < 0 else size, hard))


@pytest.fixture
def room():
  """Room again at the end; nor does JAX write programs to its cache, cut off by the limit."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  yield
  limit_file_size(-1)
  jax.config.update("jax_enable_compilation_cache", before)


def test_training_goes_on_where_a_save_fails_and_saves_again_with_room(
  lab, tmp_path, at_step, room, whole
):
  at_step(7, lambda: limit_file_size(4096))
  at_step(19, lambda: limit_file_size(-1))
  done = lab.training(tmp_path, "--train.eval_every", 6)
  assert done.code == 0, done.err
  for step in (8, 16):
    (said,) = [line for line in done.err.splitlines() if f"step {step} was not saved: " in line]
    assert said.endswith("training goes on, and the next save tries again")
  assert "Traceback" not in done.err
  run = tmp_path / "t"
  assert steps(run) == ["step_00000024"]  # and nothing half written
  lost = 24 - len(lines(run))
  assert lost > 5
  assert lines(run)[-1][LOST] == lost
  assert f"metrics.jsonl lacks {lost} lines" in done.err
  assert {step: loss for step, loss in losses(whole).items() if step in losses(run)} == losses(run)


def test_too_many_failed_saves_in_a_row_end_a_run_with_5(lab, tmp_path, at_step, room, monkeypatch):
  at_step(7, lambda: limit_file_size(4096))
  words = ("--train.eval_every", 6, "--train.checkpoint_every", 2, "--train.failed_saves_limit", 3)
  done = lab.training(tmp_path, *words)
  limit_file_size(-1)
  assert done.code == 5, done.err
  failed = [int(step) for step in re.findall(r"step (\d+) was not saved: ", done.err)]
  assert failed == [8, 10, 12]
  assert done.err.splitlines()[-1].endswith("(3 failed saves in a row)")
  good = [name for name in steps(tmp_path / "t") if "." not in name]
  assert good == ["step_00000004", "step_00000006"]
  monkeypatch.undo()  # room from now on
  again = lab.training(tmp_path, *words)
  assert again.code == 0, again.err
  assert "after step 6" in again.err
  assert steps(tmp_path / "t") == ["step_00000022", "step_00000024"]  # nothing half written


def test_a_last_step_that_cannot_be_saved_is_no_finished_run(lab, tmp_path, at_step, room):
  at_step(23, lambda: limit_file_size(4096))
  done = lab.training(tmp_path, "--train.eval_every", 6, "--train.sample_tokens", 0)
  limit_file_size(-1)
  assert done.code == 5, done.err
  assert "step 24 was not saved" in done.err
  assert "finished " not in done.err
  assert steps(tmp_path / "t")[-1] == "step_00000016"


def test_a_folder_that_may_not_be_written_for_a_while_costs_one_save(lab, tmp_path, at_step):
  """A file takes the place of the folder, since the super-user may write to any."""
  folder = tmp_path / "t" / "checkpoints"

  def take() -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.touch()

  def give_back() -> None:
    folder.unlink()
    folder.with_name("elsewhere").rename(folder)

  at_step(15, take)
  at_step(17, give_back)
  done = lab.training(tmp_path)
  assert done.code == 0, done.err
  assert "step 16 was not saved: " in done.err
  assert steps(tmp_path / "t") == ["step_00000008", "step_00000024"]


@pytest.mark.parametrize("removed", [True, False])
def test_a_run_folder_that_was_moved_or_removed_is_not_made_again(lab, tmp_path, at_step, removed):
  run = tmp_path / "t"
  moved = tmp_path / "u"

  def move() -> None:
    run.rename(moved)
    if removed:
      shutil.rmtree(moved)

  at_step(12, move)
  done = lab.training(tmp_path, "--train.checkpoint_every", 4)
  assert done.code == 5, done.err
  assert not run.exists()
  assert re.search(rf"error: step (16|20) was not saved: run folder {run} ", done.err)
  assert removed or steps(moved)[0] == "step_00000004"


def test_rows_that_were_lost_while_a_step_was_saved_are_missed(lab, tmp_path, monkeypatch):
  """Orbax's arrays are whole then, and a manifest of what is left would be too."""
  building = step_folders.manifest.build

  def lose_rows(directory, **options):
    if options["step"] == 16:
      shutil.rmtree(directory / "rows")
    return building(directory, **options)

  monkeypatch.setattr(step_folders.manifest, "build", lose_rows)
  done = lab.training(tmp_path, "--model.engram.placement", "host")
  assert done.code == 0, done.err
  assert "step 16 was not saved: " in done.err
  assert "rows/0.ids.npy is missing, though " in done.err
  assert steps(tmp_path / "t") == ["step_00000008", "step_00000024"]


def test_a_save_is_told_at_debug_level_and_measured(lab, tmp_path):
  done = lab.training(tmp_path, "--run.log_level", "debug", "--train.log_every", 1)
  for said in ("save of step 8 begins", "step 8 saved: ", "save of step 24 begins"):
    assert said in done.err
  (line,) = [line for line in lines(tmp_path / "t") if line.get("checkpoint/step") == 8]
  assert line["checkpoint/seconds"] > 0
  folder = tmp_path / "t" / "checkpoints" / "step_00000024"
  with Checkpoints(folder.parent, keep=None) as checkpoints:
    assert checkpoints.newest_valid(pytest.fail) == 24
  size = sum(p.stat().st_size for p in folder.rglob("*") if stat.S_ISREG(p.stat().st_mode))
  assert 0 < line["checkpoint/bytes"] < 2 * size


# --- the tokenizer of the run ---------------------------------------------------------------


def test_a_run_looks_at_its_tokenizer(lab, run):
  path = run / "tokenizer.json"
  shutil.rmtree(run / "checkpoints" / "step_00000024")
  original = path.read_bytes()
  path.write_bytes(original.replace(b'"ByteLevel"', b'"ByteLevel" ', 1))
  assert lab.training(run.parent, "--train.steps", 24).code == 0  # the same, spelled otherwise
  shutil.rmtree(run / "checkpoints" / "step_00000024")
  content = json.loads(original)
  content["model"]["merges"].pop()
  path.write_text(json.dumps(content))
  done = lab.training(run.parent)
  assert done.code == 5, done.err
  assert f"{path} is not the tokenizer that this run is trained with" in done.err
  path.unlink()
  done = lab.training(run.parent)
  assert done.code == 0, done.err
  assert path.read_bytes() == original
