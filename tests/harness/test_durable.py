"""A file is whole or absent: it is flushed before it gets its name, and an older one stays when the disk fails."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from candle_mi_parity.files.cache import publish
from candle_mi_parity.files.json_out import ReportError, write_text


def published(tmp_path: Path) -> Path:
    def make(out: Path) -> None:
        (out / "weights").write_bytes(b"w" * 5000)

    return publish(tmp_path / "models" / "key", make)


def reported(tmp_path: Path) -> Path:
    write_text("whole", tmp_path / "report.json")
    return tmp_path / "report.json"


@pytest.mark.parametrize("write", [published, reported])
def test_what_is_renamed_was_flushed_before_and_its_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Path]
) -> None:
    flushed: list[int] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", record)
    target = write(tmp_path)
    made = [path.stat().st_ino for path in (target, *target.rglob("*"))]
    assert set(made) <= set(flushed[:-1]) and flushed[-1] == target.parent.stat().st_ino


@pytest.mark.parametrize("point", ["fsync", "replace"])
def test_what_was_there_stays_when_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    path = reported(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, point, full)
    with pytest.raises(ReportError, match="No space left on device"):
        write_text("half", path)
    assert path.read_text() == "whole"
    assert [held.name for held in tmp_path.iterdir()] == ["report.json"]
