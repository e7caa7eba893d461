"""Write all views of a :class:`RunResult`, also if the run ends early."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from candle_mi_parity.compare.run_result import RunResult
from candle_mi_parity.errors import ParityError, Stopped
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.json_out import ReportError, write_json, write_text
from candle_mi_parity.report import page, report_model, views_ci

VIEWS = ("report.json", "junit.xml", "summary.md", "report.html")


class Interrupted(ParityError):  # noqa: N818 -- not an error
    """The run was stopped; its report has the results until then, and its exit code is not that of a verdict."""


@contextmanager
def written(result: RunResult, out: Path) -> Iterator[RunResult]:
    """Context in which ``result`` is filled; every view is written on exit, also after an error or Ctrl-C.

    The views of an earlier run are removed first, so that a killed run does not leave them behind.

    :raises Interrupted: for Ctrl-C, SIGTERM and a closed terminal.
    :raises ReportError: a view cannot be written, and nothing else failed.
    """
    remove(out, *VIEWS)
    try:
        yield result
    except (KeyboardInterrupt, Stopped) as error:
        result.fault = f"interrupted after {len(result.cases)} of {len(result.cases) + len(result.skipped)} cases"
        _write_quietly(result, out)
        raise Interrupted(result.fault) from error
    except Exception as error:
        message = one_line(str(error))
        result.fault = message if isinstance(error, ParityError) else f"internal: {type(error).__name__}: {message}"
        _write_quietly(result, out)
        raise
    write(result, out)


def remove(out: Path, *names: str) -> None:
    """Remove the files of an earlier run.

    :raises ReportError: a file cannot be removed.
    """
    for name in names:
        try:
            (out / name).unlink(missing_ok=True)
        except OSError as error:
            raise ReportError(f"cannot write {out / name}: {error.strerror}") from error


def require_writable(out: Path) -> None:
    """Find out whether files can be written to a directory, which is made.

    :raises ReportError: they cannot.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ReportError(f"cannot write to {out}: {error.strerror}") from error


def _write_quietly(result: RunResult, out: Path) -> None:
    """Write the views after an error; a second error is added to the first."""
    try:
        write(result, out)
    except Exception as error:
        result.fault += f"; {error}"


def write(result: RunResult, out: Path) -> None:
    """Write ``report.json``, ``junit.xml``, ``summary.md`` and ``report.html``; on GitHub also annotations.

    :raises ReportError: the first view that cannot be written, after all were tried.
    """
    result.seconds = time.monotonic() - result.tick
    summary = views_ci.summary(result)
    tasks: list[Callable[[], None]] = [
        lambda: write_json(report_model.document(result), out / "report.json"),
        lambda: write_text(views_ci.junit(result), out / "junit.xml"),
        lambda: write_text(summary, out / "summary.md"),
        lambda: write_text(page.render(result), out / "report.html"),
        lambda: views_ci.write_github(result, summary, os.environ),
    ]
    faults: list[Exception] = []
    for task in tasks:
        try:
            task()
        except Exception as error:  # a failing plot must not prevent the JSON of a long run
            faults.append(error)
    if faults:
        raise faults[0]
