"""Thousands of changed configs, manifests, headers and metrics: each is read, or refused as told.

Changes are of the tree that a file holds, written again with right digests and lengths, and of its
bytes. The long form, `-m slow`, makes a hundred thousand.
"""

import contextlib
import hashlib
import io
import json
import pathlib
import random
import traceback
from collections.abc import Callable

import jax
import pytest
import yaml
from conftest import TINY
from mutations import dump, mutate, mutate_bytes

from engram_jax.config import Config, build, load_config
from engram_jax.core import manifest
from engram_jax.core.metrics import NAME, MetricsWriter
from engram_jax.core.saved_arrays import require_compatible
from engram_jax.errors import ConfigError, StorageError
from engram_jax.inference.stores.table_file import MAGIC, PREFIX, VERSION, TableHeader, read_header
from engram_jax.interop.safetensors import SafetensorsFile
from engram_jax.memory.hash_layout import HashLayout
from engram_jax.memory.vocabulary import check_fingerprint
from engram_jax.tables.saved_run import SavedRun

SHORT, LONG = 500, 12_500  # cases of each of eight targets
CONFIG = build(TINY | {"data": TINY["data"] | {"path": "text"}}, "tiny")
LAYOUT = HashLayout.build("engram", [1], 101, 3, 2, 236, 2)
META = {
  "tokenizer_digest": "1" * 64,
  "token_map_digest": "2" * 64,
  "hash_layout_digest": LAYOUT.digest,
  "hash_layout": LAYOUT.describe(),
  "corpus_digest": "3" * 64,
}
Case = Callable[[random.Random], None]


class Target:
  """One kind of file: `case` changes it and reads it; `errors` are what reading may raise."""

  longest = 2000  # characters of a line that is said

  def __init__(self, folder: pathlib.Path):
    self.path = folder / "file"

  def written(self, content: bytes) -> pathlib.Path:
    self.path.write_bytes(content)
    return self.path


class ConfigTree(Target):
  errors = ConfigError

  def case(self, rng: random.Random) -> None:
    build(mutate(rng, rng.choice([TINY, CONFIG.model_dump(mode="json")])), "tree")


class ConfigFile(Target):
  errors = ConfigError

  def case(self, rng: random.Random) -> None:
    names = rng.sample(list(TINY), 2)
    part = {name: TINY[name] for name in names}
    if rng.random() < 0.1:
      part["extends"] = "file"
    changed = mutate(rng, part) if rng.random() < 0.5 else part
    text = yaml.safe_dump(changed, default_flow_style=rng.choice([True, False])).encode()
    load_config(self.written(text if rng.random() < 0.3 else mutate_bytes(rng, text)))


class Manifest(Target):
  """With a right digest; what is read is used as a run that goes on does."""

  errors = (ConfigError, StorageError)

  def __init__(self, folder: pathlib.Path):
    super().__init__(folder)
    self.folder = folder
    (folder / "state").mkdir()
    (folder / "state" / "a").write_bytes(b"rows")
    tree = {"params/w": "float32[2,3]", "tables/0": "float32[464,4]"}
    self.content = manifest.build(folder, step=8, tree=tree, meta=META)
    self.like = {name: jax.ShapeDtypeStruct((2, 3), "float32") for name in tree}

  def case(self, rng: random.Random) -> None:
    content = mutate(rng, self.content)
    stored = {"digest": "", "content": content}
    with contextlib.suppress(ValueError):  # infinity has no digest
      stored["digest"] = manifest._digest(content)
    text = dump(stored)
    (self.folder / manifest.NAME).write_bytes(text)
    problem = manifest.examine(self.folder)
    if problem is not None:
      assert len(problem.message) < 1000 + len(str(self.folder))
      return
    content = manifest.read(self.folder)
    check_fingerprint(content["meta"], {}, "run")
    _ = SavedRun(self.folder, CONFIG, None, content["step"], content["meta"], None).layout
    require_compatible(self.folder, content["tree"], self.like, False, {"tables/0": 464})


class ManifestBytes(Manifest):
  def case(self, rng: random.Random) -> None:
    text = mutate_bytes(rng, dump({"digest": "0" * 64, "content": self.content}))
    (self.folder / manifest.NAME).write_bytes(text)
    problem = manifest.examine(self.folder)
    assert problem is not None
    assert problem.kind in ("damaged", "unreadable")


