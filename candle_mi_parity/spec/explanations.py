"""The tables of explanations: what a candidate is known to compute instead, and where.

``fixtures/explanations.toml`` is candle-mi's, ``fixtures/transformer_lens.toml`` that of TransformerLens.

A row is one cause with a stable id: the cases in which it applies, and the counterfactual under which PyTorch gives
candle-mi's numbers, or the message with which candle-mi refuses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import StrEnum
from functools import cached_property, reduce
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from candle_mi_parity.errors import ExplanationError
from candle_mi_parity.files.toml_out import toml_rows
from candle_mi_parity.spec.conditions import Condition, Facts, all_hold
from candle_mi_parity.spec.counterfactual import PLAIN, Counterfactual
from candle_mi_parity.spec.paths import FIXTURES
from candle_mi_parity.spec.table import TableRow, read_toml

TABLE, LENS_TABLE = FIXTURES / "explanations.toml", FIXTURES / "transformer_lens.toml"
MOST_STORED = 3
"""Largest number of explanations that refer to a stored trace, because no counterfactual expresses them."""


class Stage(StrEnum):
    """The stage at which a candidate refuses a case."""

    MODEL = "model"
    SAE = "sae"
    FORWARD = "forward"


def _compiles(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from error
    return text


Pattern = Annotated[str, AfterValidator(_compiles)]
OneStage = Annotated[Stage, Field(strict=False)]


class Refusal(TableRow):
    """How candle-mi refuses; ``message`` is a regular expression for its whole message.

    :ivar stage: one, or several where it depends on the case.
    """

    stage: OneStage | list[OneStage]
    message: Pattern

    @property
    def stages(self) -> list[Stage]:
        return self.stage if isinstance(self.stage, list) else [self.stage]


class Cause(TableRow):
    """The common part of a known divergence of cases and of direct calls.

    :ivar id: CMI1xx for direct calls, all others for cases; TL0xx of TransformerLens.
    :ivar name: a few words, for links and searches.
    :ivar says: one sentence: what candle-mi does instead.
    :ivar releases: the releases of candle-mi in which it holds, or ``TransformerLens VERSION``.
    :ivar remedy: what a user can do about it, or empty.
    """

    id: str
    name: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    says: Annotated[str, Field(min_length=20)]
    kind: Literal["wrong number", "different definition", "no effect", "refusal"]
    releases: Annotated[list[str], Field(min_length=1)]
    remedy: str = ""


class Explanation(Cause):
    """One cause.

    :ivar families: model types; empty for all.
    :ivar when: conditions that must all hold, see :mod:`conditions`.
    :ivar change: the counterfactual under which candle-mi computes PyTorch's numbers.
    :ivar refuses: how candle-mi refuses instead.
    :ivar stored: why there is neither; the candidate is then compared with the release's stored trace.
    """

    id: Annotated[str, Field(pattern=r"^(CMI[02-9]|TL0)\d\d$")]
    families: list[str] = []
    when: list[str] = []
    change: Counterfactual | None = None
    refuses: Refusal | None = None
    stored: str = ""

    @model_validator(mode="after")
    def _one_answer(self) -> Explanation:
        if sum(map(bool, (self.change, self.refuses, self.stored))) != 1:
            raise ValueError(f"{self.id}: give exactly one of `change`, `refuses` and `stored`")
        if (self.refuses is not None) != (self.kind == "refusal"):
            raise ValueError(f"{self.id}: kind {self.kind!r} does not go with `refuses`")
        if self.change == PLAIN:
            raise ValueError(f"{self.id}: a counterfactual that changes nothing explains nothing")
        if not (self.families or self.when):
            raise ValueError(f"{self.id}: give `families` or `when`; it would apply to every case")
        _ = self.conditions
        return self

    @cached_property
    def conditions(self) -> list[Condition]:
        return [Condition.parse(text) for text in self.when]

    def applies(self, facts: Facts) -> bool:
        """Whether the cause applies to a case, in its releases."""
        return (not self.families or facts.family in self.families) and all_hold(self.conditions, facts)


def check_unique(rows: Sequence[Cause]) -> None:
    """:raises ValueError: an id or a name is given twice."""
    for name in ("id", "name"):
        values = [getattr(row, name) for row in rows]
        if doubled := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"{name} given twice: {', '.join(doubled)}")


def releases_of(rows: Iterable[Cause]) -> list[str]:
    """All releases in the rows, oldest first."""
    return sorted({release for row in rows for release in row.releases}, key=numbers)


def baseline(rows: Iterable[Cause], version: str) -> str:
    """The release whose rows apply to a version: the newest of the same program that is not later, or empty."""
    program = version.rpartition(" ")[0]
    mine = [release for release in releases_of(rows) if release.rpartition(" ")[0] == program]
    older = [release for release in mine if numbers(release) <= numbers(version)]
    return older[-1] if older else ""


class Explanations(TableRow):
    """The whole table.

    :ivar chosen: the release that every candidate is held to; empty for the newest that is not newer.
    :ivar exactly: whether the rows of that release are all that is expected, also of a build from source.
    """

    format: Literal[1]
    explanation: list[Explanation]
    chosen: str = ""
    exactly: bool = False

    @model_validator(mode="after")
    def _unique(self) -> Explanations:
        check_unique(self.explanation)
        if len(held := [row.id for row in self.explanation if row.stored]) > MOST_STORED:
            raise ValueError(f"{', '.join(held)} are held to a stored trace; at most {MOST_STORED} may be")
        return self

    @property
    def releases(self) -> list[str]:
        """See :func:`releases_of`."""
        return releases_of(self.explanation)

    def baseline(self, version: str) -> str:
        """The chosen release, or see :func:`baseline`."""
        return self.chosen or baseline(self.explanation, version)

    def lists(self, source: str, version: str) -> bool:
        """Whether a candidate is the release that it is held to, and not a build from source or another release."""
        return source in ("registry", "program") and version == self.baseline(version)

    def applicable(self, facts: Facts, release: str) -> list[Explanation]:
        """The rows of a release that apply to a case, in the table's order."""
        return [row for row in self.explanation if release in row.releases and row.applies(facts)]


