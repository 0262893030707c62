"""The asset cache: a folder per asset that is either complete and checked, or not there.

An archive is downloaded into a scratch folder, hashed, extracted beside the cache, and renamed into place:
a reader never sees a half-written asset, and of two processes that fetch at once one waits for the other.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gossamer.core.errors import AssetError, unknown
from gossamer.core.files import cache_root, digest, locked
from gossamer.data import clients
from gossamer.data.clients import Progress
from gossamer.data.extract import extract
from gossamer.data.registry import Archive, Asset, packaged

MARKER = "gossamer-asset.json"
SCRATCH = ".scratch-"
STALE_SECONDS = 24 * 3600


def cache_dir() -> Path:
    """Where assets are kept: `GOSSAMER_CACHE_DIR`, else gossamer's folder in the user's cache, `/assets`."""
    return cache_root() / "assets"


@contextmanager
def _disk_errors(archive: Archive, root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = "the disk is full; free some space, or set GOSSAMER_CACHE_DIR to a larger disk"
        else:
            why = f"{error}; set GOSSAMER_CACHE_DIR to a folder that can be written"
        raise AssetError(f"could not store {archive.filename} under {root}: {why}") from error


@dataclass(frozen=True)
class Store:
    """A registry of assets and the folder they are kept in.

    Args:
        assets: the records, by name.
        root: folder that holds one folder per asset.
        mirror: a folder of archives by file name, looked at before any network.
    """

    assets: Mapping[str, Asset]
    root: Path
    mirror: Path | None = None

    def asset(self, name: str) -> Asset:
        if name not in self.assets:
            raise unknown("asset", name, self.assets)
        return self.assets[name]

    def cached(self, name: str) -> bool:
        asset, folder = self.asset(name), self.root / name
        try:
            marker = json.loads((folder / MARKER).read_text())
            sizes = [(folder / member.name).stat().st_size for member in asset.members]
        except (OSError, ValueError):
            return False
        return marker.get("archive_sha256") == asset.archive.sha256 and sizes == [
            member.size for member in asset.members
        ]

    def fetch(self, name: str, *, progress: Progress | None = None) -> Path:
        asset = self.asset(name)
        if not self.cached(name):
            with _disk_errors(asset.archive, self.root):
                self.root.mkdir(parents=True, exist_ok=True)
                # Without locks two processes may download twice; the rename still keeps either result whole.
                with locked(self.root / f".{asset.archive.filename}.lock"):
                    # Another process may have finished while we waited.
                    if not self.cached(name):
                        self._obtain(asset.archive, progress)
        return self.root / name

    def verify(self, name: str) -> Path:
        asset, folder = self.asset(name), self.root / name
        if not self.cached(name):
            raise AssetError(f"{name} is not in the cache, or not whole; run fetch({name!r})")
        for member in asset.members:
            got = digest(folder / member.name)
            if got != member.sha256:
                raise AssetError(
                    f"{name}: {member.name} has sha256 {got}, pinned {member.sha256}; the cached file was "
                    f"changed: run remove({name!r}) and fetch({name!r})"
                )
        return folder

    def remove(self, name: str) -> bool:
        folder = self.root / self.asset(name).name
        if not folder.exists():
            return False
        with self._scratch() as scratch:
            folder.rename(scratch / "removed")
        return True

    def _obtain(self, archive: Archive, progress: Progress | None) -> None:
        """Get one archive and install every asset it serves, so that it is downloaded once."""
        served = [asset for asset in self.assets.values() if asset.archive == archive]
        self._sweep()
        self._room(archive, served)
        with self._scratch() as scratch:
            file = self._mirrored(archive) or self._downloaded(archive, scratch, progress)
            for asset in served:
                if not self.cached(asset.name):
                    self._install(asset, file=file, scratch=scratch)

    def _mirrored(self, archive: Archive) -> Path | None:
        if self.mirror is None or not (self.mirror / archive.filename).is_file():
            return None
        file = self.mirror / archive.filename
        _check(file, archive, remedy="replace it; it was left where it is")
        return file

    def _downloaded(self, archive: Archive, scratch: Path, progress: Progress | None) -> Path:
        work = scratch / "download"
        work.mkdir()
        file = clients.download(archive, work, progress=progress)
        # The scratch folder goes with the exception, and the refused file in it.
        _check(file, archive, remedy="it was deleted; " + clients.by_hand(archive))
        if progress is not None:
            progress(archive.size, archive.size)
        return file

    def _install(self, asset: Asset, *, file: Path, scratch: Path) -> None:
        fresh, final = scratch / f"{asset.name}.new", self.root / asset.name
        fresh.mkdir()
        extract(file, members=asset.members, folder=fresh)
        (fresh / MARKER).write_text(json.dumps(_provenance(asset), indent=1))
        if final.exists():
            final.rename(scratch / f"{asset.name}.old")
        try:
            fresh.rename(final)
        except OSError:
            # On systems without locks another process may have put the same asset there first.
            if not self.cached(asset.name):
                raise

    def _room(self, archive: Archive, served: list[Asset]) -> None:
        need, free = archive.size + sum(asset.size for asset in served), shutil.disk_usage(self.root).free
        if free < need:
            raise AssetError(
                f"{archive.filename} needs {need / 1e6:.0f} MB under {self.root} and {free / 1e6:.0f} MB are "
                "free: the disk is full; free some space, or set GOSSAMER_CACHE_DIR to a larger disk"
            )

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=self.root))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _sweep(self) -> None:
        """Delete what killed processes left behind, a day later."""
        for folder in self.root.glob(SCRATCH + "*"):
            with suppress(FileNotFoundError):
                if time.time() - folder.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)


def _check(file: Path, archive: Archive, *, remedy: str) -> None:
    got = digest(file)
    if got != archive.sha256:
        raise AssetError(f"{archive.filename} has sha256 {got}, but {archive.sha256} is pinned: refused; {remedy}")


def _provenance(asset: Asset) -> dict[str, str]:
    archive = asset.archive
    return {
        "asset": asset.name,
        "package": f"{archive.source}:{archive.package}=={archive.version}",
        "archive_sha256": archive.sha256,
        "licence": asset.licence,
        "upstream_licence": asset.upstream_licence,
    }


def store() -> Store:
    """The shipped registry with the cache and mirror that the environment asks for."""
    mirror = os.environ.get("GOSSAMER_ASSET_DIR")
    return Store(packaged(), cache_dir(), Path(mirror).expanduser() if mirror else None)


def fetch(name: str, *, progress: Progress | None = None) -> Path:
    """Return the folder of an asset, downloading it once with pip, apt-get or npm.

    A cached asset costs a few `stat` calls: no network, no hashing (`verify` re-hashes).

    Args:
        name: as listed by `assets()`.
        progress: called as `progress(bytes_done, bytes_total)` while downloading.

    Raises:
        UnknownName: nothing is registered under `name`; near names are listed.
        AssetError: no network or no client (the message says where to put the file by hand), a wrong hash
            (both are shown, the download is deleted), or no room on the disk.

    Example:
        >>> fetch("minilm")                                                        # doctest: +SKIP
        PosixPath('/home/me/.cache/gossamer/assets/minilm')
    """
    return store().fetch(name, progress=progress)


def cached(name: str) -> bool:
    """True when the asset is in the cache, whole, and of the pinned version."""
    return store().cached(name)


def verify(name: str) -> Path:
    """Hash every file of a cached asset again and return its folder.

    Raises:
        AssetError: it is not cached, or a file differs from its pinned hash: remove and fetch again.
    """
    return store().verify(name)


def remove(name: str) -> bool:
    """Delete an asset from the cache; False when it was not there."""
    return store().remove(name)