class Description(Target):
  errors = ValueError

  def case(self, rng: random.Random) -> None:
    HashLayout.from_description(mutate(rng, LAYOUT.describe()))


class TableFile(Target):
  """A header with a right digest and length, before rows that are not there."""

  errors = StorageError
  longest = 20_000  # it names every field that is wrong

  def case(self, rng: random.Random) -> None:
    header = TableHeader.plan(LAYOUT, "2" * 64, "f32", 4)
    if rng.random() < 0.8:
      text = dump(mutate(rng, header.model_dump(mode="json")))
      content = PREFIX.pack(MAGIC, VERSION, len(text), hashlib.sha256(text).digest()) + text
    else:
      content = mutate_bytes(rng, header.to_bytes())
    file = io.FileIO(self.written(content), "r+")
    with file:
      file.truncate(max(len(content), header.file_bytes))
      read_header(file, "table")


class Safetensors(Target):
  errors = StorageError

  def case(self, rng: random.Random) -> None:
    header = {
      "__metadata__": {"format": "np"},
      "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
      "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    if rng.random() < 0.8:
      text = dump(mutate(rng, header))
      content = len(text).to_bytes(8, "little") + text + bytes(32)
    else:
      text = dump(header)
      content = mutate_bytes(rng, len(text).to_bytes(8, "little") + text + bytes(32))
    with SafetensorsFile(self.written(content)) as file:
      for name, tensor in file.tensors.items():
        if tensor.dtype in ("F32", "BF16"):
          file.read(name)


class Metrics(Target):
  """The lines that a resumed run reads: the steps up to the checkpoint's stay."""

  errors = StorageError

  def __init__(self, folder: pathlib.Path):
    self.path = folder / NAME

  def case(self, rng: random.Random) -> None:
    lines = [{"step": i, "loss": 4.5 - i, "nonfinite": {"x": "nan"}} for i in range(4)]
    i = rng.randrange(4)
    if rng.random() < 0.7:
      lines[i] = mutate(rng, lines[i])
    text = b"".join(dump(line) + b"\n" for line in lines)
    self.written(text if rng.random() < 0.6 else mutate_bytes(rng, text))
    MetricsWriter(self.path.parent, tensorboard=False, resume_step=2).close()
    for line in self.path.read_bytes().splitlines():
      assert json.loads(line)["step"] <= 2


TARGETS = [ConfigTree, ConfigFile, Manifest, ManifestBytes, Description, TableFile, Safetensors]
TARGETS += [Metrics]


def crashes(target: Target, cases: int) -> list[str]:
  """The errors that reading a file does not promise, one for each place, with the seed of each."""
  found: dict[str, str] = {}
  for seed in range(cases):
    try:
      target.case(random.Random(seed))
    except target.errors as error:
      text = str(error)
      if not text or max(map(len, text.splitlines())) > target.longest:
        found.setdefault("length", f"seed {seed}: a message of {len(text)} characters")
    except Exception as error:
      last = traceback.extract_tb(error.__traceback__)[-1]
      found.setdefault(
        f"{last.filename}:{last.lineno}", f"seed {seed}: {type(error).__name__}: {error!s:.200}"
      )
  return [f"{place}: {what}" for place, what in found.items()]


@pytest.mark.parametrize("target", TARGETS)
def test_changed_files_are_read_or_refused(tmp_path, target):
  assert crashes(target(tmp_path), SHORT) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_hundred_thousand_changed_files_are_read_or_refused(tmp_path, target):
  assert crashes(target(tmp_path), LONG) == []


def test_the_unchanged_files_are_read(tmp_path):
  """So that refusals are of the changes."""
  assert Config.model_validate(CONFIG.model_dump(mode="json")) == CONFIG
  assert HashLayout.from_description(LAYOUT.describe()) == LAYOUT
  target = Manifest(tmp_path)
  manifest.write(tmp_path, target.content)
  assert manifest.examine(tmp_path) is None
  check_fingerprint(META, META, "run")
  assert SavedRun(tmp_path, CONFIG, None, 8, META, None).layout == LAYOUT
