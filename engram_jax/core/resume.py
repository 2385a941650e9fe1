"""The step at which a run goes on: its newest sound one, or 0 where that is wanted by name."""

from collections.abc import Callable

from engram_jax.config import Config
from engram_jax.core.checkpoint import Checkpoints
from engram_jax.core.distributed import on_main
from engram_jax.core.metrics import NAME as METRICS
from engram_jax.core.metrics import last_step
from engram_jax.core.run_changes import HISTORY
from engram_jax.core.run_directory import CHECKPOINTS, RunDirectory
from engram_jax.errors import NoUsableCheckpoint

NEWEST = f"{CHECKPOINTS}.json"


def find_start(
  cfg: Config, run: RunDirectory, checkpoints: Checkpoints, log: Callable[[str], None]
) -> int | None:
  """The step to resume from; None for a new run, and for one that is to begin again.

  log: is told of newer checkpoints that cannot be used, and of what was moved aside.

  Raises StorageError where steps were saved and none can be used.
  """
  if not run.is_existing:
    return None
  try:
    start = checkpoints.newest_valid(log)
    if start is None:
      # Runs of before checkpoints.json. A save is waited for by the next, so one was completed.
      reached = on_main(lambda: last_step(run.path))
      if reached >= 2 * cfg.train.checkpoint_every:
        raise NoUsableCheckpoint(
          f"{run.path / CHECKPOINTS} holds no checkpoint, though {METRICS} goes to step {reached}"
        )
    return start
  except NoUsableCheckpoint as error:
    if not cfg.run.start_over:
      raise NoUsableCheckpoint(
        f"{error}. Nothing was changed: make the files whole or readable again, or begin again at "
        "step 0 with --run.start_over True, which moves what is there aside"
      ) from None
    log(f"{error}")
    aside = run.set_aside((CHECKPOINTS, NEWEST, METRICS, HISTORY, "tensorboard"))
    log(f"beginning again at step 0; what was there is in {aside}")
    return None
