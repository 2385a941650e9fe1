"""A checkpoint folder: config.json, tokenizer.json, and safetensors files, indexed or one alone.

Files are opened when a tensor in them is first asked for, so a folder that holds only the shards
with the memory is enough.
"""

import os
import pathlib
from typing import Any

import numpy as np
import tokenizers

from engram_jax.errors import ConfigError, StorageError
from engram_jax.interop.safetensors import Tensor, TensorFile, parse_object

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_JSON_BYTES = 256 << 20


class Folder:
  """A folder open for reading; a context manager.

  Attributes:
    path: of the folder.
    config: config.json.
    names: of all tensors, of the shards that are not here too.

  Raises ConfigError where it is no checkpoint folder, or its index names a file outside it;
  StorageError where a file is damaged.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self._open: dict[str, TensorFile] = {}
    if not (self.path / CONFIG).is_file():
      raise ConfigError(f"{self.path}: no {CONFIG} there; give the folder of a checkpoint")
    self.config = self._json(CONFIG)
    self._file_of = self._index()

  def __enter__(self) -> "Folder":
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def close(self) -> None:
    for file in self._open.values():
      file.close()
    self._open.clear()

  @property
  def names(self) -> list[str]:
    return list(self._file_of)

  @property
  def bytes_read(self) -> int:
    """From tensor files so far, headers included."""
    return sum(file.bytes_read for file in self._open.values())

  def __contains__(self, name: str) -> bool:
    return name in self._file_of

  def tensor(self, name: str) -> Tensor:
    """Dtype and shape. ConfigError where there is no such tensor, StorageError without its file."""
    return self._file(name).tensors[name]

  def check(self, name: str, dtype: str | tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
    """The tensor, refused with both values (ConfigError) unless it is of a dtype and this shape."""
    found = self.tensor(name)
    allowed = (dtype,) if isinstance(dtype, str) else dtype
    if found.dtype not in allowed or found.shape != shape:
      raise ConfigError(
        f"{self.path}: {name} is {found.dtype}{list(found.shape)}, but the config asks for "
        f"{' or '.join(allowed)}{list(shape)}"
      )
    return found

  def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Entries [start, stop) of a tensor's leading axis."""
    return self._file(name).read(name, start, stop)

  def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
    """Entries of a tensor's leading axis by id."""
    return self._file(name).rows(name, ids)

  def tokenizer(self, vocab_size: int) -> tokenizers.Tokenizer:
    """The tokenizer, without the truncation and padding that many a tokenizer.json asks for.

    Raises ConfigError where it is none, or has an id that a vocabulary of that size has not.
    """
    text = self._text(TOKENIZER)
    try:
      tokenizer = tokenizers.Tokenizer.from_str(text.decode())
    except Exception as error:  # tokenizers raises bare Exception for whatever it cannot parse
      raise ConfigError(f"{self.path / TOKENIZER}: not a tokenizer.json: {error}") from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab_size:
      raise ConfigError(
        f"{self.path}: {TOKENIZER} has the token id {largest:,} but vocab_size={vocab_size:,}"
      )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

  def _file(self, name: str) -> TensorFile:
    if name not in self._file_of:
      raise ConfigError(f"{self.path} has no tensor {name}")
    file = self._file_of[name]
    if file not in self._open:
      if not (self.path / file).is_file():
        raise StorageError(f"{self.path / file} is missing: the index says that it holds {name}")
      self._open[file] = TensorFile(self.path / file)
    if name not in self._open[file].tensors:
      raise StorageError(f"{self.path / file} holds no {name}, which the index says it does")
    return self._open[file]

  def _index(self) -> dict[str, str]:
    """{tensor: file}."""
    if not (self.path / INDEX).is_file():
      if not (self.path / SINGLE).is_file():
        raise ConfigError(f"{self.path}: neither {INDEX} nor {SINGLE} there")
      self._open[SINGLE] = TensorFile(self.path / SINGLE)
      return dict.fromkeys(self._open[SINGLE].tensors, SINGLE)
    weight_map = self._json(INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
      raise StorageError(f"{self.path / INDEX}: weight_map is not an object")
    for name, file in weight_map.items():
      plain = isinstance(file, str) and file.endswith(".safetensors") and file == _plain(file)
      if not plain:
        raise ConfigError(
          f"{self.path / INDEX}: {name} is said to be in {file!r}: "
          "the name of a .safetensors file in the same folder is expected"
        )
    return weight_map

  def _json(self, name: str) -> dict[str, Any]:
    return parse_object(self._text(name), str(self.path / name))

  def _text(self, name: str) -> bytes:
    path = self.path / name
    try:
      size = path.stat().st_size
      if size > _MAX_JSON_BYTES:
        raise StorageError(f"{path} has {size:,} bytes: at most {_MAX_JSON_BYTES:,}")
      return path.read_bytes()
    except FileNotFoundError:
      raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
      raise StorageError(f"{path} cannot be read: {error.strerror}") from None


def _plain(name: str) -> str:
  """The last part of a path, by the rules of any system."""
  return name.replace("\\", "/").rsplit("/", 1)[-1].replace("\0", "").lstrip(".")
