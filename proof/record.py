"""``python -m proof.record``: from what the proof's commands left in ``build/proof`` to ``fixtures/proof.json``, that
the report shows, and to the tables and numbers of README and docs between their markers.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from candle_mi_parity.errors import ParityError, ProofError
from candle_mi_parity.files.json_out import write_text
from candle_mi_parity.report.proof_record import RECORD, ProofRecord, Table
from candle_mi_parity.run.run import library_versions
from candle_mi_parity.spec.paths import ROOT
from proof import OUT
from proof.rival_views import REAL

PAGES = (ROOT / "README.md", ROOT / "docs" / "what-it-sees.md", ROOT / "docs" / "what-it-costs.md")
_MARKED = re.compile(r"(<!-- proof: ([a-z-]+) -->\n).*?(<!-- /proof -->)", re.DOTALL)

Document = Any


def read(name: str, out: Path = OUT) -> Document:
    """:raises ProofError: the command has not been run."""
    try:
        return json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ProofError(
            f"{out / name}.json: {error}: run make faults, faults SOURCE=1, alarms, rivals, bench"
        ) from error


def faults(planted: Document, source: Document) -> Iterator[Table]:
    columns = ["faults", "killed of scored", "first tensor right of killed"]

    def row(name: str, score: dict[str, Any]) -> list[str]:
        return [name, f"{score['killed']}/{score['scored']}", f"{score['right']}/{score['killed']}"]

    in_torch, in_source = ({score["name"]: score for score in found["scores"]} for found in (planted, source))
    foretold = [found.pop("written before") for found in (in_torch, in_source)]
    before = {key: sum(score[key] for score in foretold) for key in ("scored", "killed", "right")}
    rows = [
        row("in transformers' float32 run, its weights, config, captures and files", in_torch.pop("all")),
        row("in candle-mi's own source", in_source["all"]),
        row("fast lane, in `make test`", in_torch.pop("fast lane")),
        row("written down before their first run, against what was written then", before),
    ]
    yield Table(name="faults", title="Planted faults", note="", columns=columns, rows=rows)
    kinds = [row(name, score) for name, score in in_torch.items() if score["scored"]]
    yield Table(name="fault-kinds", title="Planted faults by kind", note="", columns=columns, rows=kinds)
    odd = [one for one in [*planted["faults"], *source["faults"]] if one["status"] != "KILLED"]
    yield Table(
        name="not-killed",
        title="Faults that were not killed",
        note="An EQUIVALENT row changes nothing by design; its float64 run shows that it does not.",
        columns=["fault", "status", "what it is", "measured"],
        rows=[[one["id"], one["status"], one["says"], one["detail"]] for one in odd],
    )


def doses(found: Document) -> Table:
    """A row a fault: position and element part, for each case and the real one forced."""
    runs = [("llama/hub", "free"), ("gemma2/hub", "free"), (REAL, "free"), (REAL, "forced")]
    sizes = {(one["fault"], one["case"], one["mode"]): (one["position"], one["element"]) for one in found}

    def cell(fault: str, case: str, mode: str) -> str:
        pair = sizes.get((fault, case, mode))
        return "–" if pair is None else ", ".join("not seen" if size is None else f"{size:.1e}" for size in pair)

    return Table(
        name="doses",
        title="The smallest ε that is seen, of a factor 1 + ε",
        note="Position part, element part of the gate; the smaller decides. Right to a factor of two.",
        columns=["fault", *(case if mode == "free" else f"{case}, teacher-forced" for case, mode in runs)],
        rows=[
            [fault, *(cell(fault, *run) for run in runs)] for fault in dict.fromkeys(one["fault"] for one in found)
        ],
    )


def alarms(document: Document) -> Table:
    rows = []
    for setting in dict.fromkeys(dump["setting"] for dump in document["dumps"]):
        dumps = [dump for dump in document["dumps"] if dump["setting"] == setting]
        largest = [f"{max(dump[part] for dump in dumps):.2f}" for part in ("position", "element")]
        rows.append([setting, str(len(dumps)), *largest, str(sum(bool(dump["alarms"]) for dump in dumps))])
    gate = document["gate"]
    return Table(
        name="alarms",
        title="Honest arithmetic",
        note=document["verdict"],
        columns=[
            "setting",
            "dumps",
            f"position, gate {gate['position']:g}",
            f"element, gate {gate['element']:g}",
            "alarms",
        ],
        rows=rows,
    )


def rivals(document: Document) -> Table:
    def cells(rule: Document, real: bool) -> list[str]:
        cases = [case for case in rule["honest"] if (case == REAL) == real]
        honest = [named for case in cases for named in rule["honest"][case].values()]
        asked = [fault for fault in rule["faults"] if fault["case"] in cases]
        told = []
        for key in ("default", "own"):
            killed = [fault for fault in asked if fault[key] is not None]
            right = sum(fault[key] == fault["first"] for fault in killed)
            fair = key == "own" or not any(honest)
            told.append(f"{len(killed)}, {right}" if fair else f"({len(killed)}, {right})")
        return [f"{honest.count(None)}/{len(honest)}", f"{told[0]} of {len(asked)}", told[1]]

    sides = ("tiny", "SmolLM2")
    return Table(
        name="rivals",
        title="Rules that people use today, on the same dumps",
        note="Honest dumps passed at the rule's default; faults killed and first tensors right at its default, in "
        "brackets where it fails honest dumps; the same at 1.5 × the tolerance that the case's honest dumps need.",
        columns=[
            "rule",
            *(f"{side}: {what}" for side in sides for what in ("honest", "killed, right", "own tolerance")),
        ],
        rows=[[rule["name"], *cells(rule, False), *cells(rule, True)] for rule in document["rules"]],
    )


def bench(document: Document) -> Table:
    rows = []
    for figure in document["figures"]:
        limit = "" if figure["below"] is None else f"< {figure['below']:g}"
        said = "" if figure["below"] is None else "kept" if figure["kept"] else "missed"
        rows.append([figure["name"], f"{figure['value']:.3g} {figure['unit']}".strip(), limit, said])
    return Table(
        name="bench",
        title="What it costs",
        note="Ratios are within one run. Seconds are of 2 cores.",
        columns=["what", "measured", "must be", ""],
        rows=rows,
    )


def claims(planted: Document, source: Document, alarm: Document) -> dict[str, str]:
    """The README's sentence about the proof."""
    everywhere = [*planted["faults"], *source["faults"]]
    scored = [score for name in (planted, source) for score in name["scores"] if score["name"] == "all"]
    total, killed, right = (sum(score[key] for score in scored) for key in ("scored", "killed", "right"))
    alarmed = sum(bool(dump["alarms"]) for dump in alarm["dumps"])
    said = f"""It is proven on {len(everywhere)} planted mistakes, {len(source["faults"])} of them in candle-mi's own
        source: {killed} of the {total} that change a number are caught, {right} at the tensor where they were made,
        and {alarmed or "none"} of {len(alarm["dumps"])} honest dumps is."""
    return {"proof": textwrap.fill(" ".join(said.split()), 116)}


