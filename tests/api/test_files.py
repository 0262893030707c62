"""Folders change places whole, or the earlier one stays; and one cache for everything."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pytest

from gossamer.core import files
from gossamer.core.files import cache_root, digest, whole_folder


def write(folder: Path, text: str) -> None:
    with whole_folder(folder) as draft:
        (draft / "file").write_text(text)


def one_by_one(monkeypatch) -> None:
    monkeypatch.setattr(files, "_renameat2", lambda: None)


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_folder_is_replaced_and_nothing_else_is_left(tmp_path, monkeypatch, in_one_step):
    if not in_one_step:
        one_by_one(monkeypatch)
    for text in ("first", "second"):
        write(tmp_path / "out", text)
        assert (tmp_path / "out" / "file").read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="the exchange of two paths in one step is Linux's")
def test_on_linux_the_name_is_never_missing(tmp_path, monkeypatch):
    write(tmp_path / "out", "first")
    monkeypatch.setattr(files.os, "replace", lambda *paths: pytest.fail(f"renamed in two steps: {paths}"))
    probe = tmp_path / "probe"
    probe.mkdir()
    if not files._exchange(probe, tmp_path / "out"):
        pytest.skip("this file system cannot exchange two paths")
    assert (probe / "file").read_text() == "first"
    assert files._exchange(probe, tmp_path / "out")
    write(tmp_path / "out", "second")
    assert (tmp_path / "out" / "file").read_text() == "second"


def test_if_the_second_rename_fails_the_old_folder_gets_its_name_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, "first")
    one_by_one(monkeypatch)
    real, calls = os.replace, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", second_fails)
    with pytest.raises(OSError, match="Input/output"):
        write(out, "second")
    assert len(calls) == 3
    assert (out / "file").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_cache_is_where_it_was_asked_to_be(tmp_path, monkeypatch):
    from gossamer.data import cache_dir

    monkeypatch.setenv("GOSSAMER_CACHE_DIR", str(tmp_path))
    assert cache_root() == tmp_path
    assert cache_dir() == tmp_path / "assets"


def test_a_digest_is_the_files_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 1000)
    assert digest(tmp_path / "file") == hashlib.sha256(b"abc" * 1000).hexdigest()
