"""All views of one :class:`RunResult`, written when the run ends in whichever way."""

from __future__ import annotations

import os
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


class Interrupted(ParityError):  # noqa: N818 -- a person's wish, no error
    """Ctrl-C, or another stop: what was judged until then is in the report; the exit code is not a verdict's."""


@contextmanager
def written(result: RunResult, out: Path) -> Iterator[RunResult]:
    """Fill ``result`` inside; on the way out every view is written, also when an error or Ctrl-C passes through.

    The views of an earlier run are removed first: of a run that is killed there is no report, and not that one's.

    :raises Interrupted: for Ctrl-C, SIGTERM and a closed terminal.
    :raises ReportError: a view cannot be written and nothing else went wrong.
    """
    remove(out, *VIEWS)
    try:
        yield result
    except (KeyboardInterrupt, Stopped) as error:
        result.fault = f"interrupted after {len(result.cases)} of {len(result.cases) + len(result.skipped)} cases"
        _write_quietly(result, out)
        raise Interrupted(result.fault) from error
    except Exception as error:
        said = one_line(str(error))
        result.fault = said if isinstance(error, ParityError) else f"internal: {type(error).__name__}: {said}"
        _write_quietly(result, out)
        raise
    write(result, out)


def remove(out: Path, *names: str) -> None:
    """Take away what an earlier run wrote, before it can be read for this one's.

    :raises ReportError: it is there and cannot be removed.
    """
    for name in names:
        try:
            (out / name).unlink(missing_ok=True)
        except OSError as error:
            raise ReportError(f"cannot write {out / name}: {error.strerror}") from error


def _write_quietly(result: RunResult, out: Path) -> None:
    """What ended the run is to be told, and not that its report cannot be written either."""
    try:
        write(result, out)
    except Exception as error:
        result.fault += f"; {error}"


def write(result: RunResult, out: Path) -> None:
    """``report.json``, ``junit.xml``, ``summary.md`` and ``report.html``; on GitHub the job page and annotations.

    :raises ReportError: the first that cannot be written, after all were tried.
    """
    result.seconds = time.monotonic() - result.tick
    summary = views_ci.summary(result)
    tasks: list[Callable[[], None]] = [
        lambda: write_json(report_model.document(result), out / "report.json"),
        lambda: write_text(views_ci.junit(result), out / "junit.xml"),
        lambda: write_text(summary, out / "summary.md"),
        lambda: write_text(page.render(result), out / "report.html"),
        lambda: views_ci.tell_github(result, summary, os.environ),
    ]
    faults: list[Exception] = []
    for task in tasks:
        try:
            task()
        except Exception as error:  # a plot that fails must not cost the JSON of a run of hours
            faults.append(error)
    if faults:
        raise faults[0]
