"""Every token of a corpus is covered by its digest, which is taken once."""

import json
import os

import numpy as np
import pytest

from engram_jax.data import split_digest as module
from engram_jax.data.split_digest import FILES, split_digest
from engram_jax.errors import StorageError


@pytest.fixture
def split(tmp_path):
  folder = tmp_path / "corpus" / "training"
  folder.mkdir(parents=True)
  np.save(folder / "tokens.npy", np.arange(5000, dtype=np.uint16))
  np.save(folder / "offsets.npy", np.array([0, 5000]))
  np.save(folder / "sources.npy", np.array([0], np.int32))
  return folder


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.3, 0.999])
def test_one_changed_byte_is_noticed(split, name, place):
  """A sample of one token in 1,021 let 8,333 changed tokens pass."""
  split_digest(split)
  content = bytearray((split / name).read_bytes())
  content[int(place * len(content))] ^= 1
  (split / name).write_bytes(content)
  with pytest.raises(StorageError, match=r"its tokens have changed since they were written"):
    split_digest(split)


def test_it_is_read_once_and_again_where_a_file_looks_changed(split, monkeypatch):
  read = []
  digest = module._digest
  monkeypatch.setattr(module, "_digest", lambda folder: read.append(folder) or digest(folder))
  first = split_digest(split)
  assert split_digest(split) == first
  assert len(read) == 1
  os.utime(split / "tokens.npy")  # copied, say, to another disk
  assert split_digest(split) == first
  assert split_digest(split) == first
  assert len(read) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"sha256": 5, "files": {}}', '{"sha256": ""}'])
def test_a_damaged_digest_is_told(split, content):
  (split / module.NAME).write_text(content)
  with pytest.raises(StorageError, match=r"digest.json is damaged; delete \S+corpus and it"):
    split_digest(split)


def test_a_missing_file_is_told(split):
  (split / "sources.npy").unlink()
  with pytest.raises(StorageError, match="cannot be read"):
    split_digest(split)


def test_the_digest_is_kept_with_sizes_and_times(split):
  digest = split_digest(split)
  kept = json.loads((split / module.NAME).read_text())
  assert kept["sha256"] == digest
  status = (split / "tokens.npy").stat()
  assert kept["files"]["tokens.npy"] == [status.st_size, status.st_mtime_ns]
