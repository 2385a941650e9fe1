"""The command line: `--config FILE` and any field by its dotted path, and the exit codes.

tyro makes the options, help and spelling suggestions from the config's fields; it builds plain
dicts, so that every check and message is config's own.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import pydantic
import tyro
from tyro.constructors import (
  ConstructorRegistry,
  StructConstructorSpec,
  StructFieldSpec,
  StructTypeInfo,
)

from engram_jax.config import Config, build, load_config
from engram_jax.errors import ConfigError, EngramError

DEFAULT_CONFIG = "configs/tiny.yaml"


def parse_config(prog: str, description: str, args: Sequence[str] | None = None) -> Config:
  """The config of `--config FILE` (default configs/tiny.yaml) with the other options laid over it.

  Raises ConfigError for values that contradict; leaves with code 2 for words it does not know.
  """
  first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  first.add_argument("--config", default=DEFAULT_CONFIG)
  known, rest = first.parse_known_args(args)
  _refuse_repeated(rest)
  base = load_config(known.config)
  about = f"{description}\n\n--config FILE sets the defaults below (now: {known.config})."
  tree = tyro.cli(
    Config,
    prog=prog,
    description=about,
    args=rest,
    default=base,
    registry=_plain_dicts(),
    config=(tyro.conf.FlagConversionOff,),  # `--field True`, as for every other field
  )
  return build(tree, where="command line")


def _refuse_repeated(args: Sequence[str]) -> None:
  """An option given twice contradicts itself; the parser would take the last without a word."""
  seen = set()
  for word in args:
    name = word.split("=", 1)[0].replace("-", "_")
    if word.startswith("--") and name in seen:
      raise ConfigError(f"command line: {word.split('=', 1)[0]} is given twice: give it once")
    seen.add(name)


def run_command(main: Callable[[], int | None]) -> None:
  """Runs `main` and leaves with its code; a user's mistake is one message, not a traceback."""
  try:
    code = main() or 0
  except EngramError as error:
    print(f"error: {error}", file=sys.stderr)
    code = error.exit_code
  except BrokenPipeError:  # the reader of our output has gone (`| head`): nothing left to say
    code = 0
    sys.stderr.close()
  sys.exit(code)


def _plain_dicts() -> ConstructorRegistry:
  registry = ConstructorRegistry()

  @registry.struct_rule
  def config_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    kind = info.type
    if not (isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)):
      return None
    fields = tuple(
      StructFieldSpec(name, field.annotation, getattr(info.default, name), field.description or "")
      for name, field in kind.model_fields.items()
    )
    return StructConstructorSpec(instantiate=lambda **values: values, fields=fields)

  return registry
