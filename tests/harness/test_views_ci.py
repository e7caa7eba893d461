"""JUnit, Markdown and GitHub's annotations agree with the result, and all views are there when a run breaks off."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

import pytest

from candle_mi_parity.cli import cli
from candle_mi_parity.compare.run_result import RunResult, Verdict
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.errors import ModelError, ParityError
from candle_mi_parity.report import page, views, views_ci
from candle_mi_parity.report.terminal import Terminal
from candle_mi_parity.run import run
from candle_mi_parity.run.run import RunOptions
from candle_mi_parity.spec.cases import load_cases, select
from tests.support.results import HOSTILE, VERSIONS, case, everything, run_of

VIEWS = ("report.json", "report.html", "junit.xml", "summary.md")


def suite_of(result: RunResult) -> ElementTree.Element:
    (suite,) = ElementTree.fromstring(views_ci.junit(result))
    return suite


def outcome(suite: ElementTree.Element, name: str) -> tuple[str, str, str]:
    """Kind, message and text of one test case's outcome."""
    found = next(test for test in suite.iter("testcase") if test.get("name") == name)
    (child,) = found
    return child.tag, child.get("message", ""), child.text or ""


def test_junit_counts_are_the_results() -> None:
    result = everything()
    suite = suite_of(result)
    tests = list(suite.iter("testcase"))
    assert len(tests) == len(result.cases) + len(result.skipped) == int(suite.get("tests", ""))
    assert int(suite.get("failures", "")) == result.count(Status.FAIL) == 1
    assert int(suite.get("errors", "")) == result.count(Status.ERROR) == 1
    skipped = result.count(Status.KNOWN) + result.count(Status.UNMEASURED) + len(result.skipped)
    assert int(suite.get("skipped", "")) == skipped == 3
    assert sum(1 for test in tests if len(test) == 0) == result.count(Status.PASS)


def test_junit_says_why() -> None:
    suite = suite_of(everything())
    kind, message, text = outcome(suite, "failfam/fail")
    assert (kind, message) == ("failure", "blocks.0.attn.hook_scores")
    assert "[0, 3, 17] got 1.25, expected 1.75" in text and "reproduce: candle-mi-parity run" in text
    assert outcome(suite, "errorfam/error")[:2] == ("error", "crash: emitter was ended by SIGKILL")
    assert outcome(suite, "knownfam/known")[:2] == ("skipped", "known divergence: rope_theta is not read")
    assert outcome(suite, "unmeasuredfam/unmeasured")[1].startswith("unmeasured: too noisy to judge")
    assert outcome(suite, "gemma-2-2b/scope-l0")[:2] == ("skipped", "needs a download from the hub")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda result: result.cases.append(case("a/z", Status.FAIL)),
        lambda result: result.cases.append(case("a/z", Status.ERROR)),
        lambda result: result.stale.append("a/b no longer diverges"),
        lambda result: setattr(result, "fault", "no space left"),
        lambda result: result.__dict__.update(strict=True, cases=[case("a/z", Status.KNOWN)]),
    ],
    ids=["divergence", "error", "stale entry", "broke off", "strict"],
)
def test_a_run_that_fails_has_a_junit_that_fails(spoil: Callable[[RunResult], object]) -> None:
    result = run_of(case("a/b"))
    assert suite_of(result).get("failures") == suite_of(result).get("errors") == "0"
    spoil(result)
    assert result.verdict in (Verdict.FAIL, Verdict.ERROR)
    suite = suite_of(result)
    assert int(suite.get("failures", "")) + int(suite.get("errors", "")) == 1


def hostile() -> RunResult:
    bad, broken = case("a/b", Status.FAIL, bad=HOSTILE), case("a/c", Status.ERROR)
    broken.error = f"{HOSTILE}\n| x | `code` | [link](y) |\n# heading\n::error::forged"
    result = run_of(bad, broken)
    result.skipped = {"a/d": HOSTILE}
    return result


def test_the_summary_says_verdict_counts_cases_and_reasons() -> None:
    text = views_ci.summary(everything())
    assert text.startswith("## ❌ FAIL: candle-mi `0.2.2`")
    assert "| compared | diverging | known | unmeasured |\n| --- | --- | --- | --- |\n| 4 | 1 | 1 | 3 |" in text
    assert "| `failfam/fail` | FAIL | `blocks.0.attn.hook_scores` | 4.32e+03 | one head (3) |" in text
    assert "SIGKILL" in text and "rope\\_theta is not read" in text and "needs a download from the hub" in text


def test_the_summary_stays_markdown_whatever_a_name_holds() -> None:
    text = views_ci.summary(hostile())
    bare = re.sub(r"`[^`]*`|\\.", "", text)  # neither code spans nor what is escaped
    assert "<script" not in bare and "[link]" not in bare and "\x1b" not in text
    assert not re.search(r"^(#+ heading|::error)", text, re.MULTILINE)
    rows = [line for line in text.splitlines() if line.startswith("| `a/")]
    assert len(rows) == 2 and all(len(re.findall(r"(?<!\\)\|", row)) == 7 for row in rows)


