"""Take named files out of a wheel, a .deb or an npm tarball, reading bytes only.

Nothing from the archive chooses where a file lands, nothing is imported, and links are refused, so a
hostile archive can at worst fail its hash.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gossamer.core.errors import AssetError
from gossamer.data.registry import Member

CHUNK = 1 << 20
AR_MAGIC = b"!<arch>\n"
AR_HEADER = 60

Opener = Callable[[str], IO[bytes]]


def _missing(archive: Path, path: str) -> AssetError:
    return AssetError(f"{archive.name} holds no regular file {path!r}; the registry and the archive disagree")


def _zip_opener(file: zipfile.ZipFile, archive: Path) -> Opener:
    def open_member(path: str) -> IO[bytes]:
        try:
            return file.open(path)
        except KeyError as error:
            raise _missing(archive, path) from error

    return open_member


def _tar_opener(file: tarfile.TarFile, archive: Path) -> Opener:
    # Debian writes './usr/...', npm writes 'package/...'.
    infos = {info.name.removeprefix("./"): info for info in file.getmembers()}

    def open_member(path: str) -> IO[bytes]:
        info = infos.get(path)
        if info is None or not info.isreg():
            raise _missing(archive, path)
        return file.extractfile(info)

    return open_member


def deb_data(path: Path) -> IO[bytes]:
    """The data tarball inside a .deb: an `ar` archive of 60-byte headers, each body padded to even length."""
    with path.open("rb") as file:
        if file.read(len(AR_MAGIC)) != AR_MAGIC:
            raise AssetError(f"{path.name} is not a Debian package; remove it and fetch again")
        while len(header := file.read(AR_HEADER)) == AR_HEADER:
            name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
            if name.startswith("data.tar"):
                return io.BytesIO(file.read(size))
            file.seek(size + size % 2, io.SEEK_CUR)
    raise AssetError(f"{path.name} holds no data.tar; remove it and fetch again")


@contextmanager
def _opened(archive: Path):
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as file:
            yield _zip_opener(file, archive)
    elif archive.suffix == ".deb":
        with tarfile.open(fileobj=deb_data(archive)) as file:
            yield _tar_opener(file, archive)
    else:
        with tarfile.open(archive) as file:
            yield _tar_opener(file, archive)


def _copy(source: IO[bytes], *, target: Path, member: Member) -> None:
    digest, left = hashlib.sha256(), member.size + 1
    with target.open("xb") as sink:
        while left > 0 and (chunk := source.read(min(CHUNK, left))):
            sink.write(chunk)
            digest.update(chunk)
            left -= len(chunk)
    if left != 1 or digest.hexdigest() != member.sha256:
        raise AssetError(
            f"{member.path} came out with sha256 {digest.hexdigest()} and not the pinned {member.sha256}; "
            "the disk or the registry is wrong: fetch again, and report it if it stays"
        )


def extract(archive: Path, *, members: Iterable[Member], folder: Path) -> None:
    """Write the named members of `archive` into `folder`, each checked against its size and hash.

    Raises:
        AssetError: a member is missing, is a link, or differs from its pinned hash, or would land outside
            `folder`; or the archive cannot be read.
    """
    try:
        with _opened(archive) as open_member:
            for member in members:
                with open_member(member.path) as source:
                    _copy(source, target=landing(folder, member), member=member)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, ValueError) as error:
        raise AssetError(f"{archive.name} cannot be read as an archive ({error}); fetch it again") from error


def landing(folder: Path, member: Member) -> Path:
    """Where a member is written, with its parent made; refuses a name that leaves the folder."""
    target = (folder / member.name).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise AssetError(f"member {member.name!r} would be written outside its folder; correct the registry")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target
