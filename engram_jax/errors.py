"""Errors by kind, and the exit code that each leaves with.

0 done, 2 bad configuration or input, 3 data, 4 non-finite, 5 storage, 6 another process of the run
was lost, 75 stopped by a signal after saving (sysexits' EX_TEMPFAIL: run the same command again).
"""

EXIT_STOPPED = 75


class EngramError(Exception):
  """An error that a user can act on: the message names the field, the value and what is valid."""

  exit_code = 1


class ConfigError(EngramError, ValueError):
  """A bad configuration or input, found before anything ran or was written."""

  exit_code = 2


class DataError(EngramError):
  """A source that cannot be fetched, read, or holds nothing to train on."""

  exit_code = 3


class NonFiniteError(EngramError):
  """Too many successive steps with a loss or a gradient that is not finite."""

  exit_code = 4


class StorageError(EngramError):
  """A checkpoint or table file that is damaged, missing, or cannot be written."""

  exit_code = 5


class NoUsableCheckpoint(StorageError):
  """A run of which steps were saved, and none can be used."""


class LostProcessError(EngramError):
  """Another process of the run has died, is stopped, or cannot be reached."""

  exit_code = 6
