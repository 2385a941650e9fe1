"""Tiny wheels, npm archives and Debian packages, as the corpora's readers take them."""

import io
import pathlib
import shutil
import subprocess
import tarfile
import zipfile

import pytest

from engram_jax.data.corpora.archives import Deb

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")


def quiet(line: str) -> None:
  del line


def wheel(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  with zipfile.ZipFile(path, "w") as archive:
    for name, contents in files.items():
      archive.writestr(name, contents)
  return path


def npm(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  with tarfile.open(path, "w:gz") as archive:
    for name, contents in files.items():
      member = tarfile.TarInfo(f"package/{name}")
      member.size = len(contents)
      archive.addfile(member, io.BytesIO(contents))
  return path


def deb(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  root = path.parent / f".{path.stem}"
  name, version, _ = path.stem.split("_")
  control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: N <n@e.org>\n"
  for file, contents in (files | {"DEBIAN/control": f"{control}Description: d\n".encode()}).items():
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_bytes(contents)
  subprocess.run(["dpkg-deb", "--build", root, path], check=True, capture_output=True)
  shutil.rmtree(root)
  return path


SOME = Deb("some-doc-1", r"some-doc-\d+")
