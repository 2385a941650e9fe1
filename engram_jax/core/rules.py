"""Shardings by rule: a parameter's path decides which mesh axes divide it.

A rule pairs a pattern of paths with one word per array axis, whose letters are mesh axes. The
table of the model's rules is model/params.py.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LETTERS = {"f": "fsdp", "t": "tensor", "e": "expert"}
UNDIVIDED = "."


class ShardingRule(NamedTuple):
  """The mesh axes that divide the parameters whose path ends in keys that match `pattern`.

  axes: a word per array axis, of the LETTERS of the mesh axes that divide it, major first, or
  UNDIVIDED for an axis that none does: "e f ." Empty for an undivided array of any number of axes.
  """

  pattern: str
  axes: str = ""


def shardings(tree: Any, rules: Sequence[ShardingRule], mesh: Mesh) -> Any:
  """The NamedSharding of each array (or ShapeDtypeStruct) of a tree; the first matching rule wins.

  A mesh axis that does not divide the remaining size of an array axis is passed over, so odd sizes
  are no error.

  Raises:
    ValueError: an array that no rule names, one with another number of axes than its rule has
      words, or a rule that names a mesh axis twice.
  """
  for rule in rules:
    _check(rule)
  return jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(mesh, _spec(path_name(path), tuple(x.shape), rules, mesh)), tree
  )


def state_shardings(state: Any, params: Any, param_shardings: Any, mesh: Mesh) -> Any:
  """Shardings of a tree that holds arrays like the parameters, such as an optax state.

  An array whose path ends in a parameter's full path, and has its shape, is sharded as that
  parameter: `.../mu/blocks/0/attention/w_out` as `blocks/0/attention/w_out`. Everything else is
  replicated.
  """
  paths, _ = jax.tree_util.tree_flatten_with_path(params)
  known_paths = zip(paths, jax.tree.leaves(param_shardings), strict=True)
  known = {(path_name(path), tuple(x.shape)): sharding for (path, x), sharding in known_paths}
  replicated = NamedSharding(mesh, PartitionSpec())

  def sharding_of(path: Any, x: Any) -> NamedSharding:
    keys = path_name(path).split("/")
    endings = (("/".join(keys[i:]), tuple(x.shape)) for i in range(len(keys)))
    return next((known[ending] for ending in endings if ending in known), replicated)

  return jax.tree_util.tree_map_with_path(sharding_of, state)


def path_name(path: Any) -> str:
  """A leaf's keys joined by "/"."""
  # An nnx.State keeps each array under a last key "value"; a pure dict does not.
  return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def find_rule(name: str, shape: tuple[int, ...], rules: Sequence[Any], where: str) -> Any:
  """Returns the first rule whose pattern matches the end of a path, at a key's beginning.

  where: names the table of rules in messages.

  Raises ValueError where there is none, or one with another number of axes than the array has.
  """
  rule = next((rule for rule in rules if re.fullmatch(rf"(.*/)?({rule.pattern})", name)), None)
  if rule is None:
    raise ValueError(f"no rule names parameter {name!r} of shape {shape}: add one to {where}")
  words = rule.axes.split()
  if words and len(words) != len(shape):
    raise ValueError(
      f"parameter {name!r} of shape {shape} has {len(shape)} axes, but its rule reads {rule.axes!r}"
    )
  return rule


def _check(rule: ShardingRule) -> None:
  letters = [letter for word in rule.axes.split() for letter in word if word != UNDIVIDED]
  for letter in letters:
    if letter not in LETTERS:
      raise ValueError(
        f"sharding rule {rule.pattern!r} has letter {letter!r} in {rule.axes!r}: "
        f"the letters are {', '.join(LETTERS)}, and a word {UNDIVIDED} by itself"
      )
    if letters.count(letter) > 1:
      raise ValueError(
        f"sharding rule {rule.pattern!r} names mesh axis {LETTERS[letter]!r} twice in "
        f"{rule.axes!r}: a mesh axis can divide an array once"
      )


def _spec(
  name: str, shape: tuple[int, ...], rules: Sequence[ShardingRule], mesh: Mesh
) -> PartitionSpec:
  rule = find_rule(name, shape, rules, "its table of rules")
  words = rule.axes.split()
  return PartitionSpec(
    *(_dividing_axes(word, size, mesh) for word, size in zip(words, shape, strict=False))
  )


def _dividing_axes(word: str, size: int, mesh: Mesh) -> str | tuple[str, ...] | None:
  """The mesh axes of a word, those that divide the size."""
  axes = []
  for axis in () if word == UNDIVIDED else (LETTERS[letter] for letter in word):
    if size % mesh.shape[axis] == 0:
      size //= mesh.shape[axis]
      axes.append(axis)
  return tuple(axes) if len(axes) > 1 else axes[0] if axes else None
