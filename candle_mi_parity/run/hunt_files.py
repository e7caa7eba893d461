"""The files of a hunt: ``hunt.json``, ``hunt.html``, and a folder for each new cause."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from candle_mi_parity.candidate.sources import Source, open_source
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.compare.hunt_result import Cause, HuntResult
from candle_mi_parity.compare.suspects import in_any_layer
from candle_mi_parity.compare.verdict import Failure
from candle_mi_parity.errors import ParityError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.json_out import write_text
from candle_mi_parity.report.hunt_page import PAGE, hunt_page
from candle_mi_parity.repro.command import named
from candle_mi_parity.repro.crate import dependencies
from candle_mi_parity.repro.repro import Reproduction, ReproError, reproduce
from candle_mi_parity.repro.write import Origin, write_folder
from candle_mi_parity.spec.cases import Case

JSON, CAUSES = "hunt.json", "causes"
MOST_FOLDERS = 20
"""Largest number of causes that are reproduced."""
Log = Callable[[str], None]


def write(result: HuntResult, out: Path) -> None:
    """Write the result and its page.

    :raises ReportError: the disk is full or read-only.
    """
    result.write(out / JSON)
    write_text(hunt_page(result), out / PAGE)


def reproduce_causes(result: HuntResult, out: Path, cache: Path, log: Log) -> None:
    """Write ``causes/<number>/`` for each new cause that has none, as ``repro`` does for a case, and the result anew.

    :raises ReportError: the disk is full or read-only.
    """
    waiting = [each for each in enumerate(result.causes, 1) if not (each[1].folder or each[1].no_folder)]
    left = MOST_FOLDERS - sum(bool(cause.folder) for cause in result.causes)
    fit = []
    for place, cause in waiting:
        cause.no_folder = _unfit(result, cause, left)
        if not cause.no_folder:
            left -= 1
            fit.append((place, cause))
    if fit:
        candidate = parse_candidate(result.candidate)
        with (
            tempfile.TemporaryDirectory(prefix="parity-repro-") as traces,
            open_source(candidate, cache, Path(traces), log) as source,
        ):
            needed = dependencies(candidate, cache)
            which = named(source.identity, result.candidate) if source.identity else result.version
            origin = Origin(which, result.command, known="")
            for place, cause in fit:
                log(f"cause {place} of {len(result.causes)}: writing its reproduction")
                try:
                    found = _reproduced(cause, place, source, cache, log)
                    write_folder(found, origin, needed, out / CAUSES / str(place))
                    cause.folder = f"{CAUSES}/{place}"
                except ParityError as error:
                    cause.no_folder = one_line(str(error))
                except Exception as error:  # one cause must not cost the others their folders
                    cause.no_folder = one_line(f"a fault of this suite: {type(error).__name__}: {error}")
                write(result, out)
    elif waiting:
        write(result, out)


def _unfit(result: HuntResult, cause: Cause, left: int) -> str:
    """Why a cause is not reproduced; empty if it is.

    :param left: how many more causes may be.
    """
    if not result.version:
        return "the control has no source that a Rust test could be run against"
    if cause.kind != "forward":
        return "a Rust test is written for forward passes only"
    if cause.first in list(Failure):
        return f"the candidate ended with a {cause.first}, so that there is no tensor to compare"
    return "" if left > 0 else f"only {MOST_FOLDERS} causes are reproduced; make it a case, for which `repro` does it"


def _reproduced(cause: Cause, place: int, source: Source, cache: Path, log: Log) -> Reproduction:
    """The reproduction of a cause.

    :raises ReproError: there is none.
    """
    case = Case.model_validate(cause.smallest | {"id": f"{cause.what}/hunt-{place}"})
    found = reproduce(case, source, cache, log, new=True)
    if in_any_layer(found.first.name) != in_any_layer(cause.first):
        raise ReproError(f"another divergence comes first, at {found.first.name}")
    return found
