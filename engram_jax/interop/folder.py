"""A checkpoint folder: config.json, tokenizer.json, and one safetensors file or an indexed set.

A file is opened when a tensor in it is first needed, so that a folder with only the shards of the
memory is enough. Where the folder has digests (digests.py), a file is compared with its own before
anything in it is used.
"""

import os
import pathlib
from typing import Any

import numpy as np
import tokenizers

from engram_jax.config.bounded import POINTER, is_pointer
from engram_jax.core.run_directory import CONFIG as RUN_CONFIG
from engram_jax.errors import ConfigError, StorageError
from engram_jax.interop import digests
from engram_jax.interop.safetensors import SafetensorsFile, TensorInfo, parse_object
from engram_jax.memory.vocabulary import failures_as

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_MAX_JSON_BYTES = 256 << 20


class Folder:
  """A folder open for reading; a context manager.

  Attributes:
    path: of the folder.
    config: its config.json.
    caveat: one line that says why files are not verified; None where they are.

  Raises ConfigError where it is no checkpoint folder or its index names a file outside it,
  StorageError where a file is damaged, or missing, added or changed since SHA256SUMS was written.
  """

  def __init__(self, path: str | os.PathLike, *, verify: bool = True):
    """Opens a folder; verify=False does not compare its files with its SHA256SUMS."""
    self.path = pathlib.Path(path)
    self._open: dict[str, SafetensorsFile] = {}
    self._digests = digests.read_digests(self.path) if verify else None
    self._verified: set[str] = set()
    self._bytes_verified = 0  # of tensor files
    self.caveat = None
    if not verify:
      self.caveat = f"{self.path} is not compared with its {digests.NAME}: nothing is verified"
    elif self._digests is None:
      self.caveat = f"{self.path} has no {digests.NAME}: nothing is verified"
    if not (self.path / CONFIG).is_file():
      is_run = (self.path / RUN_CONFIG).is_file()
      advice = "give the folder of a checkpoint"
      if is_run:
        advice = f"it is a run: `convert export --run {self.path} --to FOLDER` makes such a folder"
      raise ConfigError(f"{self.path}: no {CONFIG} there; {advice}")
    self.config = self._read_json(CONFIG)
    self._file_of = self._read_index()

  def __enter__(self) -> "Folder":
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def close(self) -> None:
    """Closes the files that were opened."""
    for file in self._open.values():
      file.close()
    self._open.clear()

  @property
  def names(self) -> list[str]:
    """Names of all tensors, also of those whose files are missing."""
    return list(self._file_of)

  @property
  def bytes_read(self) -> int:
    """Bytes read from tensor files so far, with their headers and for their verification."""
    return self._bytes_verified + sum(file.bytes_read for file in self._open.values())

  def verify(self) -> None:
    """Compares all files with their digests, if there are any; StorageError names one that has
    changed."""
    for name in self._digests or ():
      self._require_unchanged(name)

  def __contains__(self, name: str) -> bool:
    return name in self._file_of

  def tensor(self, name: str) -> TensorInfo:
    """A tensor's dtype and shape; ConfigError for an unknown one, StorageError without its file."""
    return self._file(name).tensors[name]

  def check(self, name: str, dtype: str | tuple[str, ...], shape: tuple[int, ...]) -> None:
    """Raises ConfigError unless a tensor has the dtype, or one of them, and the shape."""
    tensor = self.tensor(name)
    dtypes = (dtype,) if isinstance(dtype, str) else dtype
    if tensor.dtype not in dtypes or tensor.shape != shape:
      raise ConfigError(
        f"{self.path}: {name} is {tensor.dtype}{list(tensor.shape)}, but the config asks for "
        f"{' or '.join(dtypes)}{list(shape)}"
      )

  def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Reads entries [start, stop) of a tensor's leading axis; all of a tensor if left out."""
    return self._file(name).read(name, start, stop)

  def read_rows(self, name: str, ids: np.ndarray) -> np.ndarray:
    """Reads entries of a tensor's leading axis by id, [*ids.shape, *shape[1:]]."""
    return self._file(name).read_rows(name, ids)

  def tokenizer(self, vocab_size: int) -> tokenizers.Tokenizer:
    """The tokenizer, without the truncation and padding that its file may ask for.

    Raises ConfigError where the file is no tokenizer, or has an id of `vocab_size` or more.
    """
    text = self._read_bytes(TOKENIZER)
    where = self.path / TOKENIZER
    with failures_as(lambda message: ConfigError(f"{where}: not a tokenizer.json: {message}")):
      tokenizer = tokenizers.Tokenizer.from_str(text.decode())
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab_size:
      raise ConfigError(
        f"{self.path}: {TOKENIZER} has the token id {largest:,} but vocab_size={vocab_size:,}"
      )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

  def _file(self, name: str) -> SafetensorsFile:
    if name not in self._file_of:
      raise ConfigError(f"{self.path} has no tensor {name}")
    file = self._file_of[name]
    if file not in self._open:
      if not (self.path / file).is_file():
        raise StorageError(f"{self.path / file} is missing: the index says that it holds {name}")
      self._open_file(file)
    if name not in self._open[file].tensors:
      raise StorageError(f"{self.path / file} holds no {name}, which the index says it does")
    return self._open[file]

  def _open_file(self, name: str) -> None:
    self._require_unchanged(name)
    self._open[name] = SafetensorsFile(self.path / name)

  def _require_unchanged(self, name: str) -> None:
    """Compares a file with its digest, if it has one and was not compared before."""
    if self._digests is None or name in self._verified:
      return
    size = digests.require_digest(self.path / name, self._digests[name])
    self._verified.add(name)
    self._bytes_verified += size if name.endswith(".safetensors") else 0

  def _read_index(self) -> dict[str, str]:
    """The name of each tensor's file, by tensor."""
    if not (self.path / INDEX).is_file():
      if not (self.path / SINGLE_FILE).is_file():
        raise ConfigError(f"{self.path}: neither {INDEX} nor {SINGLE_FILE} there")
      self._open_file(SINGLE_FILE)
      return dict.fromkeys(self._open[SINGLE_FILE].tensors, SINGLE_FILE)
    weight_map = self._read_json(INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
      raise StorageError(f"{self.path / INDEX}: weight_map is not an object")
    for name, file in weight_map.items():
      is_valid = isinstance(file, str) and file.endswith(".safetensors") and _is_file_name(file)
      if not is_valid:
        raise ConfigError(
          f"{self.path / INDEX}: {name} is said to be in {file!r}: "
          "the name of a .safetensors file in the same folder is expected"
        )
    return weight_map

  def _read_json(self, name: str) -> dict[str, Any]:
    return parse_object(self._read_bytes(name), str(self.path / name))

  def _read_bytes(self, name: str) -> bytes:
    path = self.path / name
    try:
      size = path.stat().st_size
      if size > _MAX_JSON_BYTES:
        raise StorageError(f"{path} has {size:,} bytes: at most {_MAX_JSON_BYTES:,}")
      self._require_unchanged(name)
      content = path.read_bytes()
      if is_pointer(content):
        raise StorageError(f"{path} {POINTER}")
      return content
    except FileNotFoundError:
      raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
      raise StorageError(f"{path} cannot be read: {error.strerror}") from None


def _is_file_name(name: str) -> bool:
  """Says whether a name stays in its folder by the rules of any system, and is not hidden."""
  return not (set(name) & {"/", "\\", "\0"} or name.startswith("."))
