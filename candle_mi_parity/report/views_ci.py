"""Views of a :class:`RunResult` for CI: JUnit XML, a Markdown summary, GitHub's annotations."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from candle_mi_parity.compare.run_result import RunResult, Verdict
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.files.escape import one_line, printable
from candle_mi_parity.files.json_out import ReportError

ROWS = 50
"""Longest table of the summary; a job page takes a megabyte in all."""


def junit(result: RunResult) -> str:
    """One test case per case: KNOWN, UNMEASURED and not run are skipped with their reason, as pytest's xfail is.

    A stale ledger entry, and whatever ended the run early, is a test case too, so that no failing run looks clean.
    """
    suite = TestSuite(f"candle-mi {printable(result.candidate)}")
    suite.timestamp = result.started
    for name, value in {**result.versions, **result.identity}.items():
        suite.add_property(name, printable(str(value)))
    suite.add_testcases([_test_case(case, result.strict) for case in result.judged])
    for name, reason in result.skipped.items():
        suite.add_testcase(_with(TestCase(one_line(name), one_line(name.split("/")[0])), Skipped(printable(reason))))
    for line in result.stale:
        suite.add_testcase(_with(TestCase(one_line(line), "ledger"), Failure(printable(line), "stale")))
    if result.fault:
        suite.add_testcase(_with(TestCase("the run", "run"), Error(printable(result.fault), "broke off")))
    document = JUnitXml("candle-mi-parity")
    document.add_testsuite(suite)
    document.update_statistics()  # type: ignore[no-untyped-call]
    return str(document.tostring().decode("utf-8"))  # type: ignore[no-untyped-call]


def _test_case(case: CaseResult, strict: bool) -> TestCase:
    test = TestCase(one_line(case.id), one_line(case.family), case.seconds)
    text = printable(case.message())
    known = one_line(f"known divergence: {case.note}")
    if case.status is Status.FAIL or (strict and case.status is Status.KNOWN):
        first = case.first_divergence
        return _with(test, Failure(one_line(first.name if first else case.error), case.status.value), text)
    if case.status is Status.ERROR:
        return _with(test, Error(one_line(case.error), "ERROR"), text)
    if case.status is Status.UNMEASURED:
        return _with(test, Skipped(one_line(f"unmeasured: {case.error}"), "UNMEASURED"))
    return _with(test, Skipped(known, "KNOWN")) if case.status is Status.KNOWN else test


def _with(test: TestCase, outcome: Skipped | Failure | Error, text: str = "") -> TestCase:
    if text:
        outcome.text = text
    test.result = [outcome]
    return test


def summary(result: RunResult) -> str:
    """Markdown: the verdict, four counts, what diverges, what is known, what was not measured."""
    bad = [case for case in result.judged if case.status in (Status.FAIL, Status.ERROR, Status.UNMEASURED)]
    known: defaultdict[str, list[CaseResult]] = defaultdict(list)
    for case in result.cases:
        if case.status is Status.KNOWN:
            known[case.note].append(case)
    parts = [
        f"## {_MARK[result.verdict]} {result.verdict.value}: candle-mi {code(result.candidate)}",
        prose(result.line()),
        table(
            ["compared", "diverging", "known", "unmeasured"],
            [
                [
                    "-",
                    str(result.count(Status.FAIL)),
                    str(result.count(Status.KNOWN)),
                    str(result.count(Status.UNMEASURED)),
                ]
            ],
        ),
    ]
    parts += [f"**The run broke off:** {prose(result.fault)}"] if result.fault else []
    parts += [f"**Stale:** {prose(line)}" for line in result.stale[:ROWS]]
    if bad:
        rows = [[code(case.id), case.status.value, *_where(case), code(case.reproduce)] for case in bad]
        parts += ["### Diverging", table(["case", "status", "first at", "ratio", "shape", "reproduce"], rows)]
    if known:
        rows = [[prose(why), str(len(cases)), _ids(cases)] for why, cases in known.items()]
        parts += ["### Known divergences", table(["what", "cases", "which"], rows)]
    if result.skipped:
        reasons: defaultdict[str, list[str]] = defaultdict(list)
        for name, reason in result.skipped.items():
            reasons[re.sub(re.escape(name), "ID", reason)].append(name)
        rows = [[prose(reason), str(len(names)), _few(names)] for reason, names in reasons.items()]
        parts += ["### Not run", table(["why", "cases", "which"], rows)]
    if notes := list(dict.fromkeys(note for case in result.cases for note in case.notes)):
        rows = [[prose(note), _ids(case for case in result.cases if note in case.notes)] for note in notes[:ROWS]]
        parts += ["### Notes", table(["what", "which"], rows)]
    versions = ", ".join(f"{name} {value}" for name, value in result.versions.items())
    versions += f"; started {result.started}, took {result.seconds:.0f} s"
    return "\n\n".join([*parts, f"<sub>{prose(versions)}</sub>"]) + "\n"


_MARK = {Verdict.PASS: "✅", Verdict.FAIL: "❌", Verdict.ERROR: "💥", Verdict.INCONCLUSIVE: "❔", Verdict.KNOWN: "⚠️"}


def _where(case: CaseResult) -> list[str]:
    """First tensor, its ratio, the error's shape; for a case without one its error."""
    first = case.first_divergence
    if first is None:
        return [prose(one_line(case.error, 200)), "", ""]
    shape = case.diagnosis.shape if case.diagnosis else first.reason
    return [code(first.name), f"{first.ratio:.3g}", prose(shape)]


def code(text: str) -> str:
    """A code span: nothing in it is Markdown or HTML, a bar does not end a table's cell."""
    return "`" + one_line(text).replace("`", "'").replace("|", "\\|") + "`"


def prose(text: str) -> str:
    """Text that stays text: every character that means something to Markdown or HTML is escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|~@&!])", r"\\\1", one_line(text, 600))


def _ids(cases: Iterable[CaseResult]) -> str:
    return _few([case.id for case in cases])


def _few(names: list[str]) -> str:
    return ", ".join(code(name) for name in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows[:ROWS]]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return body + (f"\n\n{len(rows) - ROWS} more are in the report." if len(rows) > ROWS else "")


def workflow_commands(result: RunResult) -> list[str]:
    """GitHub's workflow commands: an error per failing case, a warning for what was not measured."""
    lines = [_command("error", "candle-mi-parity broke off", result.fault)] if result.fault else []
    lines += [_command("error", "stale ledger entry", line) for line in result.stale]
    for case in result.judged:
        failed = case.status in (Status.FAIL, Status.ERROR) or (result.strict and case.status is Status.KNOWN)
        if failed or case.status is Status.UNMEASURED:
            title = f"{case.id}: {case.status.value}"
            lines.append(_command("error" if failed else "warning", title, case.message()))
    return lines


def _command(kind: str, title: str, message: str) -> str:
    """Percent signs and line breaks, and in a property colons and commas, are spelt as GitHub asks."""
    body = printable(message).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    head = one_line(title).replace("%", "%25").replace(":", "%3A").replace(",", "%2C")
    return f"::{kind} title={head}::{body}"


def tell_github(result: RunResult, text: str, environment: Mapping[str, str]) -> None:
    """Annotations on stdout and the summary on the job page, when GitHub runs this and not otherwise.

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