def test_github_is_told_only_where_github_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    for environment in ({}, {"GITHUB_ACTIONS": "false"}, {"GITHUB_STEP_SUMMARY": str(page)}):
        views_ci.tell_github(everything(), "text", environment)
    assert capsys.readouterr().out == "" and not page.exists()
    page.write_text("before\n")
    views_ci.tell_github(everything(), "text\n", {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(page)})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("::")[1] for line in lines] == [
        "error title=failfam/fail%3A FAIL",
        "warning title=unmeasuredfam/unmeasured%3A UNMEASURED",
        "error title=errorfam/error%3A ERROR",
    ]
    assert "%0A  reproduce: candle-mi-parity run" in lines[0]
    assert page.read_text() == "before\ntext\n"


def test_all_views_tell_one_verdict(tmp_path: Path) -> None:
    with views.written(everything(), tmp_path) as result:
        pass
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == result.verdict.value == "FAIL"
    assert "<h1>FAIL</h1>" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "summary.md").read_text().startswith("## ❌ FAIL")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(VIEWS)


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (ModelError("the disk went away"), ModelError, "the disk went away"),
        (ZeroDivisionError("a bug of ours"), ZeroDivisionError, "internal: ZeroDivisionError: a bug of ours"),
        (KeyboardInterrupt(), views.Interrupted, "interrupted after 1 of 3 cases"),
    ],
)
def test_a_run_that_breaks_off_writes_every_view_with_what_it_had(
    tmp_path: Path, error: BaseException, raised: type[Exception], said: str
) -> None:
    def half(result: RunResult) -> None:
        result.cases.append(case("a/b"))
        result.skipped = dict.fromkeys(("a/c", "a/d"), run.NOT_REACHED)
        raise error

    with pytest.raises(raised), views.written(RunResult("0.2.2", {}, VERSIONS, [], {}, []), tmp_path) as result:
        half(result)
    assert result.verdict is Verdict.ERROR
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["verdict"] == "ERROR" and document["fault"] == said
    assert [judged["id"] for judged in document["cases"]] == ["a/b"] and list(document["skipped"]) == ["a/c", "a/d"]
    html = (tmp_path / "report.html").read_text()
    assert "<h1>ERROR</h1>" in html and said in html and "a/d" in html
    (suite,) = ElementTree.fromstring((tmp_path / "junit.xml").read_text())
    assert (suite.get("tests"), suite.get("errors"), suite.get("skipped")) == ("4", "1", "2")
    assert (tmp_path / "summary.md").read_text().startswith("## 💥 ERROR")


def test_a_divergence_found_before_the_break_does_not_hide_the_break() -> None:
    result = run_of(case("a/b", Status.FAIL))
    result.fault = "no space left"
    assert result.verdict is Verdict.ERROR
    assert result.line().startswith("ERROR (no space left): 1 cases (1 FAIL)")


def test_one_view_that_cannot_be_drawn_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(result: RunResult) -> str:
        raise ValueError("no such glyph")

    monkeypatch.setattr(page, "render", broken)
    monkeypatch.setattr(views_ci, "junit", broken)
    with pytest.raises(ValueError, match="no such glyph"):
        views.write(run_of(case("a/b")), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "summary.md"]


@pytest.mark.parametrize("how", [lambda: signal.raise_signal(signal.SIGINT), lambda: 1 / 0], ids=["ctrl-c", "bug"])
def test_the_command_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Callable[[], object]) -> None:
    """From the command down: what was judged when it broke off is in the report, each other case not reached."""
    ended: list[CaseResult] = []

    def case_ends(self: Terminal, result: CaseResult) -> None:
        ended.append(result)
        if len(ended) == 2:
            how()

    monkeypatch.setattr(Terminal, "case_ends", case_ends)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    # A job in the background inherits an ignored SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises((ParityError, ZeroDivisionError)):
            cli.judge_and_write(run.RunOptions("stored:0.2.2", ("llama/[hb]*",), tmp_path))
    finally:
        signal.signal(signal.SIGINT, before)
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["verdict"] == "ERROR"
    judged = [case["id"] for case in document["cases"]]
    assert judged[:2] == [case.id for case in ended]
    unreached = {name for name, reason in document["skipped"].items() if reason == run.NOT_REACHED}
    assert sorted([*judged, *unreached]) == sorted(case.id for case in select(load_cases(), ["llama/[hb]*"]))
    assert all((tmp_path / name).is_file() for name in VIEWS)


def test_a_crash_of_the_command_is_no_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", lambda: 1 / 0)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2


def test_every_view_says_when_its_run_began_and_how_long_it_took(tmp_path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    with views.written(everything(), tmp_path) as result:
        time.sleep(0.01)
    document = json.loads((tmp_path / "report.json").read_text())
    assert before <= datetime.fromisoformat(document["started"]) <= datetime.now(UTC)
    assert 0.01 <= document["seconds"] < 100
    (suite,) = ElementTree.fromstring((tmp_path / "junit.xml").read_text())
    assert suite.get("timestamp") == result.started
    for name in ("report.html", "summary.md"):
        text = (tmp_path / name).read_text().replace("\\", "")
        assert result.started in text and "took 0 s" in text


def test_an_older_report_goes_before_the_run_does_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VIEWS:
        (tmp_path / name).write_text("of an earlier run")

    def killed(_: RunOptions) -> RunResult:
        assert not list(tmp_path.iterdir()), "an older report is there while this run is at work"
        raise SystemExit(9)

    monkeypatch.setattr(cli, "blank", killed)
    with pytest.raises(SystemExit):
        cli.judge_and_write(RunOptions("stored:0.2.2", out=tmp_path))
