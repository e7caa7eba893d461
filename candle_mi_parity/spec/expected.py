"""What a candidate is expected to diverge in: a release's rows, or a file that lives beside its source."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from candle_mi_parity.errors import ExplanationError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.spec.explanations import Cause, Explanation, Explanations, load_explanations
from candle_mi_parity.spec.table import TableRow, read_toml

C = TypeVar("C", bound=Cause)


class ExpectedDivergences(TableRow):
    """A file of expected divergences, ``--known FILE``.

    :ivar expected: ids of the suite's tables, of cases (``CMI006``), direct calls (``CMI103``) and tokenizers
        (``CMI201``): the candidate diverges in these and in nothing else.
    :ivar explanation: further explanations of its own, as in ``fixtures/explanations.toml``.
    """

    format: Literal[1]
    expected: list[str]
    explanation: list[Explanation] = []


def load_expected(path: Path, others: Iterable[Cause]) -> ExpectedDivergences:
    """Read a file of expected divergences.

    :param others: the known causes of direct calls and of tokenizers.
    :raises ExplanationError: the file is absent or malformed, expects an id that no table has, or has a row
        with an id or a name that is given already.
    """
    found = read_toml(path, ExpectedDivergences, ExplanationError)
    known = [row.id for row in (*load_explanations().explanation, *others)]
    for id in found.expected:
        if id not in known:
            near = ", ".join(difflib.get_close_matches(id, known, 3)) or "none"
            raise ExplanationError(f"{path}: no explanation has the id {one_line(id)}; like it: {near}")
    try:
        Explanations(format=1, explanation=[*load_explanations().explanation, *found.explanation])
    except ValidationError as error:
        raise ExplanationError(f"{path}: beside this suite's rows: {one_line(error.errors()[0]['msg'])}") from error
    return found


def held_to(table: Explanations, release: str, expected: ExpectedDivergences | None) -> Explanations:
    """The table as it applies to a candidate that is held to ``release``, or to exactly what a file expects.

    :param release: empty for the newest release that is not newer than the candidate.
    :raises ExplanationError: the release or an id is in no row.
    """
    if release and release not in table.releases:
        raise ExplanationError(f"no explanations are listed for {release}; there are {', '.join(table.releases)}")
    if expected is None:
        return table.model_copy(update={"chosen": release})
    release = release or table.releases[-1]
    rows = [*table.explanation, *(row.model_copy(update={"releases": [release]}) for row in expected.explanation)]
    ids = {*expected.expected, *(row.id for row in expected.explanation)}
    rows = listed_as(rows, release, ids)
    return Explanations(format=1, explanation=rows).model_copy(update={"chosen": release, "exactly": True})


def listed_as(rows: Iterable[C], release: str, ids: set[str]) -> list[C]:
    """Rows that list a release if, and only if, their id is one of ``ids``; a row without a release is left out."""
    changed = []
    for row in rows:
        releases = [other for other in row.releases if other != release] + ([release] if row.id in ids else [])
        if releases:
            changed.append(row.model_copy(update={"releases": releases}))
    return changed
