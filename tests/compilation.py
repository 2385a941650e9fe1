"""Quick compilation on CPUs: XLA's older emitters of kernels, equal numbers in half the time.

A program's kernels are one module besides: in 32 parts, as by default, tiny ones cost a sixth more.
"""

import os

import jaxlib.version

VERSION = jaxlib.version.__version__
HAS_OLDER_EMITTERS = VERSION.startswith("0.10.")  # later compilers refuse the flag
USER_EMITTERS = {"xla_cpu_use_fusion_emitters": True} if HAS_OLDER_EMITTERS else {}
"""Options of `Lowered.compile` for a program that is read: kernels as a user gets them."""


def use_older_emitters() -> None:
  """Sets XLA_FLAGS, which is read when the first program is compiled, here and in processes that
  tests start."""
  flags = os.environ.get("XLA_FLAGS", "")
  if HAS_OLDER_EMITTERS:
    flags += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
  os.environ["XLA_FLAGS"] = flags
