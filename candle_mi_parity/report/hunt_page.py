"""``hunt.html``: a :class:`HuntResult` as one file without scripts and external resources."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup

from candle_mi_parity.compare.gate import ELEMENT_GATE, POSITION_GATE
from candle_mi_parity.compare.hunt_result import Cause, HuntResult, Kind, Tally
from candle_mi_parity.compare.run_result import Verdict
from candle_mi_parity.files.escape import number, rendered
from candle_mi_parity.files.toml_out import toml_rows
from candle_mi_parity.report.plots import histogram

PAGE = "hunt.html"
KINDS: dict[Kind, tuple[str, str]] = {
    "forward": ("Forward passes", "a row of fixtures/cases.toml"),
    "call": ("Direct calls", "rows of fixtures/calls.toml"),
    "text": ("Texts", "an entry of fixtures/texts.json"),
}
"""Kind of input → its heading, and what an input is in the tables of this suite."""
LONGEST = 200
"""Largest number of different messages, entries or functions that are listed."""


@dataclass(frozen=True)
class KindShown:
    """What became of the inputs of one kind.

    :ivar outcomes: outcome → number of inputs.
    :ivar lists: heading → key and number of inputs, the largest first.
    """

    title: str
    tried: int
    outcomes: dict[str, int]
    lists: dict[str, list[tuple[str, int]]]


def hunt_page(result: HuntResult) -> str:
    """The whole page."""
    return rendered(
        "hunt.html.j2",
        result=result,
        who=f"candle-mi {result.candidate}" if result.version else f"the control {result.candidate}",
        sentence=sentence(result),
        figures=figures(result),
        kinds=kinds_shown(result),
        causes=list(enumerate(result.causes, 1)),
        smallest=smallest,
        instead=instead,
        tables={kind: table for kind, (_, table) in KINDS.items()},
        plots=list(_plots(result)),
        nearest=[(number(part), family, json.dumps(genes)) for part, family, genes in result.nearest],
        entries=len({name.partition(": ")[2] for name in result.entries}),
        most=LONGEST,
    )


def smallest(cause: Cause) -> str:
    """The smallest input of a cause as text to copy."""
    if cause.kind == "text":
        return json.dumps(cause.smallest.get("text"))
    return toml_rows({"case": [cause.smallest]} if cause.kind == "forward" else cause.smallest)


def instead(cause: Cause) -> str:
    """What the candidate computes instead; empty if no search found it."""
    does = "answers as" if cause.kind == "text" else "computes PyTorch's numbers with"
    return f"{does} {cause.explained}" if cause.explained else ""


def sentence(result: HuntResult) -> str:
    """What the verdict rests on."""
    judged = f"{judged_inputs(result)} inputs that were judged"
    if result.verdict is Verdict.FAIL:
        count = len(result.causes)
        return f"{count} divergence{'s' * (count > 1)} that no explanation covers, in {judged}."
    if result.faults:
        return f"This suite failed on {sum(result.faults.values())} inputs, so that {judged} do not count."
    return f"Nothing new in {judged}." if result.verdict is Verdict.PASS else "No input was judged."


def judged_inputs(result: HuntResult) -> int:
    """Number of inputs of all kinds that agree, diverge as is known, or have a new cause."""
    return sum(tally.judged for tally in result.tallies.values()) + sum(cause.count for cause in result.causes)


def figures(result: HuntResult) -> dict[str, str]:
    """The figures at the top of the page."""
    rate = result.tried / result.seconds if result.seconds else 0.0
    found = {
        "candidate": result.candidate,
        "version": result.version or "none: transformers in float32",
        "families": ", ".join(result.families),
        "inputs": f"{result.tried} tried, {judged_inputs(result)} judged",
        "rate": f"{number(rate)} inputs a second",
        "took": f"{result.seconds:.0f} s, {result.rounds} rounds",
        "seed": str(result.seed),
    }
    if result.branches.of:
        found["branches"] = (
            f"{len(result.branches.reached)} of {result.branches.of} regions of candle-mi's source were reached"
        )
    if result.command:
        found["to go on"] = f"{result.command} --resume"
    return found


def kinds_shown(result: HuntResult) -> list[KindShown]:
    """The kinds of input of which there was any."""
    return [_shown(result, kind, tally) for kind, tally in result.tallies.items()]


def _shown(result: HuntResult, kind: Kind, tally: Tally) -> KindShown:
    new = sum(cause.count for cause in result.causes if cause.kind == kind)
    outcomes = {
        "agree": tally.agree,
        "known": sum(tally.known.values()),
        "new": new,
        "refused by candle-mi": sum(tally.refused.values()),
        "without a truth": sum(tally.no_truth.values()),
        "too noisy to judge, or nothing to compare": tally.unmeasured,
    }
    lists = {
        "Refused by candle-mi, by message": tally.refused,
        "Known, by the ids of explanations": tally.known,
        "Without a truth, by the message of PyTorch or of this suite": tally.no_truth,
    }
    return KindShown(
        KINDS[kind][0], tally.tried, outcomes, {title: largest(counts) for title, counts in lists.items() if counts}
    )


def largest(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Keys with their counts, the largest count first."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _plots(result: HuntResult) -> list[tuple[str, Markup]]:
    spreads = {
        f"Positions: the largest rms error over its noise; the gate is {POSITION_GATE:g}.": (
            result.position,
            POSITION_GATE,
        ),
        f"Elements: the largest error over its noise; the gate is {ELEMENT_GATE:g}.": (result.element, ELEMENT_GATE),
    }
    return [(title, histogram(counts, gate, title)) for title, (counts, gate) in spreads.items() if counts]
