"""Secrets in the environment reach no file that is written, no export and nothing that is said."""

import base64
import gzip
import pathlib

import pytest

from engram_jax import __main__ as package
from engram_jax.commands.serve import API_KEY

SECRET = "s3cret-7f0e9c1d5b8a"
NAMES = (API_KEY, "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY")
NAMES += ("GOOGLE_APPLICATION_CREDENTIALS_JSON", "PIP_INDEX_URL", "OPENAI_API_KEY")


def spellings() -> list[bytes]:
  """The secret as it is, and as it would look in what encodes, escapes or reverses it."""
  plain = SECRET.encode()
  encoded = [base64.b64encode(bytes(i) + plain)[4:-4] for i in range(3)]
  return [plain, plain.hex().encode(), plain[::-1], SECRET.encode("utf-16-le"), *encoded]


def holders(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files below a folder that hold the secret, in their names, as they are or unpacked."""
  found = []
  for path in folder.rglob("*"):
    content = path.read_bytes() if path.is_file() else b""
    if content[:2] == b"\x1f\x8b":
      content += gzip.decompress(content)
    if SECRET in path.name or any(text in content for text in spellings()):
      found.append(path)
  return found


@pytest.fixture(scope="module")
def said(lab):
  """What a training, its resumption, a refusal, an eval, exports and an inspection printed."""
  runs = lab.folder / "runs"
  with pytest.MonkeyPatch.context() as patched:
    for name in NAMES:
      patched.setenv(name, SECRET)
    patched.setenv("XDG_CACHE_HOME", str(lab.folder / "cache"))
    short = ("--train.steps", "2", "--train.checkpoint_every", "1", "--train.profile", "1:1")
    done = [
      (0, lab.training(runs, *short)),
      (0, lab.training(runs, *short)),
      (2, lab.training(runs, *short, "--train.seed", "7")),
      (2, lab.training(runs, "--data.path", "nowhere", "--run.name", "other")),
      (0, lab.evaluation(runs / "t", "--json", "--tokens", "2", "--prompt", "def")),
      (2, lab.evaluation(runs / "nobody")),
    ]
    convert = ("convert", "export", "--run", runs / "t", "--json", "--to")
    done.append((0, lab.run(package, *convert, lab.folder / "exported")))
    table = ("convert", "table", "--run", runs / "t", "--to", lab.folder / "rows.table")
    done.append((0, lab.run(package, *table)))
  for code, result in done:
    assert result.code == code, result.err
  return [text for _, result in done for text in (result.out, result.err)]


def test_no_file_holds_a_secret(lab, said):
  assert len([path for path in lab.folder.rglob("*") if path.is_file()]) > 20
  assert holders(lab.folder) == []
  assert holders(lab.config.parent) == []  # the corpus's cache, tokenizer and token maps


def test_nothing_said_holds_a_secret(said):
  assert any(said)
  for text in said:
    assert not [spelling for spelling in spellings() if spelling in text.encode()]


@pytest.mark.parametrize("spelling", spellings())
def test_a_file_that_holds_one_is_found(tmp_path, spelling):
  (tmp_path / "a").write_bytes(b"..." + spelling + b"...")
  (tmp_path / "b.gz").write_bytes(gzip.compress(b"..." + spelling))
  (tmp_path / "c").write_bytes(spelling[:-4])
  assert {path.name for path in holders(tmp_path)} == {"a", "b.gz"}


def test_a_secret_that_was_encoded_with_others_is_found(tmp_path):
  for before in ("", "x", "xx"):
    (tmp_path / "a").write_bytes(base64.b64encode(f"{before}{SECRET} more".encode()))
    assert holders(tmp_path)
