"""``report.html``: one file that needs no network and no script, drawn from a :class:`RunResult`.

Its content security policy forbids scripts and every address, and jinja2 escapes what it is given: names and errors
come from a trace that nobody vouches for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from candle_mi_parity.compare.gate import ELEMENT_GATE, POSITION_GATE
from candle_mi_parity.compare.run_result import RunResult, Verdict
from candle_mi_parity.compare.verdict import CaseResult, Status, TensorResult
from candle_mi_parity.files.escape import number, one_line, rendered
from candle_mi_parity.report.plots import Line, case_plot, heatmap, ratio_plot

SEVERITY = [Status.FAIL, Status.ERROR, Status.UNMEASURED, Status.KNOWN, Status.PASS]
SYMBOLS = {"FAIL": "✗", "ERROR": "!", "UNMEASURED": "?", "KNOWN": "≈", "PASS": "✓", "NOT RUN": "–"}


@dataclass(frozen=True)
class Cell:
    """One square of the matrix.

    :ivar text: the worst ratio, or a word where there is none.
    :ivar why: one sentence.
    :ivar link: the anchor of the case's evidence; empty when there is none.
    """

    status: str
    text: str
    why: str
    link: str


@dataclass(frozen=True)
class Row:
    """One case of every family; ``cells`` has None where a family lacks it."""

    name: str
    cells: list[Cell | None]
    reasons: list[str]


@dataclass(frozen=True)
class Evidence:
    """What the page shows of a case that is not a pass."""

    case: CaseResult
    anchor: str
    first: TensorResult | None
    plot: Markup | None
    picture: Markup | None
    inherited: int


def render(result: RunResult) -> str:
    """The whole page."""
    families = list(dict.fromkeys(_family(name) for name in _ids(result)))
    evidence = {case.id: _evidence(case, i) for i, case in enumerate(result.cases) if case.status is not Status.PASS}
    bad = [evidence[case.id] for case in result.cases if case.status not in (Status.PASS, Status.KNOWN)]
    known = [evidence[case.id] for case in result.cases if case.status is Status.KNOWN]
    notes = dict.fromkeys(found.case.note for found in known)
    return rendered(
        "page.html.j2",
        result=result,
        sentence=sentence(result),
        counts=_counts(result),
        families=families,
        rows=matrix(result, families),
        symbols=SYMBOLS,
        bad=sorted(bad, key=lambda found: SEVERITY.index(found.case.status)),
        known=[(note, [found for found in known if found.case.note == note]) for note in notes],
        notes=_notes(result),
        sae=[case for case in result.cases if case.sae],
        plots=list(_family_plots(result, families)),
        gates=(POSITION_GATE, ELEMENT_GATE),
    )


def sentence(result: RunResult) -> str:
    """What the verdict means for a reader who has five seconds."""
    fail, error, known = (result.count(status) for status in (Status.FAIL, Status.ERROR, Status.KNOWN))
    if result.fault:
        return f"The run broke off: {result.fault}. What was judged until then is below."
    if fail:
        said = "1 case diverges" if fail == 1 else f"{fail} cases diverge"
        return f"{said} from PyTorch by more than rounding, and the ledger does not know of it."
    if result.verdict is Verdict.FAIL:
        stale = f"{len(result.stale)} ledger entries no longer hold." if result.stale else ""
        return stale or f"Nothing new diverges, but --strict lets no known divergence pass, and there are {known}."
    if error:
        return f"{error} case{'s' if error > 1 else ''} could not be judged."
    if result.verdict is Verdict.INCONCLUSIVE:
        return "Too little could be compared to say that nothing diverges."
    agree = "Every case that ran computes what PyTorch computes, within rounding."
    return f"Nothing new diverges. {known} known divergence{'s' * (known > 1)} remain." if known else agree


def matrix(result: RunResult, families: list[str]) -> list[Row]:
    """Family × case, rows with the gravest cell first."""
    cells = {name: Cell("NOT RUN", "", f"not run: {reason}", "") for name, reason in result.skipped.items()}
    cells |= {case.id: _cell(case, i) for i, case in enumerate(result.cases)}
    rows = []
    for kind in dict.fromkeys(_kind(name) for name in _ids(result)):
        mine = {family: cell for name, cell in cells.items() if _kind(name) == kind and (family := _family(name))}
        rows.append(Row(kind, [mine.get(family) for family in families], _reasons(mine)))
    order = [*(status.value for status in SEVERITY[:4]), "NOT RUN", "PASS"]
    return sorted(rows, key=lambda row: min(order.index(cell.status) for cell in row.cells if cell))


def _reasons(cells: dict[str, Cell]) -> list[str]:
    """Each reason once, with its families where there are several; a cell that agrees needs none."""
    said: dict[str, list[str]] = {}
    for family, cell in cells.items():
        if cell.status != "PASS":
            said.setdefault(cell.why, []).append(family)
    return [reason if len(said) == 1 else f"{', '.join(names)}: {reason}" for reason, names in said.items()]


def _cell(case: CaseResult, index: int) -> Cell:
    worst, first = case.worst, case.first_divergence
    ratio = "" if worst is None else number(worst.ratio, 2).replace("e+0", "e").replace("e+", "e")
    link = "" if case.status is Status.PASS else f"case-{index}"
    if case.status is Status.PASS:
        name = worst.name if worst else "nothing"
        why = f"{case.compared} tensors agree; the largest ratio is {ratio} of {POSITION_GATE:g}, at {name}"
    elif case.note and case.status is Status.KNOWN:
        why, ratio = case.note, "refused" if case.error else ratio
    elif first is not None:
        shape = f", {case.diagnosis.shape}" if case.diagnosis else ""
        why = f"first at {first.name} ({first.reason}), ratio {number(first.ratio)}{shape}"
    else:
        why, ratio = one_line(case.error), "error" if case.status is Status.ERROR else ratio
    return Cell(case.status.value, ratio or case.status.value.lower(), one_line(why), link)


def _evidence(case: CaseResult, index: int) -> Evidence:
    key = f"case-{index}"
    picture = case.diagnosis if case.diagnosis and case.diagnosis.picture and case.diagnosis.picture[0] else None
    return Evidence(
        case=case,
        anchor=key,
        first=case.first_divergence,
        plot=case_plot(case) if any(tensor.compared for tensor in case.tensors) else None,
        picture=heatmap(picture) if picture else None,
        inherited=sum(1 for tensor in case.tensors if tensor.status is Status.FAIL) - 1,
    )


def _counts(result: RunResult) -> list[dict[str, Any]]:
    """The four tiles, each with what it is made of."""
    tensors = sum(case.compared for case in result.cases)
    noisy = sum(case.unmeasured for case in result.cases)
    parts = [
        (result.count(Status.UNMEASURED), "too noisy, of unknown origin or not to be had from the hub"),
        (result.count(Status.ERROR), "with an error"),
        (len(result.skipped), "not run"),
        (noisy, "single tensors too noisy"),
    ]
    refused = sum(1 for case in result.cases if case.status is Status.KNOWN and case.error)
    known = result.count(Status.KNOWN)
    notes = {
        "compared": f"of {len(result.cases) + len(result.skipped)} cases; {tensors} tensors",
        "diverging": "beyond what rounding explains",
        "known": f"{known - refused} differ, {refused} refused by candle-mi" if known else "recorded in the ledger",
        "unmeasured": ", ".join(f"{count} {what}" for count, what in parts if count) or "everything was measured",
    }
    return [
        {"name": name, "count": count, "note": notes[name]}
        for name, count in {
            "compared": sum(1 for case in result.cases if case.compared),
            "diverging": result.count(Status.FAIL),
            "known": known,
            "unmeasured": sum(count for count, _ in parts[:3]),
        }.items()
    ]


def _notes(result: RunResult) -> dict[str, list[str]]:
    """Each note once, with its cases: a case that agrees shows its notes nowhere else."""
    said: dict[str, list[str]] = {}
    for case in result.cases:
        for note in case.notes:
            said.setdefault(note, []).append(case.id)
    return said


def _family_plots(result: RunResult, families: list[str]) -> Iterable[tuple[str, Markup]]:
    """One plot a family, one line a case."""
    for family in families:
        cases = [case for case in result.cases if case.family == family and any(t.compared for t in case.tensors)]
        # Passing cases are drawn last: they are the many that lie low.
        cases.sort(key=lambda case: SEVERITY.index(case.status))
        lines = [Line(one_line(case.id), case.status.value, case.tensors) for case in cases]
        if lines:
            yield family, ratio_plot(lines)


def _ids(result: RunResult) -> list[str]:
    return [*(case.id for case in result.cases), *result.skipped]


def _family(name: str) -> str:
    return name.split("/")[0]


def _kind(name: str) -> str:
    return name.partition("/")[2] or name