NOTHING_KNOWN = Explanations(format=1, explanation=[])
"""An empty table, with which every divergence is new."""


def combined(rows: Iterable[Explanation]) -> Counterfactual:
    """The counterfactual of several explanations at once.

    :raises ExplanationError: two of them change one thing in different ways.
    """
    rows = list(rows)
    try:
        return reduce(Counterfactual.with_also, (row.change for row in rows if row.change is not None), PLAIN)
    except ExplanationError as error:
        raise ExplanationError(
            f"{', '.join(row.id for row in rows)} apply to one case and overlap: {error}"
        ) from error


def proposed(
    explained_by: Counterfactual | Refusal, family: str, release: str, table: Explanations, when: Sequence[str] = ()
) -> str:
    """The TOML of a row for a new divergence or refusal; `says` and `remedy` are to be written by hand.

    :param when: the conditions, as far as they are known; the rest of them is to be written by hand too.
    """
    taken = [int(row.id.removeprefix("CMI")) for row in table.explanation]
    answer = {"change" if isinstance(explained_by, Counterfactual) else "refuses": explained_by}
    kind = "wrong number" if isinstance(explained_by, Counterfactual) else "refusal"
    fields: dict[str, object] = {"id": f"CMI{max(taken, default=0) + 1:03}", "name": "", "says": "", "kind": kind}
    fields |= {"families": [family], "when": [*when]}
    fields |= {key: value.model_dump(exclude_defaults=True, mode="json") for key, value in answer.items()}
    fields |= {"releases": [release], "remedy": ""}
    return toml_rows({"explanation": [fields]})


def numbers(version: str) -> tuple[int, ...]:
    """``0.2.3-dev`` → (0, 2, 3), to order versions; a pre-release counts as its release, and a name is left out."""
    found = re.search(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def load_explanations(path: Path = TABLE) -> Explanations:
    """The table.

    :raises ExplanationError: unreadable, unknown key, wrong type, duplicate id or name, incomplete row.
    """
    return read_toml(path, Explanations, ExplanationError)
