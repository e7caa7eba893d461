"""Crates and packages are pinned; the workflows are pinned, read-only and up to date."""

import re
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from candle_mi_parity.candidate.spelling import stored_releases
from candle_mi_parity.cli.cli import app
from candle_mi_parity.spec.paths import EMITTER, OUTPUTS, ROOT

LOCKS = [EMITTER / "Cargo.lock", *sorted((EMITTER / "locks").glob("*.lock"))]
WORKFLOWS = {
    path.stem: (path.read_text(), yaml.safe_load(path.read_text()))
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
}


ENVIRONMENTS = {".venv": "requirements.lock", "build/lowest": "lowest.lock"}
"""What setup.sh makes, and the lock that it has the packages of."""


def unlocked(packages: list[dict[str, Any]]) -> list[str]:
    """Crates without a checksum or registry, and any second registry."""
    theirs = [one for one in packages if one["name"] not in ("parity-emitter", "hf-fetch-model")]
    locked = [
        one for one in theirs if str(one.get("source")).startswith("registry+") and len(one.get("checksum", "")) == 64
    ]
    return [one["name"] for one in theirs if one not in locked] + sorted({one["source"] for one in locked})[1:]


def test_every_release_has_a_lock() -> None:
    releases = set(stored_releases(OUTPUTS))
    assert {lock.stem for lock in LOCKS[1:]} == releases
    assert LOCKS[0].read_bytes() == (EMITTER / "locks" / "0.2.2.lock").read_bytes()


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_every_crate_is_locked_by_checksum_to_one_registry(lock: Path) -> None:
    found = tomllib.loads(lock.read_text(encoding="utf-8"))["package"]
    assert len(found) > 100 and unlocked(found) == []
    for change in ({"source": "git+https://example.org/a"}, {"checksum": ""}, {"source": "registry+two"}):
        assert unlocked([*found, found[0] | {"name": "a"} | change]) != []


PIN = re.compile(r"^([a-z0-9-]+)==(\S+)( ; [^\\\n]+)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n", re.MULTILINE)


def pinned(text: str) -> dict[str, str]:
    """The versions in a lock in which every package has hashes."""
    assert PIN.sub("", text) == "", "a line is neither a pin nor a hash"
    return {name: version for name, version, _, _ in PIN.findall(text)}


def spelt(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("lock", ENVIRONMENTS.values())
def test_a_lock_satisfies_the_project(lock: str) -> None:
    text = (ROOT / lock).read_text(encoding="utf-8")
    pins = pinned(text)
    for line in ("a==1.0\n", "--index-url https://example.org/\n", "# a comment\n"):
        with pytest.raises(AssertionError, match="neither a pin nor a hash"):
            pinned(text + line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for asked in map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"]):
        assert asked.specifier.contains(pins[spelt(asked.name)]), f"{asked}: run make lock"


def test_the_lock_pins_the_installed_packages() -> None:
    made = {str(ROOT / name): lock for name, lock in ENVIRONMENTS.items()}
    if (lock := made.get(str(Path(sys.prefix).resolve()))) is None:
        pytest.skip(
            f"{sys.prefix} has packages of no lock of the project: make test and make test-lowest make theirs"
        )
    installed = {spelt(one.name): one.version for one in distributions() if one.name != "candle-mi-parity"}
    assert len(installed) > 50
    # A lock for several versions of Python may have several versions of a package.
    assert installed.items() <= {(name, version) for name, version, _, _ in PIN.findall((ROOT / lock).read_text())}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_is_pinned_read_only_and_bounded(name: str) -> None:
    text, workflow = WORKFLOWS[name]
    used = re.findall(r"uses: (.*)", text)
    # `./` is the action of this repository, as it is in the same commit.
    pinned = r"\S+@[0-9a-f]{40} # v\d+\.\d+\.\d+|\./ # zizmor: .*"
    assert [line for line in used if not re.fullmatch(pinned, line)] == []
    assert workflow["permissions"] == {"contents": "read"}
    granted = {job: found["permissions"] for job, found in workflow["jobs"].items() if "permissions" in found}
    may = {"nightly": {"issue": {"issues": "write"}}, "release": {"publish": {"id-token": "write"}}}
    assert granted == may.get(name, {})
    assert workflow["concurrency"]["group"]
    for job, found in workflow["jobs"].items():
        assert 0 < found["timeout-minutes"] < 360
        for step in found["steps"]:
            if "checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False
                assert job not in granted, "a job with write permission runs code of the repository"
            assert "${{" not in step.get("run", ""), "an expression is inserted into shell text"


def test_the_pythons_are_those_of_the_project() -> None:
    matrix = WORKFLOWS["ci"][1]["jobs"]["tests"]["strategy"]["matrix"]["python"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert matrix[0] == project["requires-python"].removeprefix(">=")
    for text, _ in WORKFLOWS.values():
        assert set(re.findall(r'python-version: "(.*)"', text)) <= set(matrix)


def test_every_command_of_a_workflow_exists() -> None:
    lines = [line.split() for text, _ in WORKFLOWS.values() for line in re.findall(r"(?:make|\$PARITY) .*", text)]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {words[1] for words in lines if words[0] == "make"} <= targets
    ours = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert {words[1] for words in lines if words[0] == "$PARITY"} <= ours


# --- the modules of the emitter -------------------------------------------------------------------


def imports(source: Path) -> dict[str, set[str]]:
    """Module → the modules that its code names as ``crate::<module>``, without tests and comments."""
    found = {}
    for path in source.glob("*.rs"):
        if not path.stem.endswith(("_tests", "_fuzz")):
            code = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
            groups = re.findall(r"\bcrate::(?:(\w+)|\{([^}]*)\})", code)
            found[path.stem] = {
                name for single, group in groups for name in [single, *re.split(r"\W+", group)] if name
            }
    return found


def order(source: Path) -> list[str]:
    """The modules in an order in which each follows those that it imports.

    :raises CycleError: there is no such order.
    """
    return list(TopologicalSorter(imports(source)).static_order())


def test_no_import_is_circular() -> None:
    found = order(EMITTER / "src")
    assert set(found) == set(imports(EMITTER / "src")), "an imported module has no file"
    assert found.index("protocol") < found.index("request") < found.index("dispatch")


def test_a_circular_import_is_detected(tmp_path: Path) -> None:
    (tmp_path / "a.rs").write_text("use crate::b::B;\n")
    (tmp_path / "b.rs").write_text("pub fn f() -> crate::c::C {}\n")
    (tmp_path / "c.rs").write_text("// crate::a\nuse std::fs;\n")
    assert order(tmp_path) == ["c", "b", "a"]
    (tmp_path / "c.rs").write_text("use crate::{a, b};\n")
    with pytest.raises(CycleError):
        order(tmp_path)


def test_the_action_is_pinned_and_inserts_no_expression_into_shell_text() -> None:
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    steps = yaml.safe_load(text)["runs"]["steps"]
    used = re.findall(r"uses: (.*)", text)
    assert [line for line in used if not re.fullmatch(r"\S+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []
    assert [step for step in steps if "${{" in step.get("run", "")] == []