def measured_by(documents: list[Document]) -> str:
    """The digest of the rules under which all the documents were measured; ``several`` where it is not one."""
    found = {document.get("measured_by", "unknown") for document in documents}
    return str(found.pop()) if len(found) == 1 else "several"


def filled(page: str, record: ProofRecord) -> str:
    """A page with the record's tables and claims between its markers.

    :raises ProofError: a marker names nothing of the record.
    """
    parts = {table.name: table.markdown() for table in record.tables} | record.claims

    def part(found: re.Match[str]) -> str:
        if found[2] not in parts:
            raise ProofError(f"no table or claim {found[2]} in the record; there are {', '.join(parts)}")
        return f"{found[1]}{parts[found[2]]}\n{found[3]}"

    return _MARKED.sub(part, page)


def main() -> None:
    """Write the record and fill the pages."""
    planted, source, alarm, rival, cost = (read(name) for name in ("faults", "source", "alarms", "rivals", "bench"))
    record = ProofRecord(
        format="candle-mi-parity/proof/1",
        versions=library_versions(),
        rules=measured_by([planted, source, alarm, rival, cost]),
        claims=claims(planted, source, alarm),
        tables=[
            *faults(planted, source),
            doses(read("doses")),
            alarms(alarm),
            rivals(rival),
            bench(cost),
        ],
    )
    write_text(json.dumps(record.model_dump(), indent=1, ensure_ascii=False) + "\n", RECORD)
    for path in PAGES:
        write_text(filled(path.read_text(encoding="utf-8"), record), path)


if __name__ == "__main__":
    try:
        main()
    except ParityError as error:
        sys.exit(f"record: {error}")
