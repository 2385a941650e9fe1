"""Configs from YAML files that extend one another, and errors that name what would be valid.

Of YAML a config needs mappings, lists and plain values, so no more is read: no aliases or merges,
which can make a few bytes a tree without end (`extends` says what is shared), no tags, no keys that
are no text. A file is small, and its tree shallow.
"""

import difflib
import pathlib
from typing import Any

import pydantic
import yaml

from engram_jax.config.bounded import cut, read_bounded, shorten
from engram_jax.config.run import Config
from engram_jax.errors import ConfigError

MAX_BYTES = 64 << 10  # of a file: a config with every field written out has 5,000
MAX_NODES = 5000  # of its tree: keys, values, lists and mappings
MAX_DEPTH = 16
MAX_NAME = 1024  # characters, of a file
MAX_CHAIN = 16  # files that extend one another
MAX_MISTAKES = 20  # named in one message
MAX_MESSAGE = 400  # characters of a mistake


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
  mistakes = error.errors(include_url=False)
  lines = [_explain(item, where) for item in mistakes[:MAX_MISTAKES]]
  if len(mistakes) > MAX_MISTAKES:
    lines.append(f"{where}: and {len(mistakes) - MAX_MISTAKES:,} more mistakes")
  return "\n".join(lines)


def _explain(item: Any, where: str) -> str:
  loc = ".".join(map(str, item["loc"]))
  if item["type"] == "extra_forbidden":
    near = nearest(loc)
    return f"{where}: unknown key {shorten(loc)}" + (f"; did you mean {near!r}?" if near else "")
  message = cut(item["msg"].removeprefix("Value error, "), MAX_MESSAGE)
  is_section = isinstance(item["input"], dict | pydantic.BaseModel)
  value = "" if is_section else f" (got {shorten(item['input'])})"
  return f"{where}: {cut(loc, MAX_MESSAGE) or 'config'}: {message}{value}"


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
  key = key[:MAX_MESSAGE]
  leaf = key.rsplit(".", 1)[-1]
  close = difflib.get_close_matches(key, known, len(known), 0.6)
  same_leaf = [name for name in close if name.rsplit(".", 1)[-1] == leaf]  # in the wrong section
  if close:
    return (same_leaf or close)[0]
  by_leaf = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
  leaves = difflib.get_close_matches(leaf, list(by_leaf), 1, 0.6)
  return by_leaf[leaves[0]] if leaves else None


class _UniqueKeys(yaml.SafeLoader):
  """YAML's safe loader without what no config needs, which refuses the second of two equal keys."""

  def __init__(self, text: str):
    super().__init__(text)
    self._depth = self._nodes = 0

  def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
    event = self.peek_event()
    if isinstance(event, yaml.AliasEvent):
      raise _refusal(f"the alias *{event.anchor}: write the value again, or use `extends`", event)
    if getattr(event, "tag", None):
      raise _refusal(f"the tag {event.tag}: give a plain value", event)
    self._nodes += 1
    if self._nodes > MAX_NODES:
      raise _refusal(f"more than {MAX_NODES:,} values", event)
    if self._depth > MAX_DEPTH:
      raise _refusal(f"values more than {MAX_DEPTH} deep", event)
    self._depth += 1
    node = super().compose_node(parent, index)
    self._depth -= 1
    if isinstance(node, yaml.ScalarNode) and "\0" in node.value:  # no file's name has one
      raise _refusal("a text with NUL", event)
    return node

  def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
      if key.tag != "tag:yaml.org,2002:str":
        shown = shorten(key.value) if isinstance(key, yaml.ScalarNode) else "of several values"
        raise _refusal(f"the key {shown}, which is no text", key)
      if key.value in seen:
        raise yaml.YAMLError(f"key {shorten(key.value)} stands twice, again{key.start_mark}")
      seen.add(key.value)
    return super().construct_mapping(node, deep)


def _refusal(what: str, at: Any) -> yaml.YAMLError:
  """The error about an event or a node."""
  return yaml.YAMLError(f"{cut(what, MAX_MESSAGE)}{at.start_mark}")


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
  tree = _parse(path)
  base = tree.pop("extends", None)
  if base is None:
    return tree
  if not isinstance(base, str) or not base.isprintable() or not 0 < len(base) <= MAX_NAME:
    raise ConfigError(f"{path}: extends: the name of a file is expected (got {shorten(base)})")
  seen, other = (*seen, path), path.parent / base
  if any(_is_same(other, file) for file in seen):
    raise ConfigError(f"{other}: extends itself through {' -> '.join(map(str, seen))}")
  if len(seen) > MAX_CHAIN:
    raise ConfigError(f"{seen[0]}: extends more than {MAX_CHAIN} files, one after the other")
  return _merge(_read(other, seen), tree)


def _is_same(a: pathlib.Path, b: pathlib.Path) -> bool:
  try:
    return a.samefile(b)
  except OSError:  # which reading it will say
    return False


def _parse(path: pathlib.Path) -> dict[str, Any]:
  try:
    text = read_bounded(path, MAX_BYTES).decode("utf-8")
  except FileNotFoundError:
    raise ConfigError(f"{path}: no such config file{_alternatives(path)}") from None
  except OSError as error:
    raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
  except UnicodeDecodeError as error:
    raise ConfigError(f"{path}: cannot be read: it is not UTF-8 text: {error}") from None
  except ValueError as error:
    raise ConfigError(f"{path}: cannot be read: it {error}") from None
  try:
    tree = yaml.load(text, _UniqueKeys)
  # The other two: what looks like a number, a date or a character, and is none.
  except (yaml.YAMLError, ValueError, OverflowError) as error:
    raise ConfigError(f"{path}: not YAML: {cut(str(error), MAX_MESSAGE)}") from None
  if tree is None:  # an empty file
    return {}
  if not isinstance(tree, dict):
    raise ConfigError(f"{path}: a config is a mapping of keys, not {type(tree).__name__}")
  return tree


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
