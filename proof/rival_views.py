"""The rivals as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from candle_mi_parity.report.proof_record import rules_digest
from proof.packages import Absent
from proof.rival_scores import Asked, Score

REAL = "smollm2/hub"
"""The case with real weights; the others are tiny models."""
NOT_RULES = (
    Absent("llama.cpp, KL divergence and perplexity", "printed, with no threshold that a run could fail"),
    Absent("llama.cpp, test-backend-ops", "judges single operations on equal inputs; a dump has none"),
)


KEYS = ("default", "own", "joint")


def write(scores: Sequence[Score], absent: Sequence[Absent], out: Path) -> None:
    """``rivals.md`` and ``rivals.json``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "rivals.md").write_text(markdown(scores, absent), encoding="utf-8")
    document = {
        "measured_by": rules_digest(),
        "rules": [
            {
                "name": score.rule.name,
                "sees": score.rule.sees,
                "default": score.rule.default,
                "honest": score.honest,
                "needs": {case: scale if math.isfinite(scale) else None for case, scale in score.needs.items()},
                "faults": [asdict(asked) for asked in score.asked],
            }
            for score in scores
        ],
        "not_run": [asdict(missing) for missing in (*absent, *NOT_RULES)],
    }
    (out / "rivals.json").write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")


def markdown(scores: Sequence[Score], absent: Sequence[Absent]) -> str:
    """A table for the tiny models and one for SmolLM2; what was not run; and where a rival is as good."""
    cases = list(scores[0].needs)
    lines = [
        "# Rivals on the same dumps",
        "",
        "*right*: killed with the fault's own tensor named first. *needs*: from the case that needs least to the one "
        "that needs most, the factor on the default tolerance with which all honest dumps pass. Kills at the default "
        "by a rule that also fails honest dumps are worth nothing and stand in brackets. The last two columns put "
        "rules on equal footing: 1.5 × the need, with a tolerance for each case, or one for both tables.",
    ]
    small = [case for case in cases if case != REAL]
    for title, chosen in ((f"{len(small)} cases of tiny models", small), ("SmolLM2-135M, without its SAE", [REAL])):
        if any(case in cases for case in chosen):
            lines += ["", f"## {title}", "", *_table(scores, chosen), "", *_as_good(scores, chosen)]
    lines += ["", "## Not run", ""]
    lines += [f"- {missing.name}: {missing.reason}" for missing in (*absent, *NOT_RULES)]
    return "\n".join(lines) + "\n"


def _table(scores: Sequence[Score], cases: Sequence[str]) -> list[str]:
    lines = [
        "| rule | sees | default | honest passed | killed, right | needs | own tolerance: killed, right "
        "| one for all: killed, right |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for score in scores:
        honest = [named for case in cases for named in score.honest[case].values()]
        default, own, joint = (_counts(score, cases, key) for key in KEYS)
        lines.append(
            f"| {score.rule.name} | {score.rule.sees} | {score.rule.default} | {honest.count(None)}/{len(honest)} "
            f"| {default if _fair(score, cases) else f'({default})'} | {_span(score, cases)} | {own} | {joint} |"
        )
    return lines


def killed(score: Score, cases: Sequence[str], key: str) -> list[Asked]:
    """The faults of some cases that a rule kills at one of :data:`KEYS`."""
    return [asked for asked in score.asked if asked.case in cases and getattr(asked, key) is not None]


def right(score: Score, cases: Sequence[str], key: str) -> list[Asked]:
    """Those of them of which it names the first tensor."""
    return [asked for asked in killed(score, cases, key) if getattr(asked, key) == asked.first]


def _fair(score: Score, cases: Sequence[str]) -> bool:
    """Whether the rule passes all honest dumps at its default."""
    return all(named is None for case in cases for named in score.honest[case].values())


def _counts(score: Score, cases: Sequence[str], key: str) -> str:
    total = sum(asked.case in cases for asked in score.asked)
    return f"{len(killed(score, cases, key))}/{total}, {len(right(score, cases, key))}"


def _span(score: Score, cases: Sequence[str]) -> str:
    sizes = [_size(pick(score.needs[case] for case in cases)) for pick in (min, max)]
    return " to ".join(dict.fromkeys(sizes))


def _size(scale: float) -> str:
    if math.isinf(scale):
        return "no tolerance"
    return "nothing" if scale < 1e-8 else f"{scale:.2g}"


def _as_good(scores: Sequence[Score], cases: Sequence[str]) -> list[str]:
    """Every rival that kills as many, or names as many tensors rightly, as the first row; said plainly."""
    ours, *rivals = scores
    lines = []
    for title, key in zip(
        ("At the defaults", "With a tolerance for each case", "With one for all"), KEYS, strict=True
    ):
        fair = [score for score in rivals if key != "default" or _fair(score, cases)]
        good = []
        for count in (killed, right):
            best = len(count(ours, cases, key))
            good.append(", ".join(score.rule.name for score in fair if len(count(score, cases, key)) >= best))
        lines.append(
            f"- {title}: as many kills as this suite: {good[0] or 'none'}; "
            f"as many first tensors right: {good[1] or 'none'}. {_nearest(ours, fair, cases, key)}".rstrip()
        )
    return lines


def _nearest(ours: Score, rivals: Sequence[Score], cases: Sequence[str], key: str) -> str:
    """The rival that kills most, and what separates it from the first row, in both directions."""
    if not rivals:
        return ""
    best = max(rivals, key=lambda score: (len(killed(score, cases, key)), len(right(score, cases, key))))
    mine, theirs = ([asked.fault for asked in killed(score, cases, key)] for score in (ours, best))
    misses = [fault for fault in mine if fault not in theirs]
    beyond = [fault for fault in theirs if fault not in mine]
    return (
        f"Nearest: {best.rule.name}, which misses {', '.join(misses) or 'nothing that this suite kills'}"
        + (f", and kills {', '.join(beyond)}, which this suite misses" if beyond else "")
        + "."
    )
