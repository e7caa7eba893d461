"""What is installed and built is what is listed: exact versions with checksums, from one registry."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from candle_mi_parity.candidate.plan import EMITTER
from candle_mi_parity.spec.paths import ROOT

LOCKS = [EMITTER / "Cargo.lock", *sorted((EMITTER / "locks").glob("*.lock"))]
OURS = {"parity-emitter", "hf-fetch-model"}
PYTHON_LOCK = ROOT / "requirements.lock"


def packages(lock: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tomllib.loads(lock.read_text(encoding="utf-8"))["package"]
    return found


def unlocked(found: list[dict[str, Any]]) -> list[str]:
    """Crates that do not come out of a registry with a checksum, or come from a second one."""
    foreign = [one["name"] for one in found if one["name"] not in OURS and not _registered(one)]
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
    assert len(found) > 150 and unlocked(found) == []


CRATE = {"name": "a", "version": "1.0.0", "source": "registry+one", "checksum": "0" * 64}


@pytest.mark.parametrize(
    "change",
    [{"source": "git+https://example.org/a"}, {"checksum": ""}, {"source": None}, {"source": "registry+two"}],
)
def test_a_crate_from_elsewhere_is_seen(change: dict[str, object]) -> None:
    assert unlocked([CRATE, CRATE]) == []
    assert unlocked([CRATE, CRATE | change]) != []


# --- Python ---------------------------------------------------------------------------------------

PIN = re.compile(r"^([a-z0-9-]+)==(\S+)( ; [^\\\n]+)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n", re.MULTILINE)


def pinned(text: str) -> dict[str, str]:
    """The versions of a lock in which every package has hashes, and nothing else stands."""
    assert PIN.sub("", text) == "", "a line that is neither a pin nor a hash"
    return {name: version for name, version, _, _ in PIN.findall(text)}


def _name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def unpinned(installed: dict[str, str], pins: dict[str, str]) -> list[str]:
    return sorted(f"{name} {version}" for name, version in installed.items() if pins.get(_name(name)) != version)


def test_every_python_package_is_the_pinned_one() -> None:
    installed = {one.name: one.version for one in distributions() if one.name != "candle-mi-parity"}
    assert len(installed) > 50
    assert unpinned(installed, pinned(PYTHON_LOCK.read_text(encoding="utf-8"))) == []


def test_the_lock_fulfils_what_the_project_asks_for() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    pins = pinned(PYTHON_LOCK.read_text(encoding="utf-8"))
    for asked in map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"]):
        assert asked.specifier.contains(pins[_name(asked.name)]), f"{asked}: run make lock"


def test_another_version_and_an_unpinned_package_are_seen() -> None:
    assert unpinned({"A_b": "1.0", "c": "2.0", "d": "1"}, {"a-b": "1.0", "c": "1.0"}) == ["c 2.0", "d 1"]


@pytest.mark.parametrize(
    "line",
    [
        "a==1.0\n",
        "a>=1.0 \\\n    --hash=sha256:" + "0" * 64 + "\n",
        "--index-url https://example.org/\n",
        "# a comment\n",
    ],
)
def test_a_line_of_the_lock_without_a_hash_is_seen(line: str) -> None:
    good = "a==1.0 ; sys_platform == 'linux' \\\n    --hash=sha256:" + "0" * 64 + "\n"
    assert pinned(good) == {"a": "1.0"}
    with pytest.raises(AssertionError):
        pinned(good + line)
