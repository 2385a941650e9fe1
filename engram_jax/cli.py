"""The command line: `--config FILE` and any field by its dotted path, kinds, and the exit codes.

tyro makes the options, help and spelling suggestions from the config's fields; it builds plain
dicts, so that every check and message is config's own.
"""

import argparse
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pydantic
import tyro
from tyro.constructors import (
  ConstructorRegistry,
  StructConstructorSpec,
  StructFieldSpec,
  StructTypeInfo,
)

from engram_jax.config import Config, build, load_config
from engram_jax.config.bounded import shorten
from engram_jax.config.model import require_unicode
from engram_jax.core import watchdog
from engram_jax.core.run_advice import CONFIG, TOKENIZER, advise
from engram_jax.core.terminal import flush_streams, prepare_streams
from engram_jax.errors import EXIT_STOPPED, ConfigError, EngramError

DEFAULT_CONFIG = "configs/tiny.yaml"


def parse_config(prog: str, description: str, argv: Sequence[str] | None = None) -> Config:
  """The config of `--config FILE` (default configs/tiny.yaml) with the other options laid over it.

  Without `--config`, `--train.init_from RUN` sets the model section and tokenizer of that run.

  Raises ConfigError for values that contradict; leaves with code 2 for options it does not know.
  """
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  parser.add_argument("--config")
  args, options = parser.parse_known_args(argv)
  _check_unrepeated(options)
  default, origin = _defaults(args.config, _value_of("--train.init_from", options))
  about = f"{description}\n\n--config FILE sets the defaults below (now: {origin})."
  tree = tyro.cli(
    Config,
    prog=prog,
    description=about,
    args=options,
    default=default,
    registry=_dict_registry(),
    config=(tyro.conf.FlagConversionOff,),  # `--field True`, as for every other field
  )
  return build(cast(dict[str, Any], tree), where="command line")  # dicts, by the registry


def _defaults(config: str | None, init_from: str) -> tuple[Config, str]:
  """(the config that options are laid over, where it comes from)."""
  if config is not None or not init_from:
    return load_config(config or DEFAULT_CONFIG), config or DEFAULT_CONFIG
  run = pathlib.Path(init_from)
  path = run / CONFIG  # not by core.run_directory, which imports jax
  if not os.path.isfile(path):
    raise ConfigError(
      f"train.init_from={shorten(init_from, 1000)}: no config.yaml there; {advise(run)}"
    )
  saved, default = load_config(path).on_device(), load_config(DEFAULT_CONFIG)
  data = {"tokenizer": str(run / TOKENIZER), "end_of_text": saved.data.end_of_text}
  default = default.model_copy(
    update={"model": saved.model, "data": default.data.model_copy(update=data)}
  )
  return default, f"{DEFAULT_CONFIG} with the model of {init_from}"


def _value_of(name: str, options: Sequence[str]) -> str:
  """The value of an option in either form, `--a.b VALUE` or `--a.b=VALUE`; empty without it."""
  for option, following in zip(options, [*options, ""][1:], strict=True):
    given, equals, value = option.partition("=")
    if given.replace("-", "_") == name.replace("-", "_"):
      return value if equals else following
  return ""


def _check_unrepeated(options: Sequence[str]) -> None:
  """Raises ConfigError for an option given twice, of which the parser would take the last."""
  seen = set()
  for option in options:
    name = option.split("=", 1)[0].replace("-", "_")
    if option.startswith("--") and name in seen:
      raise ConfigError(f"command line: {option.split('=', 1)[0]} is given twice: give it once")
    seen.add(name)


def _dict_registry() -> ConstructorRegistry:
  """tyro's rules with one more: a pydantic model is built as a dict of its fields."""
  registry = ConstructorRegistry()

  @registry.struct_rule
  def config_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    model = info.type
    if not (isinstance(model, type) and issubclass(model, pydantic.BaseModel)):
      return None
    fields = tuple(
      StructFieldSpec(
        name,
        cast(type, field.annotation),  # ty: any annotation will do
        getattr(info.default, name),
        field.description or "",
      )
      for name, field in model.model_fields.items()
    )
    return StructConstructorSpec(instantiate=lambda **values: values, fields=fields)

  return registry


def run_command(main: Callable[[], int | None]) -> None:
  """Runs `main` and leaves with its code; a user's mistake is one message, not a traceback.

  With several processes, an error that comes of another's loss is reported as that.
  """
  message = ""
  prepare_streams()
  try:
    code = _run(main)
  except EngramError as error:
    watchdog.settle(error)
    message, code = str(error), error.exit_code
    print(f"error: {message}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
  except KeyboardInterrupt as error:
    watchdog.settle(error)
    print("stopped by Ctrl-C", file=sys.stderr)
    code = 128 + signal.SIGINT
  except Exception as error:
    watchdog.settle(error)
    raise
  if code not in (0, EXIT_STOPPED):
    watchdog.leave(code, message)
  sys.exit(code)


def _run(main: Callable[[], int | None]) -> int:
  """The code of `main`, also where it leaves by itself, once all that it printed is written."""
  try:
    code = main() or 0
  except SystemExit as left:  # `--help`, and options that the parser refuses
    if not isinstance(left.code, int | None):
      raise
    code = left.code or 0
  flush_streams()
  return code


def run_kind(
  command: str,
  kinds: Mapping[str, Callable[[Sequence[str]], int]],
  argv: Sequence[str],
  *,
  about: str | None,
  unknown: str,
) -> int:
  """Runs the kind of a command that its first argument names; returns the exit code.

  Args:
    command: its name on the command line.
    kinds: functions of the arguments after the kind; `--help` shows the first line of their
      docstrings.
    about: what `--help` says above the kinds.
    unknown: begins the message about a name that is no kind, for which the code is 2.
  """
  name = argv[0] if argv else "--help"
  if name in ("-h", "--help"):
    print(f"usage: python -m engram_jax {command} KIND [--help] [OPTIONS]\n\n{about}\n")
    for kind, function in kinds.items():
      print(f"  {kind:14}{(function.__doc__ or '').splitlines()[0]}")
    return 0
  if name not in kinds:
    print(f"error: {unknown} {name!r}; there are: {', '.join(kinds)}", file=sys.stderr)
    return 2
  return kinds[name](argv[1:])


def require_text(option: str, text: str) -> None:
  """Raises ConfigError for an option's value that holds bytes that are no UTF-8."""
  try:
    require_unicode(f"{option} ", text)
  except ValueError as error:
    raise ConfigError(str(error).replace(" =", " ", 1)) from None


def log(message: str) -> None:
  """Prints a line to stderr, which is for people; stdout is for results."""
  print(message, file=sys.stderr, flush=True)
