"""The table optimizer that a config names."""

from engram_jax.config import OptimizerConfig
from engram_jax.training.rows.adagrad import row_adagrad
from engram_jax.training.rows.adam import touched_row_adam
from engram_jax.training.rows.catch_up import adam_catch_up
from engram_jax.training.rows.form import TouchedRows
from engram_jax.training.rows.sinkhorn import row_sinkhorn
from engram_jax.training.schedule import Schedule


def row_optimizer(cfg: OptimizerConfig, schedule: Schedule) -> TouchedRows:
  """The optimizer `cfg.table`, at `cfg.table_rate` times the schedule's learning rate."""
  rate = lambda step: cfg.table_rate * schedule(step)
  betas = {"b1": cfg.beta1, "b2": cfg.beta2, "eps": cfg.eps}
  choices = {
    "adam": lambda: touched_row_adam(rate, **betas),
    "adam_catch_up": lambda: adam_catch_up(rate, **betas),
    "adagrad": lambda: row_adagrad(rate, eps=cfg.eps),
    "sinkhorn": lambda: row_sinkhorn(rate, momentum=cfg.momentum),
  }
  return choices[cfg.table]()
