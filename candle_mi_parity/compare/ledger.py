"""Known divergences: ``fixtures/known_divergences.toml``, what each excuses and when it is stale.

An entry excuses one divergence of one case of one candle-mi, recognised by its first tensor, its size and the
set of tensors that still diverge when every half-layer is fed the truth. Anything else in that case is a failure.
"""

from __future__ import annotations

import fnmatch
import json
import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.errors import LedgerError
from candle_mi_parity.spec.cases import Row, read_toml
from candle_mi_parity.spec.paths import FIXTURES
from candle_mi_parity.trace.trace import CandleMi

SAME_DECADE = 0.5
"""Two ratios are the same divergence when their log10 differ by less."""


class Entry(Row):
    """What is known of a case in a release.

    :ivar checksum: the registry's, of the release that was measured.
    """

    case: str
    version: str
    checksum: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    why: Annotated[str, Field(min_length=10)]

    def concerns(self, case: CaseResult, candidate: CandleMi) -> bool:
        """Whether this is the entry of a case and candidate; a build from source goes by its version alone."""
        same = candidate.checksum == self.checksum or candidate.source != "registry"
        return self.case == case.id and self.version == candidate.version and same


class Known(Entry):
    """A divergence.

    :ivar digest: of the case, so that an entry dies with the case it was measured on.
    :ivar ratio: of the first diverging tensor (``TensorResult.ratio``); inf where a masked entry is not 0.
    :ivar forced: names that diverge teacher-forced; ``blocks.*.x`` stands for every layer.
    """

    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    first: str
    ratio: Annotated[float, Field(gt=0)]
    forced: list[str]

    def difference(self, case: CaseResult) -> str:
        """Why the divergence of a case is not the one recorded; empty when it is."""
        first = case.first_divergence
        if case.digest != self.digest:
            return f"the case's digest is {case.digest[:12]}…, recorded {self.digest[:12]}…"
        if first is None or first.name != self.first:
            return f"first divergence at {first.name if first else 'no tensor'}, recorded at {self.first}"
        # Of a stored part the largest ratio may lie elsewhere: there it may be smaller, never larger.
        if not (_same_size(first.ratio, self.ratio) or (case.in_part and first.ratio < self.ratio)):
            return f"ratio {first.ratio:.3g} at {first.name}, recorded {self.ratio:.3g}"
        names = [tensor.name for tensor in case.forced if not tensor.name.startswith("logits.")]
        recorded = {name for pattern in self.forced for name in fnmatch.filter(names, pattern)}
        if recorded != set(case.forced_divergences):
            odd = sorted(recorded ^ set(case.forced_divergences))
            return f"teacher-forced, {len(odd)} tensors differ from the record, as {odd[0]}"
        return ""


def _same_size(ratio: float, recorded: float) -> bool:
    if math.isinf(recorded) or math.isinf(ratio):
        return ratio == recorded
    return ratio > 0 and abs(math.log10(ratio / recorded)) < SAME_DECADE


class Refusal(Entry):
    """A case that a release refuses with a clear error, as it should for what it does not support.

    :ivar error: a part of the message.
    """

    error: Annotated[str, Field(min_length=10)]


class Ledger(Row):
    """The whole file."""

    format: Literal[1]
    known: list[Known] = Field(default_factory=list)
    refused: list[Refusal] = Field(default_factory=list)

    def entry(self, case: CaseResult, candidate: CandleMi) -> Known | None:
        return next((entry for entry in self.known if entry.concerns(case, candidate)), None)

    def refusal(self, case: CaseResult, candidate: CandleMi) -> Refusal | None:
        return next((entry for entry in self.refused if entry.concerns(case, candidate)), None)

    def stale(self, case: CaseResult, candidate: CandleMi) -> list[str]:
        """What the ledger still says of a case that no longer diverges, or is no longer refused.

        A build from source that mends a divergence does not make the release's entry stale.
        """
        if candidate.source != "registry":
            return []
        lines = []
        if case.status is Status.PASS and self.entry(case, candidate):
            lines.append(f"{case.id} no longer diverges in candle-mi {candidate.version}: remove its entry")
        if not case.error and self.refusal(case, candidate):
            lines.append(f"{case.id} is no longer refused by candle-mi {candidate.version}: remove its entry")
        return lines


def load_ledger(path: Path = FIXTURES / "known_divergences.toml") -> Ledger:
    """The ledger.

    :raises LedgerError: unreadable, unknown key, wrong type, or two entries for one case and release.
    """
    ledger = read_toml(path, Ledger, LedgerError)
    keys = [(entry.case, entry.version, entry.checksum) for entry in ledger.known]
    keys += [(entry.case, entry.version, entry.checksum) for entry in ledger.refused]
    if doubled := next((key for key in keys if keys.count(key) > 1), None):
        raise LedgerError(f"{path}: two entries for {doubled[0]} at {doubled[1]}")
    return ledger


def apply_ledger(case: CaseResult, candidate: CandleMi, ledger: Ledger) -> None:
    """Turn a case into KNOWN when it does what its entry records; say what differs when it does not."""
    if case.status is Status.ERROR:
        refusal = ledger.refusal(case, candidate)
        if refusal is not None and is_refusal(case) and refusal.error in case.error:
            case.status, case.known = Status.KNOWN, f"{_origin(candidate)}refused: {refusal.why}"
        return
    entry = ledger.entry(case, candidate)
    if entry is None or case.status is not Status.FAIL:
        return
    if difference := entry.difference(case):
        case.known = f"not the known divergence: {difference}"
        return
    case.status = Status.KNOWN
    case.known = _origin(candidate) + entry.why


def _origin(candidate: CandleMi) -> str:
    return "" if candidate.source == "registry" else f"as in {candidate.version}: "


def proposed_entry(case: CaseResult, candidate: CandleMi) -> str:
    """The TOML of an entry for a diverging or refused case; ``why`` is a person's, and refused while empty."""
    first = case.first_divergence
    if first is None:
        return (
            f'[[refused]]\ncase = "{case.id}"\nversion = "{candidate.version}"\n'
            f'checksum = "{candidate.checksum or ""}"\nerror = {json.dumps(case.error)}\nwhy = ""\n'
        )
    names = [tensor.name for tensor in case.forced if not tensor.name.startswith("logits.")]
    forced = ", ".join(f'"{name}"' for name in _compress(case.forced_divergences, names))
    return (
        f'[[known]]\ncase = "{case.id}"\ndigest = "{case.digest}"\nversion = "{candidate.version}"\n'
        f'checksum = "{candidate.checksum or ""}"\nfirst = "{first.name}"\nratio = {first.ratio:.3e}\n'
        f'forced = [{forced}]\nwhy = ""\n'
    )


def is_refusal(case: CaseResult) -> bool:
    """Whether candle-mi itself said no, at loading or running; a crash, a hang or a bad file is none."""
    return case.error.startswith(("model:", "sae:", "forward:"))


def _compress(diverging: list[str], names: list[str]) -> list[str]:
    """``blocks.*.x`` where every layer's x diverges, the names themselves elsewhere."""
    patterns: list[str] = []
    for name in diverging:
        head, _, rest = name.partition(".")
        pattern = f"blocks.*.{rest.partition('.')[2]}" if head == "blocks" else name
        whole = set(fnmatch.filter(names, pattern)) <= set(diverging)
        patterns.append(pattern if whole else name)
    return list(dict.fromkeys(patterns))
