"""Views of a :class:`RunResult` for CI: JUnit XML, a Markdown summary, GitHub's annotations."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from candle_mi_parity.compare.run_result import RunResult, Verdict
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.files.escape import few, one_line, printable, templates
from candle_mi_parity.files.json_out import ReportError
from candle_mi_parity.report.causes import NEW, known_causes, new_causes, right

ROWS = 50
"""Longest table of the summary; a job page is limited to one megabyte."""


def junit(result: RunResult) -> str:
    """One test case for each case; KNOWN, UNMEASURED and not run are skipped with their reason, like pytest's xfail.

    Explanations that no longer hold, and the error that ended a run early, are test cases too, so that no failing run
    looks clean.
    """
    suite = TestSuite(f"candle-mi {printable(result.candidate)}")
    suite.timestamp = result.started
    answers = {"verdict": result.verdict.value, "right": result.is_right(), "new": result.is_new()}
    for name, value in {**answers, "baseline": result.baseline, **result.versions, **result.identity}.items():
        suite.add_property(name, printable(str(value)))
    suite.add_testcases([_test_case(case, result.strict) for case in result.results])
    for name, reason in result.not_run.items():
        suite.add_testcase(_with(TestCase(one_line(name), one_line(name.split("/")[0])), Skipped(printable(reason))))
    for line in result.stale:
        suite.add_testcase(_with(TestCase(one_line(line), "explanations"), Failure(printable(line), "stale")))
    if result.fault:
        suite.add_testcase(_with(TestCase("the run", "run"), Error(printable(result.fault), "broke off")))
    document = JUnitXml("candle-mi-parity")
    document.add_testsuite(suite)
    document.update_statistics()  # type: ignore[no-untyped-call]
    return str(document.tostring().decode("utf-8"))  # type: ignore[no-untyped-call]


def _test_case(case: CaseResult, strict: bool) -> TestCase:
    """The type of a result is status and outcome, such as ``KNOWN refused``."""
    test = TestCase(one_line(case.id), one_line(case.family), case.seconds)
    text, kind = printable(case.message()), f"{case.status.value} {case.outcome.value}"
    if case.status is Status.FAIL or (strict and case.status is Status.KNOWN):
        first = case.first_divergence
        return _with(test, Failure(one_line(first.name if first else case.error), kind), text)
    if case.status is Status.ERROR:
        return _with(test, Error(one_line(case.error), kind), text)
    if case.status is Status.UNMEASURED:
        return _with(test, Skipped(one_line(f"unmeasured: {case.error}"), kind))
    known = one_line(f"known divergence: {case.note}")
    return _with(test, Skipped(known, kind)) if case.status is Status.KNOWN else test


def _with(test: TestCase, outcome: Skipped | Failure | Error, text: str = "") -> TestCase:
    if text:
        outcome.text = text
    test.result = [outcome]
    return test


def summary(result: RunResult) -> str:
    """Markdown: both answers, the number of cases by outcome, causes, and what did not run."""
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for name, reason in result.not_run.items():
        reasons[re.sub(re.escape(name), "ID", reason)].append(name)
    return (
        templates(html=False)
        .get_template("summary.md.j2")
        .render(
            result=result,
            mark=_MARK[result.verdict],
            answers={right(result): result.is_right(), NEW: result.is_new()},
            new=new_causes(result),
            known=known_causes(result),
            reasons=reasons,
            versions=", ".join(f"{name} {value}" for name, value in result.versions.items()),
            longest=ROWS,
            listed=lambda names: few([code(name) for name in names]),
            **{function.__name__: function for function in (code, prose, one_line)},
        )
    )


_MARK = {Verdict.PASS: "✅", Verdict.FAIL: "❌", Verdict.ERROR: "💥", Verdict.INCONCLUSIVE: "❔", Verdict.KNOWN: "⚠️"}


def code(text: str) -> str:
    """A code span in a table; nothing in it is interpreted as Markdown or HTML."""
    return "`" + one_line(text).replace("`", "'").replace("|", "\\|") + "`"


def prose(text: str) -> str:
    """Text in which every special character of Markdown and HTML is escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|~@&!])", r"\\\1", one_line(text, 600))


def workflow_commands(result: RunResult) -> list[str]:
    """GitHub's workflow commands: both answers, an error for each new cause, a warning for what was not measured."""
    level = {Verdict.PASS: "notice", Verdict.KNOWN: "warning", Verdict.INCONCLUSIVE: "warning"}
    head = f"{result.verdict.value}: candle-mi {result.candidate}"
    answers = f"{right(result)} {result.is_right()}\n{NEW} {result.is_new()}"
    lines = [_command(level.get(result.verdict, "error"), head, answers)]
    lines += [_command("error", "an explanation no longer holds", line) for line in result.stale]
    for cause in new_causes(result):
        kind = "warning" if cause.status is Status.UNMEASURED else "error"
        others = [case.id for case in cause.cases[1:]]
        more = f"\nthe same in {len(others)} more: {few(others)}" if others else ""
        lines.append(_command(kind, f"{cause.leader.id}: {cause.status.value}", cause.leader.message() + more))
    return lines


def _command(kind: str, title: str, message: str) -> str:
    """A workflow command, escaped as GitHub requires."""
    body = printable(message).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    head = one_line(title).replace("%", "%25").replace(":", "%3A").replace(",", "%2C")
    return f"::{kind} title={head}::{body}"


def write_github(result: RunResult, text: str, environment: Mapping[str, str]) -> None:
    """Print annotations and append the summary to the job page, if this runs on GitHub.

    :raises ReportError: the job page's file cannot be written.
    """
    if environment.get("GITHUB_ACTIONS") != "true":
        return
    for line in workflow_commands(result):
        print(line, flush=True)
    if page := environment.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(page).open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise ReportError(f"cannot write {page}: {error.strerror or error}") from error
