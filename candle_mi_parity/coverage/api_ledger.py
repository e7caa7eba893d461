"""The ledger of public functions: ``fixtures/api.toml``, what compares each one of candle-mi's, or why nothing does.

Which functions there are comes from rustdoc (:mod:`api`). Every function of every release matches one row.
"""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from candle_mi_parity.candidate.build import EMITTER
from candle_mi_parity.coverage.api import RELEASES, ApiError, Surface, load_surface
from candle_mi_parity.spec.cases import Row, read_toml
from candle_mi_parity.spec.paths import FIXTURES, ROOT

Reason = Literal[
    "accessor",
    "builder",
    "display",
    "hub",
    "random",
    "internal layer",
    "delegates",
    "no PyTorch counterpart",
    "other feature",
    "not yet",
]
"""Why a function is not compared by itself. ``internal layer``: compared through the forward that calls it.
``delegates``: hands its arguments to a function that is compared. ``not yet``: PyTorch could be asked, and is not."""

NUMBERLESS = frozenset({"accessor", "builder", "display"})
"""Reasons that no function may have which returns numbers of its own."""

_CALLED_AS = {"fmt": "to_string"}
"""How a method is called where its own name is not written."""

Pattern = Annotated[str, Field(min_length=1)]


class ApiRow(Row):
    """One row.

    :ivar items: documented paths, or globs over them.
    :ivar compared: what compares them, see :class:`Comparisons`.
    :ivar why: one line that goes with ``reason``.
    """

    items: Annotated[list[Pattern], Field(min_length=1)]
    compared: Annotated[list[Pattern], Field(min_length=1)] | None = None
    reason: Reason | None = None
    why: Annotated[str, Field(min_length=10, pattern=r"^[^\n]*$")] | None = None

    @model_validator(mode="after")
    def _one_cover(self) -> ApiRow:
        if (self.compared is None) == (self.reason is None):
            raise ValueError("give exactly one of `compared` and `reason`")
        if (self.reason is None) != (self.why is None):
            raise ValueError("`why` goes with `reason`, and with nothing else")
        return self

    @property
    def cover(self) -> str:
        return self.reason or "compared"


class ApiLedger(Row):
    """The whole file."""

    format: Literal[1]
    api: Annotated[list[ApiRow], Field(min_length=1)]


def load_api(path: Path = FIXTURES / "api.toml") -> ApiLedger:
    """The ledger.

    :raises ApiError: unreadable, unknown or missing key, a reason outside the vocabulary.
    """
    return read_toml(path, ApiLedger, ApiError)


# --- what compares --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparisons:
    """The comparisons that a row may name.

    :ivar edits: ``edit:<kind>``, the kinds that some case's edits have.
    :ivar calls: ``call:<fn>``, the functions that some row of ``fixtures/calls.toml`` calls.
    :ivar named: what every case, or a whole test, compares.
    :ivar emitted: every name that the emitter's source calls, be it candle-mi's or not.
    """

    edits: frozenset[str]
    calls: frozenset[str]
    named: frozenset[str]
    emitted: frozenset[str]

    def fault(self, reference: str) -> str:
        """What is wrong with a reference; empty when it exists."""
        kind, colon, name = reference.partition(":")
        known = {"edit": self.edits, "call": self.calls}.get(kind) if colon else None
        where = {"edit": "no case has such an edit", "call": "no row of calls.toml calls it"}.get(kind, "")
        if known is None:
            return "" if reference in self.named else f"{reference}: no such comparison"
        return "" if name in known else f"{reference}: {where}"


def comparisons(fixtures: Path = FIXTURES, root: Path = ROOT, emitter: Path = EMITTER) -> Comparisons:
    """Read from the data files as they are: the tables have readers of their own, which check them.

    :raises ApiError: a file that is no TOML.
    """
    cases = _rows(fixtures / "cases.toml", "case")
    # A file of its own, which a suite without calls lacks: then every call: reference is dead.
    calls = _rows(fixtures / "calls.toml", "call") if (fixtures / "calls.toml").exists() else []
    exists: dict[str, Callable[[], bool]] = {
        # Every case compares each hook tensor of a forward, and projects the truth's residuals onto the vocabulary.
        "hooks": lambda: bool(cases),
        "lens": lambda: bool(cases) and (root / "tests" / "test_logits.py").is_file(),
        # tests/test_tokens.py: encode, encode_raw and decode on fixtures/texts.json.
        "tokens": lambda: (root / "tests" / "test_tokens.py").is_file() and (fixtures / "texts.json").is_file(),
        # The cases read a config by name, the census by shape.
        "config": lambda: bool(cases) and (fixtures / "census.toml").is_file(),
        "sae": lambda: any("sae" in case for case in cases),
    }
    return Comparisons(
        edits=frozenset(str(edit.get("kind")) for case in cases for edit in case.get("edits", [])),
        calls=frozenset(str(call.get("fn")) for call in calls),
        named=frozenset(name for name, check in exists.items() if check()),
        emitted=emitted(emitter),
    )


