"""Shardings by rule: a parameter's path says which mesh axes divide it.

A rule pairs a pattern of paths with one letter per array axis. The tables of rules belong to those
who make the parameters (model/sharding.py).
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LETTERS = {"f": "fsdp", "t": "tensor", "e": "expert", ".": None}


class Rule(NamedTuple):
  """How the parameters are divided whose path ends in keys that match `pattern`.

  axes: one letter of LETTERS per array axis, "." for an axis that stays whole; empty where the
  whole array does, and any number of axes will do.
  """

  pattern: str
  axes: str = ""


def shardings(tree: Any, rules: Sequence[Rule], mesh: Mesh) -> Any:
  """The NamedSharding of each array (or ShapeDtypeStruct) of a tree; the first matching rule wins.

  An axis whose size does not divide by its mesh axis stays whole, so odd sizes are no error.

  Raises:
    ValueError: an array that no rule names, one with another number of axes than its rule has
      letters, or a rule that names a mesh axis twice.
  """
  for rule in rules:
    _check(rule)
  return jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(mesh, _spec(path_name(path), tuple(x.shape), rules, mesh)), tree
  )


def state_shardings(state: Any, params: Any, param_shardings: Any, mesh: Mesh) -> Any:
  """Shardings of a tree that holds copies of the parameters, such as an optax state.

  An array whose path ends in a parameter's whole path, and has its shape, lies as that parameter
  does: `.../mu/blocks/0/attention/w_out` as `blocks/0/attention/w_out`. Everything else is whole on
  every device.
  """
  paths, _ = jax.tree_util.tree_flatten_with_path(params)
  places = zip(paths, jax.tree.leaves(param_shardings), strict=True)
  known = {(path_name(path), tuple(x.shape)): sharding for (path, x), sharding in places}
  whole = NamedSharding(mesh, PartitionSpec())

  def place(path: Any, x: Any) -> NamedSharding:
    keys = path_name(path).split("/")
    endings = (("/".join(keys[i:]), tuple(x.shape)) for i in range(len(keys)))
    return next((known[ending] for ending in endings if ending in known), whole)

  return jax.tree_util.tree_map_with_path(place, state)


def path_name(path: Any) -> str:
  """A leaf's keys joined by "/"."""
  # An nnx.State keeps each array under a last key "value"; a pure dict does not.
  return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def _check(rule: Rule) -> None:
  unknown = set(rule.axes) - LETTERS.keys()
  if unknown:
    raise ValueError(
      f"sharding rule {rule.pattern!r} has letter {min(unknown)!r} in {rule.axes!r}: "
      f"the letters are {', '.join(LETTERS)}"
    )
  twice = [letter for letter in rule.axes if letter != "." and rule.axes.count(letter) > 1]
  if twice:
    raise ValueError(
      f"sharding rule {rule.pattern!r} names mesh axis {LETTERS[twice[0]]!r} twice in "
      f"{rule.axes!r}: one mesh axis can divide one axis of an array"
    )


def _spec(name: str, shape: tuple[int, ...], rules: Sequence[Rule], mesh: Mesh) -> PartitionSpec:
  rule = next((rule for rule in rules if re.fullmatch(rf"(.*/)?({rule.pattern})", name)), None)
  if rule is None:
    raise ValueError(
      f"no sharding rule names parameter {name!r} of shape {shape}: add one to its table of rules"
    )
  if rule.axes and len(rule.axes) != len(shape):
    raise ValueError(
      f"parameter {name!r} of shape {shape} has {len(shape)} axes, "
      f"but its sharding rule reads {rule.axes!r}"
    )
  axes = [LETTERS[letter] for letter in rule.axes]
  divides = lambda axis, size: axis is not None and size % mesh.shape[axis] == 0
  return PartitionSpec(*(a if divides(a, n) else None for a, n in zip(axes, shape, strict=False)))
