"""Every row of the config-field ledger held against what transformers reads and computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from candle_mi_parity.coverage.fields import CoveredField, FieldError, FieldLedger, WaivedField
from candle_mi_parity.coverage.sensitivity import ROTARY, Effect, effect
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.models.resolve import model_directory
from candle_mi_parity.models.transformers_private import private
from candle_mi_parity.oracle.fields_read import cached_fields_read
from candle_mi_parity.spec.cases import Case, TinyModel
from candle_mi_parity.spec.counterfactual import places
from candle_mi_parity.spec.families import FAMILIES

COVERING = 100.0
"""A case covers a field that changes some tensor by more than this multiple of its rounding noise."""

NO_EFFECT = 1e-3
"""Largest change by a field without effect, in rounding noise: room for the order of a float64 sum."""


@dataclass(frozen=True)
class FieldFinding:
    """One line of the table.

    :ivar ratio: change of the truth over noise; None if shapes change or transformers raises an error.
    :ivar fault: why the row does not hold; empty if it does.
    """

    family: str
    field: str
    cover: str
    ratio: float | None
    fault: str


def family_fields(cases: list[Case], cache: Path) -> set[str]:
    """Fields read over all generated configs among the cases of one family."""
    directories = ((model_directory(case.model, cache), case.family) for case in generated(cases))
    return {field for directory, family in directories for field in cached_fields_read(directory, family, cache)}


def generated(cases: list[Case]) -> list[Case]:
    """The cases of the default lane whose model is generated from a config in ``fixtures/models``."""
    return [case for case in cases if isinstance(case.model, TinyModel) and case.lane == "default"]


def rope_type(case: Case, cache: Path) -> str:
    """The rope type in a case's ``config.json``, in either spelling."""
    config = read_config(model_directory(case.model, cache))
    for field in (f"{ROTARY}.rope_type", f"{ROTARY}.type"):
        for path in places(config, field):
            if len(path) == 2:
                return str(config[path[0]][path[1]])  # type: ignore[index]
    return "default"


def check(
    ledger: FieldLedger, cases: list[Case], cache: Path, families: list[str] | None = None
) -> list[FieldFinding]:
    """Compare every row of the ledger with what transformers reads and computes.

    :param families: families to check; None checks all, and that no common row is stale.
    :raises ParityError: the truth of a case cannot be computed.
    """
    findings: list[FieldFinding] = []
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


def _fault(family: str, field: str, fault: str) -> FieldFinding:
    return FieldFinding(family, field, "", None, fault)


def _rope_types(ledger: FieldLedger, family: str, cases: list[Case], cache: Path) -> list[FieldFinding]:
    """Every rope type of transformers needs a case, because it may read fields that no other reads."""
    examples = {rope_type(case, cache): case for case in generated(cases) if _scales(case)}
    own = {rope_type(case, cache) for case in generated(cases) if case.family == family}
    refused = ledger.refused_ropes.get(family, [])
    base = _base(family, cases)
    findings = []
    for kind in sorted({*private("modeling_rope_utils.ROPE_INIT_FUNCTIONS"), *refused} - own):
        field = f"{ROTARY} = {kind}"
        if kind not in refused or kind not in examples:
            findings.append(_fault(family, field, "no case has this rope type"))
            continue
        block = examples[kind].model.change["rope_scaling"]  # type: ignore[union-attr]
        found = effect(base, {"rope_scaling": block}, cache)
        fault = "" if found.outcome == "refused" else f"not refused: {found.outcome}"
        findings.append(FieldFinding(family, field, "refused", None, fault))
    return findings


def _scales(case: Case) -> bool:
    return isinstance(case.model, TinyModel) and "rope_scaling" in case.model.change


def _base(family: str, cases: list[Case]) -> Case:
    """The case at which the values of waived fields are tried.

    :raises FieldError: there is none.
    """
    base = next((case for case in cases if case.id == f"{family}/hub"), None)
    if base is None:
        raise FieldError(f"there is no case {family}/hub to try config values at")
    return base


def _rows(ledger: FieldLedger, family: str, own: list[Case], read: set[str], cache: Path) -> list[FieldFinding]:
    base = _base(family, own)
    rows = {field: ledger.row(family, field) for field in sorted(read)}
    no_effect = {
        field: row.other for field, row in rows.items() if isinstance(row, WaivedField) and row.kind == "no_effect"
    }
    together = effect(base, no_effect, cache)
    findings = []
    for field, row in rows.items():
        if row is None:
            findings.append(_fault(family, field, "unlisted: transformers reads it, and no row covers it"))
        elif isinstance(row, CoveredField):
            findings.append(_covered(family, field, row, own, cache))
        else:
            # Values without effect are tried all at once; one at a time only to find the one that has an effect.
            alone = not (row.kind == "no_effect" and _has_no_effect(together))
            found = effect(base, {field: row.other}, cache) if alone else together
            findings.append(_waived(family, field, row, found))
    findings += [_fault(family, field, STALE) for field in ledger.family.get(family, {}) if field not in read]
    return findings


def _has_no_effect(found: Effect) -> bool:
    return found.outcome == "moved" and found.ratio <= NO_EFFECT


def _covered(family: str, field: str, row: CoveredField, own: list[Case], cache: Path) -> FieldFinding:
    case = next((case for case in generated(own) if case.id == row.covered_by), None)
    if case is None:
        return FieldFinding(family, field, row.covered_by, None, "there is no such generated case of this family")
    if not places(read_config(model_directory(case.model, cache)), field):
        return FieldFinding(family, field, row.covered_by, None, "the case does not set it")
    found = effect(case, {field: row.against}, cache)
    if found.outcome != "moved":
        fault = f"no ratio: {found.outcome} ({found.detail}); compare it `against` another value"
        return FieldFinding(family, field, row.covered_by, None, fault)
    size = 0.0 if _has_no_effect(found) else found.ratio  # the last bits depend on the processor
    fault = "" if size > COVERING else f"changes the truth by only {size:.3g} × noise, gate {COVERING:g}"
    return FieldFinding(family, field, row.covered_by, found.ratio, fault)


def _waived(family: str, field: str, row: WaivedField, found: Effect) -> FieldFinding:
    ratio = found.ratio if found.outcome == "moved" else None
    holds = _has_no_effect(found) if row.kind == "no_effect" else found.outcome == row.kind
    what = f"{found.ratio:.3g} × noise at {found.detail}" if found.outcome == "moved" else found.detail
    fault = "" if holds else f"not {row.kind} at {row.other!r}: {found.outcome}, {what}"
    return FieldFinding(family, field, f"{row.kind}: {row.reason}", ratio, fault)