def emitted(emitter: Path) -> frozenset[str]:
    """The names that the emitter's source calls, without its tests and comments."""
    files = [path for path in sorted((emitter / "src").glob("*.rs")) if not path.stem.endswith("_tests")]
    code = "\n".join(re.sub(r"//.*", "", path.read_text(encoding="utf-8")) for path in files)
    return frozenset(re.findall(r"(?:\.|::)(\w+)\(", code))


def _rows(path: Path, key: str) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8")).get(key, [])
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ApiError(f"{path}: {error}") from error
    return rows


# --- the check ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ApiTotals:
    """One release in numbers; ``covers`` counts ``compared`` and each reason, ``added`` since the release before."""

    version: str
    functions: int
    covers: Mapping[str, int]
    added: tuple[str, ...]
    removed: tuple[str, ...]


def row_of(ledger: ApiLedger, item: str) -> list[ApiRow]:
    """The rows that a function matches: one when the ledger is right."""
    return [row for row in ledger.api if any(_matches(item, pattern) for pattern in row.items)]


def _matches(item: str, pattern: str) -> bool:
    # A bracket in a path is Rust's own, as in <From<[u8]>>: only * is a wildcard.
    return fnmatch.fnmatchcase(item, pattern.replace("[", "[[]"))


def faults(ledger: ApiLedger, surfaces: list[Surface], known: Comparisons) -> list[str]:
    """What is wrong with the ledger, a line each.

    Unlisted, listed twice, stale, a dead reference, a reason that a function which makes numbers cannot have or would
    have by a glob alone, and a comparison of what the emitter never calls.
    """
    signatures = {item: signature for surface in surfaces for item, signature in surface.items.items()}
    lines = []
    for item, signature in sorted(signatures.items()):
        rows = row_of(ledger, item)
        if not rows:
            lines.append(f"{item}: unlisted; give it a row in fixtures/api.toml")
        elif len(rows) > 1:
            lines.append(f"{item}: in {len(rows)} rows: {', '.join(row.items[0] for row in rows)}")
        else:
            lines += _false_claim(rows[0], item, signature, known)
    for row in ledger.api:
        for pattern in row.items:
            if not any(_matches(item, pattern) for item in signatures):
                lines.append(f"{pattern}: stale; no release has such a function")
        lines += [f"{row.items[0]}: {fault}" for reference in row.compared or [] if (fault := known.fault(reference))]
    return lines


def _false_claim(row: ApiRow, item: str, signature: str, known: Comparisons) -> list[str]:
    name = item.rpartition("::")[2]
    lines = []
    if row.reason in NUMBERLESS and makes_numbers(item, signature):
        lines.append(f"{item}: returns numbers, so it is no {row.reason}: {signature}")
    if item not in row.items and makes_numbers(item, signature):
        # Else a function that a release adds would have its reason before anyone looked at it.
        lines.append(f"{item}: returns numbers, so it needs its name in a row, not a glob: {signature}")
    if row.compared is not None and _CALLED_AS.get(name, name) not in known.emitted:
        lines.append(f"{item}: listed as compared, and the emitter never calls it")
    calls = {reference.removeprefix("call:") for reference in row.compared or [] if reference.startswith("call:")}
    if known.calls & calls and name not in calls:
        lines.append(f"{item}: compared by a call of {', '.join(sorted(calls))}")
    return lines


def makes_numbers(item: str, signature: str) -> bool:
    """Whether a function returns a tensor or floats that it owns, and may thus have computed.

    ``into_…`` gives away a field, as Rust names it.
    """
    output = re.sub(r"&(mut )?(\[Tensor\]|Tensor)", "", signature.partition(" -> ")[2])
    return bool(re.search(r"\b(Tensor|f32|f64)\b", output)) and not item.rpartition("::")[2].startswith("into_")


def totals(ledger: ApiLedger, surfaces: list[Surface]) -> list[ApiTotals]:
    """The releases in numbers, oldest first; a function without a row counts as ``unlisted``."""
    found = []
    before: set[str] | None = None
    for surface in surfaces:
        now = set(surface.items)
        covers = Counter(rows[0].cover if (rows := row_of(ledger, item)) else "unlisted" for item in now)
        gone = before if before is not None else now
        found.append(
            ApiTotals(surface.version, len(now), covers, tuple(sorted(now - gone)), tuple(sorted(gone - now)))
        )
        before = now
    return found


def load_surfaces() -> list[Surface]:
    """Every recorded release, oldest first."""
    return [load_surface(version) for version in RELEASES]
