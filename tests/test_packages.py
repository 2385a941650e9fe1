"""What a core install brings along: few packages, and no other framework."""

import importlib.metadata
import re

from packaging.requirements import Requirement

LIMIT = 60


def normal(name: str) -> str:
  """As the package index compares names (PEP 503)."""
  return re.sub(r"[-_.]+", "-", name).lower()


def closure(name: str) -> set[str]:
  """Every distribution that installing `name` without extras brings, itself included.

  Extras that a requirement asks for by name (`jax[tpu]`) are followed, as pip does.
  """
  found: set[tuple[str, str]] = set()
  waiting = [(normal(name), "")]
  while waiting:
    package, extra = waiting.pop()
    if (package, extra) in found:
      continue
    found.add((package, extra))
    for text in importlib.metadata.requires(package) or ():
      requirement = Requirement(text)
      if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
        continue
      waiting += [(normal(requirement.name), more) for more in ("", *requirement.extras)]
  return {package for package, _ in found}


def test_a_core_install_is_small_and_holds_no_other_framework():
  packages = closure("engram_jax")
  assert {"jax", "flax", "optax", "grain", "numpy"} <= packages  # the walk did walk
  assert len(packages) <= LIMIT, sorted(packages)
  assert not packages & {"torch", "tensorflow", "tensorflow-cpu", "tf-nightly", "keras"}
