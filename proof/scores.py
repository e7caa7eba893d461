"""The table that a run of the catalogue ends in: scores, survivors, equivalents, and every row."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from candle_mi_parity.report.proof_record import rules_digest
from proof.judging import Outcome, Status


@dataclass(frozen=True)
class Score:
    """Killed of scored, and of the killed those whose first tensor is right."""

    name: str
    scored: int
    killed: int
    right: int

    @property
    def perfect(self) -> bool:
        return self.scored == self.killed == self.right

    def line(self) -> str:
        return f"| {self.name} | {self.killed}/{self.scored} | {self.right}/{self.killed} |"


def score(name: str, outcomes: Iterable[Outcome], foretold: bool = False) -> Score:
    """Of the scored rows; with ``foretold`` the first tensor is compared with what was written down first."""
    scored = [outcome for outcome in outcomes if outcome.scored]
    killed = [outcome for outcome in scored if outcome.status is Status.KILLED]
    right = [outcome for outcome in killed if (outcome.foretold if foretold else outcome.right)]
    return Score(name, len(scored), len(killed), len(right))


def scores(outcomes: list[Outcome]) -> list[Score]:
    found = [
        score("all", outcomes),
        score("fast lane", (one for one in outcomes if one.fast)),
        score("written before", (one for one in outcomes if one.written_before_run), foretold=True),
    ]
    kinds = dict.fromkeys(one.kind for one in outcomes)
    return found + [score(kind, (one for one in outcomes if one.kind == kind)) for kind in kinds]


def proved(outcomes: list[Outcome]) -> bool:
    """Every scored fault is killed at the right tensor, and every other is equivalent."""
    rest = (one for one in outcomes if not one.scored)
    return score("all", outcomes).perfect and all(one.status is Status.EQUIVALENT for one in rest)


def markdown(outcomes: list[Outcome]) -> str:
    """Scores, then survivors, equivalents and errors in full, then a row for each fault."""
    lines = ["| faults | killed of scored | first tensor right of killed |", "|---|---|---|"]
    lines += [one.line() for one in scores(outcomes)]
    lines += ["", "`written before`: against the tensor that was written down before the first run."]
    for status, title in (
        (Status.SURVIVED, "Survivors"),
        (Status.EQUIVALENT, "Equivalent"),
        (Status.ERROR, "Errors"),
    ):
        told = [f"- `{one.id}` ({one.case}): {one.says} {one.detail}" for one in outcomes if one.status is status]
        lines += ["", f"**{title}**: {len(told)}", *told]
    wrong = [one for one in outcomes if one.status is Status.KILLED and not one.right]
    lines += ["", f"**Caught elsewhere**: {len(wrong)}"]
    lines += [f"- `{one.id}`: expected {one.expected}, first {one.found} ({one.reason})" for one in wrong]
    lines += ["", "| id | kind | case | status | first | ratio |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {one.id} | {one.kind} | {one.case} | {one.status} | {one.found} | {one.ratio:.3g} |" for one in outcomes
    ]
    return "\n".join(lines) + "\n"


def save(outcomes: list[Outcome], out: Path, name: str) -> None:
    """Write ``<name>.json`` and ``<name>.md``."""
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "measured_by": rules_digest(),
        "scores": [vars(one) for one in scores(outcomes)],
        "faults": [asdict(one) for one in outcomes],
    }
    (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(markdown(outcomes), encoding="utf-8")
