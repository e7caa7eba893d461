"""Every row of the config-field ledger held against what transformers reads and computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from candle_mi_parity.coverage.fields import Excited, Excused, FieldError, FieldLedger
from candle_mi_parity.coverage.sensitivity import ROTARY, Effect, effect
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.models.resolve import model_directory
from candle_mi_parity.oracle.fields_read import cached_fields_read
from candle_mi_parity.spec.cases import Case, TinyModel
from candle_mi_parity.spec.counterfactual import places
from candle_mi_parity.spec.families import FAMILIES

EXCITING = 100.0
"""A case excites a field when the field moves some tensor by more than this many times its rounding noise."""

INERT = 1e-3
"""A field is inert when it moves nothing by more than this: room for the order of a float64 sum, and no more."""


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    :ivar ratio: truth change over noise; None where shapes change or transformers refuses.
    :ivar fault: why the row does not hold; empty when it does.
    """

    family: str
    field: str
    cover: str
    ratio: float | None
    fault: str


def family_fields(cases: list[Case], cache: Path) -> set[str]:
    """Fields read over all generated configs among the cases of one family."""
    found: set[str] = set()
    for case in generated(cases):
        found |= cached_fields_read(model_directory(case.model, cache), case.family, cache)
    return found


def generated(cases: list[Case]) -> list[Case]:
    """The cases whose model is made from a config in ``fixtures/models``, but for the one of full size."""
    return [case for case in cases if isinstance(case.model, TinyModel) and case.lane == "default"]


def rope_type(case: Case, cache: Path) -> str:
    """The rope type that a case's ``config.json`` asks for, in whichever spelling."""
    config = read_config(model_directory(case.model, cache))
    for field in (f"{ROTARY}.rope_type", f"{ROTARY}.type"):
        for path in places(config, field):
            if len(path) == 2:
                return str(config[path[0]][path[1]])  # type: ignore[index]
    return "default"


def check(ledger: FieldLedger, cases: list[Case], cache: Path, families: list[str] | None = None) -> list[Finding]:
    """Hold every row of the ledger against what transformers reads and computes.

    :param families: those to check; None checks all, and that no common row is stale.
    :raises ParityError: a case's own truth cannot be computed.
    """
    findings: list[Finding] = []
    used: set[str] = set()
    for family in families or list(FAMILIES):
        own = [case for case in cases if case.family == family]
        read = family_fields(own, cache)
        used |= read - set(ledger.family.get(family, {}))
        findings += _rope_types(ledger, family, cases, cache)
        findings += _rows(ledger, family, own, read, cache)
    if families is None:
        findings += [_fault("*", field, STALE) for field in ledger.common if field not in used]
    return findings


STALE = "stale: transformers does not read it"


def _fault(family: str, field: str, fault: str) -> Finding:
    return Finding(family, field, "", None, fault)


def _rope_types(ledger: FieldLedger, family: str, cases: list[Case], cache: Path) -> list[Finding]:
    """Every rope type that transformers has needs a case: what only it reads would stay unseen."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # takes seconds, and few ask this

    theirs = {rope_type(case, cache): case for case in generated(cases)}
    own = {rope_type(case, cache) for case in generated(cases) if case.family == family}
    refused = ledger.refused_ropes.get(family, [])
    base = _base(family, cases)
    findings = []
    for kind in sorted({*ROPE_INIT_FUNCTIONS, *refused} - own):
        field = f"{ROTARY} = {kind}"
        if kind not in refused or kind not in theirs:
            findings.append(_fault(family, field, "no case has this rope type"))
            continue
        block = theirs[kind].model.change["rope_scaling"]  # type: ignore[union-attr]
        found = effect(base, {"rope_scaling": block}, cache)
        fault = "" if found.outcome == "refused" else f"not refused: {found.outcome}"
        findings.append(Finding(family, field, "refused", None, fault))
    return findings


def _base(family: str, cases: list[Case]) -> Case:
    """The case at which inert, structural and refused values are tried.

    :raises FieldError: when there is none.
    """
    base = next((case for case in cases if case.id == f"{family}/hub"), None)
    if base is None:
        raise FieldError(f"there is no case {family}/hub to try config values at")
    return base


def _rows(ledger: FieldLedger, family: str, own: list[Case], read: set[str], cache: Path) -> list[Finding]:
    base = _base(family, own)
    rows = {field: ledger.row(family, field) for field in sorted(read)}
    still = {field: row.other for field, row in rows.items() if isinstance(row, Excused) and row.kind == "inert"}
    together = effect(base, still, cache)
    findings = []
    for field, row in rows.items():
        if row is None:
            findings.append(_fault(family, field, "unlisted: transformers reads it and no row covers it"))
        elif isinstance(row, Excited):
            findings.append(_excited(family, field, row, own, cache))
        else:
            # All inert values are tried at once; one at a time only to find which of them moved the truth.
            alone = not (row.kind == "inert" and _is_still(together))
            found = effect(base, {field: row.other}, cache) if alone else together
            findings.append(_excused(family, field, row, found))
    findings += [_fault(family, field, STALE) for field in ledger.family.get(family, {}) if field not in read]
    return findings


def _is_still(found: Effect) -> bool:
    return found.outcome == "moved" and found.ratio <= INERT


def _excited(family: str, field: str, row: Excited, own: list[Case], cache: Path) -> Finding:
    case = next((case for case in generated(own) if case.id == row.excited_by), None)
    if case is None:
        return Finding(family, field, row.excited_by, None, "there is no such generated case of this family")
    if not places(read_config(model_directory(case.model, cache)), field):
        return Finding(family, field, row.excited_by, None, "the case does not set it")
    found = effect(case, {field: row.against}, cache)
    if found.outcome != "moved":
        fault = f"no ratio: {found.outcome} ({found.detail}); compare it `against` another value"
        return Finding(family, field, row.excited_by, None, fault)
    fault = "" if found.ratio > EXCITING else f"moves the truth by only {found.ratio:.3g} × noise, gate {EXCITING:g}"
    return Finding(family, field, row.excited_by, found.ratio, fault)


def _excused(family: str, field: str, row: Excused, found: Effect) -> Finding:
    ratio = found.ratio if found.outcome == "moved" else None
    holds = _is_still(found) if row.kind == "inert" else found.outcome == row.kind
    what = f"{found.ratio:.3g} × noise at {found.detail}" if found.outcome == "moved" else found.detail
    fault = "" if holds else f"not {row.kind} at {row.other!r}: {found.outcome}, {what}"
    return Finding(family, field, f"{row.kind}: {row.reason}", ratio, fault)
