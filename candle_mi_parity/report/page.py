"""``report.html``: one file without scripts and external resources, made from a :class:`RunResult`.

Its content security policy forbids scripts and requests, and jinja2 escapes all values, because names and errors come
from untrusted traces.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from markupsafe import Markup

from candle_mi_parity.compare.gate import ELEMENT_GATE, POSITION_GATE
from candle_mi_parity.compare.run_result import RunResult
from candle_mi_parity.compare.sae_view import SaeView
from candle_mi_parity.compare.suspects import suspect
from candle_mi_parity.compare.verdict import CaseResult, Outcome, Status
from candle_mi_parity.files.escape import number, one_line, rendered
from candle_mi_parity.report.causes import NEW, known_causes, known_together, new_causes, right
from candle_mi_parity.report.plots import case_plot, heatmap, line_of, ratio_plot
from candle_mi_parity.spec.families import MAPPED, RECURRENT

SEVERITY = [Status.FAIL, Status.ERROR, Status.UNMEASURED, Status.KNOWN, Status.PASS]
NOT_RUN = "NOT-RUN"
Reason = tuple[list[str], tuple[str, ...], str]
ROWS = {
    "hub": "config.json as on the hub from 2023 to 2025",
    "v5": "the same model as transformers 5 saves it",
    "bf16*": "computed in bfloat16",
    "f16*": "computed in float16",
    "one-token": "a prompt of one token",
    "long": "a prompt of 600 tokens",
    "batch": "two prompts at once",
    "past-max-position": "a prompt longer than max_position_embeddings",
    "sharded": "weights in three files",
    "window*": "a prompt longer than the sliding window",
    "absent*": "config keys left out, so that each library uses its own default",
    "tie": "embedding and unembedding share their weights",
    "rope-*": "another base or scaling of the rotary embedding",
    "sae-*": "a sparse autoencoder after a layer, in SAELens' format",
    "edit-*": "an intervention at a hook point",
    "scope-l0": "Gemma 2 2B with Gemma Scope",
    "generated": "a model of the size of Gemma 2 2B",
    "*": "the config field of that name at another value than usual",
}
"""Glob over row names → description of their cases; the first match counts."""
FEATURES = {
    "RWKV": ["rwkv*"],
    "transcoders": ["*/edit-clt*", "*/edit-plt*"],
    "quantised weights": ["*/nf4*", "*/fp4*", "*/int8*", "*/awq*", "*/gptq*"],
    "bidirectional decoders": ["Dream/*", "a2d-*", "*/bidirectional*"],
    "from_pretrained": ["*/pretrained*"],
    "recurrent passes": ["*/recurrent*"],
    "interventions": ["*/edit-*"],
    "sparse autoencoders": ["*/sae-*", "*/scope-*"],
    "models": ["*"],
}
"""Feature → globs over its cases; the first match counts."""


@dataclass(frozen=True)
class MatrixCell:
    """One cell of the matrix.

    :ivar status: PASS, KNOWN …, which determines its colour; ``sign`` stands for its outcome.
    :ivar text: the largest ratio, or the outcome.
    :ivar why: one sentence.
    :ivar link: anchor of the case's evidence; may be empty.
    :ivar ids: of the known causes.
    """

    status: str
    sign: str
    text: str
    why: str
    link: str = ""
    ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class MatrixRow:
    """One kind of case in every family; ``cells`` has None for families without it.

    :ivar reasons: why cells do not agree: families, ids of known causes, and a sentence where there are no ids.
    """

    name: str
    about: str
    cells: list[MatrixCell | None]
    reasons: list[Reason]


@dataclass(frozen=True)
class MatrixGroup:
    """The cases of one feature.

    :ivar counts: outcome → its sign and number of cases; of cases that were not run, a dash.
    :ivar legend: description → the rows that it is of.
    :ivar wanted: whether a case is neither right nor known, so that the group is open.
    """

    name: str
    families: list[str]
    rows: list[MatrixRow]
    counts: dict[str, tuple[str, int]]
    legend: dict[str, list[str]]
    wanted: bool


def render(result: RunResult) -> str:
    """The whole page."""
    families = list(dict.fromkeys(_family(name) for name in _ids(result)))
    new, known = new_causes(result), known_together(result)
    places = {case.id: place for place, case in enumerate(result.results)}
    shown = [(cause, case) for cause in [*new, *known] for case in cause.cases]
    return rendered(
        "page.html.j2",
        result=result,
        questions=[_answer(right(result), result.is_right()), _answer(NEW, result.is_new())],
        covered=[*MAPPED, *RECURRENT],
        tally=result.tally(),
        causes=[*new, *known_causes(result)],
        anchors={case.id: cause.anchor for cause, case in shown},
        evidence={case.id: _evidence(case, places[case.id]) for _, case in shown},
        groups=groups(result),
        Outcome=Outcome,
        new=new,
        known=known,
        sae=sorted(_sae_rows(result), key=lambda row: SEVERITY.index(row[2])),
        plots=list(_family_plots(result, families)),
        gates=(POSITION_GATE, ELEMENT_GATE),
    )


def _answer(question: str, sentence: str) -> tuple[str, str, str]:
    """The question, its answer in one or two words, and the rest of the sentence."""
    word, _, rest = sentence.partition(": ")
    return question, word.removesuffix("."), rest


def groups(result: RunResult) -> list[MatrixGroup]:
    """The cases by feature, in the order of the first case of each."""
    cells = {case.id: _cell(case, place) for place, case in enumerate(result.cases)}
    cells |= {
        name: MatrixCell(NOT_RUN, "–", "not run", f"not run: {reason}") for name, reason in result.skipped.items()
    }
    outcomes = {case.id: case.outcome.value for case in result.cases}
    features: dict[str, list[str]] = {}
    for name in _ids(result):
        features.setdefault(_feature(name), []).append(name)
    return [_group(feature, {name: cells[name] for name in names}, outcomes) for feature, names in features.items()]


def _feature(name: str) -> str:
    return next(feature for feature, globs in FEATURES.items() if any(fnmatch.fnmatchcase(name, g) for g in globs))


def _group(feature: str, cells: dict[str, MatrixCell], outcomes: dict[str, str]) -> MatrixGroup:
    counts: dict[str, tuple[str, int]] = {}
    for name, cell in cells.items():
        outcome = outcomes.get(name, "not run")
        counts[outcome] = cell.sign, counts.get(outcome, ("", 0))[1] + 1
    order = [*(outcome.value for outcome in Outcome), "not run"]
    counts = {outcome: counts[outcome] for outcome in order if outcome in counts}
    families = list(dict.fromkeys(_family(name) for name in cells))
    rows = _rows(cells, families)
    legend = {about: [row.name for row in rows if row.about == about] for about in ROWS.values()}
    wanted = any(cell.status not in ("PASS", "KNOWN", NOT_RUN) for cell in cells.values())
    return MatrixGroup(feature, families, rows, counts, legend, wanted)


def _rows(cells: dict[str, MatrixCell], families: list[str]) -> list[MatrixRow]:
    """Rows of cases by family, those with the gravest cell first."""
    rows = []
    for kind in dict.fromkeys(_kind(name) for name in cells):
        mine = {_family(name): cell for name, cell in cells.items() if _kind(name) == kind}
        about = next(about for pattern, about in ROWS.items() if fnmatch.fnmatchcase(kind, pattern))
        rows.append(MatrixRow(kind, about, [mine.get(family) for family in families], _reasons(mine)))
    order = [*(status.value for status in SEVERITY[:4]), NOT_RUN, "PASS"]
    return sorted(rows, key=lambda row: min(order.index(cell.status) for cell in row.cells if cell))


def _reasons(cells: dict[str, MatrixCell]) -> list[Reason]:
    """Each reason once, with its families."""
    found: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for family, cell in cells.items():
        if cell.status != "PASS":
            found.setdefault((cell.ids, "" if cell.ids else cell.why), []).append(family)
    return [(names if len(found) > 1 else [], ids, text) for (ids, text), names in found.items()]


def _cell(case: CaseResult, place: int) -> MatrixCell:
    worst, first = case.worst, case.first_divergence
    ratio = "" if worst is None else number(worst.ratio, 2).replace("e+0", "e").replace("e+", "e")
    cell = MatrixCell(case.status.value, case.outcome.sign, ratio or case.outcome.value, "", f"case-{place}")
    if case.status is Status.PASS:
        size = f"the largest ratio is {ratio} of {POSITION_GATE:g}, at {worst.name}" if worst else "none was compared"
        return replace(cell, why=one_line(f"{case.compared} tensors agree; {size}"), link="")
    if case.status is Status.KNOWN and case.explained:
        return replace(cell, why=one_line(case.note), ids=tuple(case.explained.ids))
    if first is not None:
        shape = f", {case.diagnosis.shape}" if case.diagnosis else ""
        why = f"first at {first.name} ({first.reason}), ratio {number(first.ratio)}{shape}"
        return replace(cell, why=one_line(why))
    return replace(cell, why=one_line(case.error))


def _evidence(case: CaseResult, place: int) -> dict[str, object]:
    """Evidence for a case that does not agree; ``suspect`` is the part of candle-mi to look at."""
    first, found = case.first_divergence, case.diagnosis
    return {
        "case": case,
        "anchor": f"case-{place}",
        "suspect": suspect(first.name) if first else "",
        "plot": case_plot(case) if sum(tensor.compared > 0 for tensor in case.tensors) > 1 else None,
        "picture": heatmap(found) if found and found.picture and found.picture[0] else None,
        "inherited": sum(1 for tensor in case.tensors if tensor.status is Status.FAIL) - 1,
    }


def _sae_rows(result: RunResult) -> Iterator[tuple[CaseResult, SaeView, Status, str]]:
    """Each SAE chain of each case, its status and sign; it diverges if one of its tensors or scalars does."""
    for case in result.cases:
        for view in case.sae:
            own = {tensor.status for tensor in case.tensors if tensor.name.startswith(f"{view.chain}.")}
            worst = next((status for status in SEVERITY if status in own), case.status)
            known = worst is Status.FAIL and case.status is Status.KNOWN
            sign = {Status.FAIL: Outcome.DIVERGES, Status.PASS: Outcome.AGREES}.get(worst, Outcome.UNMEASURED).sign
            yield case, view, Status.KNOWN if known else worst, sign


def _family_plots(result: RunResult, families: list[str]) -> Iterable[tuple[str, Markup]]:
    """One plot for each family, with one line for each case."""
    for family in families:
        cases = [case for case in result.cases if case.family == family and any(t.compared for t in case.tensors)]
        cases.sort(key=lambda case: SEVERITY.index(case.status))
        if cases:
            yield family, ratio_plot([line_of(case, case.tensors, "", f"{one_line(case.id)}: ") for case in cases])


def _ids(result: RunResult) -> list[str]:
    return [*(case.id for case in result.cases), *result.skipped]


def _family(name: str) -> str:
    return name.split("/")[0]


def _kind(name: str) -> str:
    return name.partition("/")[2] or name
