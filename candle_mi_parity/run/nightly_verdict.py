"""What a night says against the last one: its verdict, what changed, and the text of the one issue.

The last conclusive result of every step is kept in ``last.json``. A night in which a step was INCONCLUSIVE leaves
that step's old result in its place, so that a change is told once, on the night when it is seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from candle_mi_parity.compare.run_result import Verdict
from candle_mi_parity.compare.verdict import Status
from candle_mi_parity.files.json_out import write_json, write_text
from candle_mi_parity.report.views_ci import ROWS, code, prose, table
from candle_mi_parity.run.nightly import StepResult, read_model

THE_RUN = "the run"
"""The case that stands for a run that broke off."""


class Kept(BaseModel):
    """A step's last conclusive night.

    :ivar verdicts: case → as in :class:`nightly.StepResult`.
    """

    model_config = ConfigDict(extra="forbid")

    night: str
    verdicts: dict[str, str]


class Last(BaseModel):
    """``last.json``."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["candle-mi-parity/nightly/1"] = "candle-mi-parity/nightly/1"
    steps: dict[str, Kept] = {}


def conclude(results: list[StepResult], out: Path, night: str) -> Verdict:
    """Compare with the nights before, write ``summary.md``, ``last.json`` and, only where something changed,
    ``issue.md``.

    :param night: its date, as it is to be shown.
    :raises NightlyError: ``last.json`` is not what this function writes.
    """
    path = out / "last.json"
    last = read_model(Last, path) if path.is_file() else Last()
    changed = {result.name: changes(result, last.steps.get(result.name)) for result in results}
    issue = out / "issue.md"
    issue.unlink(missing_ok=True)
    if any(changed.values()):
        write_text(text(results, changed, last, night), issue)
    write_text(text(results, changed, last, night), out / "summary.md")
    write_json(_kept(results, last, night).model_dump(), path)
    return verdict(results)


def verdict(results: list[StepResult]) -> Verdict:
    """Of the night: FAIL before ERROR before INCONCLUSIVE before PASS."""
    order = (Verdict.FAIL, Verdict.ERROR, Verdict.INCONCLUSIVE)
    return next((found for found in order if any(result.verdict is found for result in results)), Verdict.PASS)


def changes(result: StepResult, kept: Kept | None) -> list[str]:
    """Each case of a step that is not what it was, in words; none where the night says nothing.

    Before the first night all is taken to be as the ledger has it: a pass or a known divergence.
    """
    if not result.conclusive:
        return []
    before, after = kept.verdicts if kept else {}, _verdicts(result, kept)
    lines = []
    for case in dict.fromkeys([*before, *after]):
        old, new = before.get(case), after.get(case, "no longer run")
        expected = old is None and new.split()[0] in (Status.PASS, Status.KNOWN)
        if old != new and not expected:
            lines.append(f"{case}: {old or 'never run'} → {new}")
    return lines


def _verdicts(result: StepResult, kept: Kept | None) -> dict[str, str]:
    """Of a run that broke off only this is known, and what is kept of its cases stays."""
    if result.whole:
        return {THE_RUN: Status.PASS.value, **result.cases}
    return {**(kept.verdicts if kept else {}), THE_RUN: Status.ERROR.value}


def _kept(results: list[StepResult], last: Last, night: str) -> Last:
    new = {
        result.name: Kept(night=night, verdicts=_verdicts(result, last.steps.get(result.name)))
        for result in results
        if result.conclusive
    }
    return Last(steps={**last.steps, **new})


def text(results: list[StepResult], changed: Mapping[str, list[str]], last: Last, night: str) -> str:
    """Markdown: the verdict, what changed, each step with what it is compared with."""
    rows = [
        [code(result.name), result.verdict.value, prose(result.line), _when(last, result.name)] for result in results
    ]
    parts = [f"## {verdict(results).value}: the night of {prose(night)}"]
    for name, lines in changed.items():
        if lines:
            shown = [f"- {prose(line)}" for line in lines[:ROWS]]
            more = [f"- and {len(lines) - ROWS} more, see the report"] if len(lines) > ROWS else []
            parts.append("\n".join([f"### Changed in {code(name)}", "", *shown, *more]))
    parts += [] if any(changed.values()) else ["Nothing changed since the last conclusive night of each step."]
    parts.append(table(["step", "verdict", "why", "compared with"], rows))
    return "\n\n".join(parts) + "\n"


def _when(last: Last, name: str) -> str:
    kept = last.steps.get(name)
    return prose(kept.night) if kept else "the ledger"
