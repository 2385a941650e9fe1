"""Configs from YAML files that extend one another, and errors that name what would be valid."""

import difflib
import pathlib
from typing import Any

import pydantic
import yaml

from engram_jax.config.run import Config
from engram_jax.errors import ConfigError


def load_config(path: str | pathlib.Path | None, overrides: dict[str, Any] | None = None) -> Config:
  """Returns the checked config of a YAML file, its `extends` chain and overrides by dotted path.

  path: `configs/NAME.yaml` that is not in the working folder is the one that the package ships.

  Raises ConfigError (exit code 2) naming the file, the field, its value and what would be valid.
  """
  tree = _read(_resolve_shipped(pathlib.Path(path)), ()) if path is not None else {}
  for dotted, value in (overrides or {}).items():
    _set(tree, dotted, value)
  return build(tree, where=str(path or "overrides"))


def build(tree: dict[str, Any], where: str) -> Config:
  """Builds a `Config` from nested dicts; ConfigError with one line for each mistake."""
  try:
    return Config.model_validate(tree)
  except pydantic.ValidationError as error:
    raise ConfigError(explain(error, where)) from None


def explain(error: pydantic.ValidationError, where: str) -> str:
  """The text of an error: one line a mistake, with field, value, and what would be valid."""
  return "\n".join(_explain(item, where) for item in error.errors())


def _explain(item: Any, where: str) -> str:
  loc = [str(part) for part in item["loc"]]
  if item["type"] == "extra_forbidden":
    near = nearest(".".join(loc))
    return f"{where}: unknown key {'.'.join(loc)!r}" + (f"; did you mean {near!r}?" if near else "")
  message = item["msg"].removeprefix("Value error, ")
  value = (
    "" if isinstance(item["input"], dict | pydantic.BaseModel) else f" (got {item['input']!r})"
  )
  return f"{where}: {'.'.join(loc) or 'config'}: {message}{value}"


def fields(model: type[pydantic.BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
  """Returns all leaf fields by dotted path, with their annotations."""
  found = {}
  for name, info in model.model_fields.items():
    kind = info.annotation
    if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
      found |= fields(kind, f"{prefix}{name}.")
    else:
      found[prefix + name] = kind
  return found


def nearest(key: str) -> str | None:
  """The known field closest to a mistyped dotted key."""
  known = list(fields())
  leaf = key.rsplit(".", 1)[-1]
  close = difflib.get_close_matches(key, known, len(known), 0.6)
  same_leaf = [name for name in close if name.rsplit(".", 1)[-1] == leaf]  # in the wrong section
  if close:
    return (same_leaf or close)[0]
  by_leaf = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
  leaves = difflib.get_close_matches(leaf, list(by_leaf), 1, 0.6)
  return by_leaf[leaves[0]] if leaves else None


class _UniqueKeys(yaml.SafeLoader):
  """YAML's safe loader, which takes the last of two equal keys; this one refuses them."""

  def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
      if key.value in seen:
        raise yaml.YAMLError(f"key {key.value!r} stands twice, again{key.start_mark}")
      seen.add(key.value)
    return super().construct_mapping(node, deep)


def _shipped() -> pathlib.Path:
  """The folder of the package's own configs: in it when installed, else beside it."""
  package = pathlib.Path(__file__).parents[1]
  installed = package / "configs"
  return installed if installed.is_dir() else package.parent / "configs"


def _alternatives(path: pathlib.Path) -> str:
  """The end of a message about a mistyped configs/NAME.yaml: the names that exist."""
  if path.parent != pathlib.Path("configs"):
    return ""
  names = ", ".join(sorted(file.stem for file in _shipped().glob("*.yaml")))
  return f"; the package ships configs/NAME.yaml for {names}"


def _resolve_shipped(path: pathlib.Path) -> pathlib.Path:
  shipped = _shipped() / path.name
  is_shipped = path.parent == pathlib.Path("configs") and shipped.is_file()
  return shipped if is_shipped and not path.exists() else path


def _read(path: pathlib.Path, seen: tuple[pathlib.Path, ...]) -> dict[str, Any]:
  if path.resolve() in seen:
    raise ConfigError(f"{path}: extends itself through {' -> '.join(map(str, seen))}")
  try:
    tree = yaml.load(path.read_text(), _UniqueKeys) or {}
  except FileNotFoundError:
    raise ConfigError(f"{path}: no such config file{_alternatives(path)}") from None
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f"{path}: cannot be read: {error}") from None
  except yaml.YAMLError as error:
    raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
  if not isinstance(tree, dict):
    raise ConfigError(f"{path}: a config is a mapping of keys, not {type(tree).__name__}")
  base = tree.pop("extends", None)
  if base is None:
    return tree
  return _merge(_read(path.parent / str(base), (*seen, path.resolve())), tree)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
  both = dict(base)
  for key, value in over.items():
    old = both.get(key)
    both[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
  return both


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
  if dotted not in fields():
    near = nearest(dotted)
    raise ConfigError(f"unknown key {dotted!r}" + (f"; did you mean {near!r}?" if near else ""))
  *path, leaf = dotted.split(".")
  for part in path:
    tree = tree.setdefault(part, {})
    if not isinstance(tree, dict):
      raise ConfigError(f"{dotted}: {part!r} is not a section in the config file")
  tree[leaf] = value
