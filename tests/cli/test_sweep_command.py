"""gossamer sweep, as its user meets it."""

from __future__ import annotations

from pathlib import Path

import yaml
from conftest import record

ASKED = {
    "tasks": ["teacher"],
    "methods": ["dense", {"method": "rigl", "options": {"every": 4}}],
    "densities": [0.2],
    "seeds": 2,
    "steps": 30,
    "rate": "3e-3",
}


def recipe(folder: Path, **changes: object) -> Path:
    (folder / "s.yaml").write_text(yaml.safe_dump({**ASKED, **changes}))
    return folder / "s.yaml"


def test_a_recipe_becomes_a_table(gossamer, tmp_path):
    first = gossamer("sweep", recipe(tmp_path), "--workers", "1")
    assert first.exit_code == 0 and "± 95 %" in first.stdout and "rigl" in first.stdout
    assert "teacher/rigl-0.2-seed1: accuracy" in first.stderr and "4 of 4 runs" in first.stderr
    folder = tmp_path / "s-sweep"
    assert {p.name for p in folder.iterdir()} == {"runs", "sweep.json", "sweep.svg", "table.md"}
    held = record(gossamer("sweep", recipe(tmp_path), "--workers", "1", "--set", "seeds=3", "--json"))
    assert held["out"] == str(folder) and held["figure"] == str(folder / "sweep.svg")
    assert [(r["method"], sorted(r["values"])) for r in held["rows"]] == [
        ("dense", ["0", "1", "2"]),
        ("rigl", ["0", "1", "2"]),
    ]
    assert 0.15 < held["rows"][1]["share"] < 0.4 and held["rows"][1]["half"] > 0


def test_what_failed_is_told_after_the_table_and_ends_with_3(gossamer, tmp_path):
    stiff = {"method": "set", "options": {"every": 100}}
    result = gossamer("sweep", recipe(tmp_path, methods=["dense", stiff]), "--workers", "1", "--out", tmp_path / "o")
    assert result.exit_code == 3 and "dense" in result.stdout
    assert "2 runs failed" in result.stderr and "teacher/set-0.2-seed1" in result.stderr


def test_what_makes_no_sense_is_refused(gossamer, tmp_path):
    assert gossamer("sweep", recipe(tmp_path, methods=["dens"])).exit_code == 3
    assert gossamer("sweep", tmp_path / "none.yaml").exit_code == 3
    assert gossamer("sweep", recipe(tmp_path), "--workers", "0").exit_code == 2
    assert not (tmp_path / "s-sweep").exists()
