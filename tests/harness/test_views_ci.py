"""JUnit, Markdown and GitHub's annotations agree with the result, and all views are there when a run breaks off."""

import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

import pytest

from candle_mi_parity.cli import cli
from candle_mi_parity.compare.run_result import RunResult, Verdict
from candle_mi_parity.compare.verdict import Status
from candle_mi_parity.errors import ModelError
from candle_mi_parity.report import page, views, views_ci
from candle_mi_parity.report.causes import NEW
from candle_mi_parity.run import run
from tests.support.results import HOSTILE, case, changed, everything, run_of

VIEWS = ("report.json", "report.html", "junit.xml", "summary.md")

RIGHT = "Does candle-mi compute what PyTorch computes?"


def suite_of(result: RunResult) -> ElementTree.Element:
    (suite,) = ElementTree.fromstring(views_ci.junit(result))
    return suite


def outcome(suite: ElementTree.Element, name: str) -> tuple[str, str, str]:
    """Kind, message and text of one test case's outcome."""
    found = next(test for test in suite.iter("testcase") if test.get("name") == name)
    (child,) = found
    return child.tag, child.get("message", ""), child.text or ""


def test_junit_counts_and_says_why() -> None:
    suite, result = suite_of(everything()), everything()
    counts = {name: int(suite.get(name, "")) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": 6, "failures": 1, "errors": 1, "skipped": 3}
    assert [test.get("name") for test in suite.iter("testcase") if len(test) == 0] == ["passfam/pass"]
    kind, message, text = outcome(suite, "failfam/fail")
    assert (kind, message) == ("failure", "blocks.0.attn.hook_scores")
    assert (
        "batch 0, head 1, query 3, key 17 got 1.25, expected 1.75" in text
        and "reproduce: candle-mi-parity run" in text
    )
    assert outcome(suite, "errorfam/error")[:2] == ("error", "crash: emitter was ended by SIGKILL")
    assert outcome(suite, "knownfam/known")[1].startswith("known divergence: CMI001: rope_theta is not read; equal")
    assert outcome(suite, "unmeasuredfam/unmeasured")[1].startswith("unmeasured: too noisy to judge")
    assert outcome(suite, "gemma-2-2b/scope-l0")[:2] == ("skipped", "needs a download from the hub")
    properties = {each.get("name"): each.get("value") for each in suite.iter("property")}
    answers = {"verdict": "FAIL", "right": result.is_right(), "new": result.is_new()}
    assert answers.items() <= properties.items()


BAD = {
    "divergence": run_of(case("a/z", Status.FAIL)),
    "error": run_of(case("a/z", Status.ERROR)),
    "stale explanation": changed(run_of(case("a/b")), stale=["CMI001 is listed, and no case needs it"]),
    "broke off": changed(run_of(case("a/b")), fault="no space left"),
    "strict": changed(run_of(case("a/z", Status.KNOWN)), strict=True),
}


@pytest.mark.parametrize("name", BAD)
def test_a_run_that_fails_has_a_junit_that_fails(name: str) -> None:
    good, suite = suite_of(run_of(case("a/b"), case("a/z", Status.KNOWN))), suite_of(BAD[name])
    assert good.get("failures") == good.get("errors") == "0" and BAD[name].verdict in (Verdict.FAIL, Verdict.ERROR)
    assert int(suite.get("failures", "")) + int(suite.get("errors", "")) == 1


def test_the_summary_has_verdict_counts_cases_and_reasons() -> None:
    text = views_ci.summary(everything())
    assert text.startswith("## ❌ FAIL: candle-mi `0.2.2`")
    assert f"**{RIGHT}** Not everywhere: 1 known cause" in text and f"**{NEW}** New: 1 case fails" in text
    assert "| agree | other numbers | refused | crashed | not measured | not run |" in text
    assert "| ≠ FAIL | `blocks.0.attn.hook_scores` | 4.32e+03 | one head (3) | 1 | `failfam/fail` |" in text
    assert "| ≠ KNOWN CMI001 | rope\\_theta is not read. | 1 | `knownfam/known` | Write it. |" in text
    assert "SIGKILL" in text and "needs a download from the hub" in text
    assert views_ci.summary(run_of(case("a/b", Status.KNOWN))).startswith("## ⚠️ KNOWN")


def test_a_hostile_name_does_not_change_the_markdown() -> None:
    bad, broken = case("a/b", Status.FAIL, bad=HOSTILE), case("a/c", Status.ERROR)
    broken.error = f"{HOSTILE}\n| x | `code` | [link](y) |\n# heading\n::error::forged"
    text = views_ci.summary(changed(run_of(bad, broken), skipped={"a/d": HOSTILE}))
    bare = re.sub(r"`[^`]*`|\\.", "", text)  # neither code spans nor what is escaped
    assert "<script" not in bare and "[link]" not in bare and "\x1b" not in text
    assert not re.search(r"^(#+ heading|::error)", text, re.MULTILINE)
    rows = [line for line in text.splitlines() if re.match(r"\| . (FAIL|ERROR) \|", line)]
    assert len(rows) == 2 and all(len(re.findall(r"(?<!\\)\|", row)) == 8 for row in rows)


def test_annotations_are_written_only_on_github(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    for environment in ({}, {"GITHUB_ACTIONS": "false"}, {"GITHUB_STEP_SUMMARY": str(page)}):
        views_ci.write_github(everything(), "text", environment)
    assert capsys.readouterr().out == "" and not page.exists()
    page.write_text("before\n")
    views_ci.write_github(everything(), "text\n", {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(page)})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("::")[1] for line in lines] == [
        "error title=FAIL%3A candle-mi 0.2.2",
        "error title=failfam/fail%3A FAIL",
        "error title=errorfam/error%3A ERROR",
        "warning title=unmeasuredfam/unmeasured%3A UNMEASURED",
    ]
    assert (
        "Does candle-mi compute what PyTorch computes?" in lines[0]
        and NEW in lines[0]
        and "%0A  reproduce: candle-mi-parity run" in lines[1]
    )
    assert page.read_text() == "before\ntext\n"
    kinds = [views_ci.workflow_commands(run_of(case("a/b", status)))[0].split()[0] for status in Status]
    assert kinds == ["::notice", "::warning", "::error", "::warning", "::error"]


@pytest.mark.parametrize(
    "error, raised, fault",
    [
        (ModelError("the disk went away"), ModelError, "the disk went away"),
        (ZeroDivisionError("a bug of ours"), ZeroDivisionError, "internal: ZeroDivisionError: a bug of ours"),
        (KeyboardInterrupt(), views.Interrupted, "interrupted after 1 of 3 cases"),
    ],
)
def test_a_run_that_breaks_off_writes_every_view_with_what_it_had(
    tmp_path: Path, error: BaseException, raised: type[Exception], fault: str
) -> None:
    result = changed(run_of(case("a/b")), skipped=dict.fromkeys(("a/c", "a/d"), run.NOT_REACHED))
    with pytest.raises(raised), views.written(result, tmp_path):
        raise error
    assert result.verdict is Verdict.ERROR
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["verdict"] == "ERROR" and document["fault"] == fault
    assert [judged["id"] for judged in document["cases"]] == ["a/b"] and list(document["skipped"]) == ["a/c", "a/d"]
    html = (tmp_path / "report.html").read_text()
    assert '<header class="ERROR">' in html and fault in html and "a/d" in html
    (suite,) = ElementTree.fromstring((tmp_path / "junit.xml").read_text())
    assert (suite.get("tests"), suite.get("errors"), suite.get("skipped")) == ("4", "1", "2")
    assert (tmp_path / "summary.md").read_text().startswith("## 💥 ERROR")


def test_a_view_that_fails_does_not_prevent_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(result: RunResult) -> str:
        raise ValueError("no such glyph")

    monkeypatch.setattr(page, "render", broken)
    monkeypatch.setattr(views_ci, "junit", broken)
    with pytest.raises(ValueError, match="no such glyph"):
        views.write(run_of(case("a/b")), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "summary.md"]


def test_a_crash_of_the_command_has_exit_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", lambda: 1 / 0)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2


def test_every_view_has_start_and_duration_of_the_run(tmp_path: Path) -> None:
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
        assert result.started in text and f"took {result.seconds:.0f} s" in text
