"""The workflows: pinned, read-only, and calling nothing that is not there."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from candle_mi_parity.cli.cli import app
from candle_mi_parity.spec.paths import ROOT

FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PIN = re.compile(r"uses: \S+@[0-9a-f]{40} # v\d+\.\d+\.\d+")


def read(path: Path) -> dict[str, Any]:
    # YAML 1.1 reads the key `on` as true.
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


def steps(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job["steps"]


def commands() -> list[str]:
    return [line.strip() for path in FILES for step in steps(read(path)) for line in step.get("run", "").splitlines()]


def unpinned(text: str) -> list[str]:
    uses = [line.strip().removeprefix("- ") for line in text.splitlines() if "uses:" in line]
    return [line for line in uses if not PIN.fullmatch(line)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_action_is_pinned_to_a_commit_with_its_version_beside_it(path: Path) -> None:
    assert unpinned(path.read_text()) == []


@pytest.mark.parametrize(
    "line", ["- uses: actions/checkout@v6", f"- uses: a/b@{'0' * 40}", f"uses: a/b@{'0' * 39} # v1.0.0"]
)
def test_an_action_that_is_not_pinned_is_seen(line: str) -> None:
    assert unpinned(line)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_workflow_may_read_and_one_job_write_issues(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    granted = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert granted == ({"issue": {"issues": "write"}} if path.name == "nightly.yml" else {})
    for name in granted:
        uses = [step.get("uses", "") for step in workflow["jobs"][name]["steps"]]
        assert not any("checkout" in used for used in uses), "the job that may write runs no code of the repository"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_job_is_endless_and_no_checkout_keeps_its_credentials(path: Path) -> None:
    workflow = read(path)
    assert workflow["concurrency"]["group"]
    assert all(0 < job["timeout-minutes"] < 360 for job in workflow["jobs"].values())
    for step in steps(workflow):
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False
        assert "${{" not in step.get("run", ""), "what a workflow is given never becomes shell text"


def test_the_pythons_are_those_of_the_project() -> None:
    matrix = read(ROOT / ".github/workflows/ci.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"]
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    assert project["requires-python"] == f">={matrix[0]}"
    assert matrix == ["3.11", "3.12", "3.13"]
    asked = {
        step["with"]["python-version"]
        for path in FILES
        for step in steps(read(path))
        if "python" in step.get("uses", "")
    }
    assert asked <= {*matrix, "${{ matrix.python }}"}


def test_every_command_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {words[1] for words in map(str.split, commands()) if words[:1] == ["make"]}
    weekly = read(ROOT / ".github/workflows/weekly.yml")["jobs"]["validation"]["strategy"]["matrix"]["target"]
    assert called - {"$TARGET"} | {target.split()[0] for target in weekly} <= targets
    ours = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert {words[1] for words in map(str.split, commands()) if words[:1] == ["$PARITY"]} <= ours
