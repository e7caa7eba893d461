"""What is installed and built is what is listed: exact versions with checksums, from one registry."""

from __future__ import annotations

import tomllib
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from candle_mi_parity.candidate.plan import EMITTER
from candle_mi_parity.spec.paths import ROOT

LOCKS = [EMITTER / "Cargo.lock", *sorted((EMITTER / "locks").glob("*.lock"))]
OURS = "parity-emitter"


def packages(lock: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tomllib.loads(lock.read_text(encoding="utf-8"))["package"]
    return found


def unlocked(found: list[dict[str, Any]]) -> list[str]:
    """Crates that do not come out of a registry with a checksum, or come from a second one."""
    foreign = [one["name"] for one in found if one["name"] != OURS and not _registered(one)]
    sources = sorted({one["source"] for one in found if _registered(one)})
    return foreign + sources[1:]


def _registered(one: dict[str, Any]) -> bool:
    return str(one.get("source", "")).startswith("registry+") and len(one.get("checksum", "")) == 64


def test_every_release_has_a_lock_and_the_default_one_is_the_crates() -> None:
    assert {lock.stem for lock in LOCKS[1:]} == {
        path.parent.name for path in (ROOT / "rust_outputs").glob("*/candidate.json")
    }
    assert LOCKS[0].read_bytes() == (EMITTER / "locks" / "0.2.2.lock").read_bytes()


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_every_crate_is_locked_by_checksum_to_one_registry(lock: Path) -> None:
    found = packages(lock)
    assert len(found) > 300 and unlocked(found) == []


CRATE = {"name": "a", "version": "1.0.0", "source": "registry+one", "checksum": "0" * 64}


@pytest.mark.parametrize(
    "change",
    [{"source": "git+https://example.org/a"}, {"checksum": ""}, {"source": None}, {"source": "registry+two"}],
)
def test_a_crate_from_elsewhere_is_seen(change: dict[str, object]) -> None:
    assert unlocked([CRATE, CRATE]) == []
    assert unlocked([CRATE, CRATE | change]) != []


def pinned(text: str) -> dict[str, str]:
    pins = [line.split("==") for line in text.splitlines() if line.strip()]
    assert all(len(pin) == 2 for pin in pins), "a line that is no NAME==VERSION"
    return {_name(name): version for name, version in pins}


def _name(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def unpinned(installed: dict[str, str], pins: dict[str, str]) -> list[str]:
    return sorted(f"{name} {version}" for name, version in installed.items() if pins.get(_name(name)) != version)


def test_every_python_package_is_the_pinned_one() -> None:
    installed = {one.name: one.version for one in distributions() if one.name != "candle-mi-parity"}
    assert len(installed) > 50
    assert unpinned(installed, pinned((ROOT / "constraints.txt").read_text(encoding="utf-8"))) == []


def test_another_version_and_an_unpinned_package_are_seen() -> None:
    assert unpinned({"A_b": "1.0", "c": "2.0", "d": "1"}, pinned("a-b==1.0\nc==1.0\n")) == ["c 2.0", "d 1"]
