"""The night: one issue for a change, none for the same again; what is out of reach is INCONCLUSIVE, with a remedy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from candle_mi_parity.cli import cli
from candle_mi_parity.compare.verdict import RunResult, Verdict
from candle_mi_parity.errors import ModelError
from candle_mi_parity.files.json_out import write_json
from candle_mi_parity.report import diff_views, report
from candle_mi_parity.run import nightly
from candle_mi_parity.run.nightly import NightlyError, Step, StepResult, chosen, execute, gathered, plan, run_step
from candle_mi_parity.run.nightly_verdict import conclude
from candle_mi_parity.run.repeat import Repeated, RepeatedCase
from candle_mi_parity.spec.cases import load_cases
from candle_mi_parity.spec.paths import ROOT
from tests.harness.test_build import committed
from tests.harness.test_candidate import write_crate
from tests.support.results import HOSTILE, case, differing, everything, run_of

STEP = Step("release", (*nightly.OURS, "run", "--candidate", "0.2.2"))
OUT_OF_REACH = "git says: could not resolve host; check the network"


def night(out: Path, *results: StepResult, date: str = "2026-01-01") -> tuple[Verdict, str]:
    """The verdict, and the issue's text where there is one."""
    verdict = conclude(list(results), out, date)
    issue = out / "issue.md"
    return verdict, issue.read_text() if issue.is_file() else ""


def result(verdict: Verdict, name: str = "release", **cases: str) -> StepResult:
    return StepResult(name=name, command=[], verdict=verdict, line=f"{verdict.value}: x", cases=cases)


FINE = result(Verdict.PASS, llama="PASS", gemma="KNOWN at blocks.0.attn.hook_q")
BROKEN = result(Verdict.FAIL, llama="FAIL at blocks.0.attn.hook_k", gemma="KNOWN at blocks.0.attn.hook_q")
UNKNOWN = result(Verdict.INCONCLUSIVE)
BROKE_OFF = result(Verdict.ERROR, llama="PASS").model_copy(update={"whole": False})


def test_nights_as_the_ledger_has_them_tell_nobody(tmp_path: Path) -> None:
    assert [night(tmp_path, FINE) for _ in range(3)] == [(Verdict.PASS, "")] * 3


def test_a_new_failure_is_told_once_and_so_is_its_end(tmp_path: Path) -> None:
    assert night(tmp_path, FINE) == (Verdict.PASS, "")
    verdict, issue = night(tmp_path, BROKEN, date="2026-01-02")
    assert verdict is Verdict.FAIL
    assert "llama: PASS → FAIL at blocks.0.attn.hook\\_k" in issue
    assert "gemma" not in issue
    assert "2026-01-01" in issue, "what it is compared with"
    assert night(tmp_path, BROKEN) == (Verdict.FAIL, ""), "the same failure once more is no second issue"
    assert "llama: FAIL at blocks.0.attn.hook\\_k → PASS" in night(tmp_path, FINE)[1]


def test_a_failure_on_the_first_night_is_told(tmp_path: Path) -> None:
    assert "llama: never run → FAIL" in night(tmp_path, BROKEN)[1]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            BROKEN,
            BROKEN.model_copy(update={"cases": {**BROKEN.cases, "llama": "FAIL at logits"}}),
            "hook\\_k → FAIL at logits",
        ),
        (FINE, result(Verdict.PASS, llama="PASS", gemma="PASS"), "gemma: KNOWN at blocks.0.attn.hook\\_q → PASS"),
        (FINE, result(Verdict.PASS, llama="PASS"), "→ no longer run"),
        (FINE, BROKE_OFF, "the run: PASS → ERROR"),
        (BROKE_OFF, FINE, "the run: ERROR → PASS"),
    ],
    ids=["another first tensor", "a divergence mended", "a case lost", "a run broke off", "a run whole again"],
)
def test_every_other_change_is_told_too(tmp_path: Path, before: StepResult, after: StepResult, said: str) -> None:
    night(tmp_path, before)
    assert said in night(tmp_path, after)[1]
    assert night(tmp_path, after)[1] == ""


def test_a_run_that_broke_off_says_nothing_of_the_cases_it_did_not_reach(tmp_path: Path) -> None:
    night(tmp_path, FINE)
    assert "gemma" not in night(tmp_path, BROKE_OFF)[1]
    assert "gemma" not in night(tmp_path, FINE)[1]


def test_an_inconclusive_night_keeps_the_last_result(tmp_path: Path) -> None:
    night(tmp_path, BROKEN)
    kept = (tmp_path / "last.json").read_bytes()
    assert night(tmp_path, UNKNOWN) == (Verdict.INCONCLUSIVE, "")
    assert (tmp_path / "last.json").read_bytes() == kept
    assert night(tmp_path, BROKEN) == (Verdict.FAIL, "")


def test_one_step_out_of_reach_neither_hides_nor_makes_a_change_in_another(tmp_path: Path) -> None:
    lost = result(Verdict.INCONCLUSIVE, "main")
    night(tmp_path, FINE, result(Verdict.PASS, "main", llama="PASS"))
    verdict, issue = night(tmp_path, BROKEN, lost)
    assert verdict is Verdict.FAIL and "`release`" in issue and "Changed in `main`" not in issue
    assert night(tmp_path, BROKEN, result(Verdict.PASS, "main", llama="PASS"))[1] == ""
    assert conclude([FINE, lost], tmp_path, "x") is Verdict.INCONCLUSIVE
    assert conclude([result(Verdict.ERROR), lost], tmp_path, "x") is Verdict.ERROR


def test_a_last_night_that_is_damaged_is_an_error_and_not_a_first_night(tmp_path: Path) -> None:
    (tmp_path / "last.json").write_text('{"steps": {}, "extra": 1}')
    with pytest.raises(NightlyError, match=r"last\.json: not a Last"):
        night(tmp_path, BROKEN)


def test_a_hostile_name_stays_text(tmp_path: Path) -> None:
    issue = night(tmp_path, BROKEN.model_copy(update={"cases": {HOSTILE: "FAIL"}}))[1]
    assert "<script" not in issue.replace("\\<script", "") and "\x1b" not in issue


# --- one step -------------------------------------------------------------------------------------


def writes(result: RunResult, code: int | None = None) -> Callable[[list[str], Path], int]:
    """A command that leaves a report of this result."""

    def run(command: list[str], log: Path) -> int:
        log.write_text("some\nlast words\n")
        write_json(report.document(result), Path(command[-1]) / "report.json")
        return result.verdict.exit_code if code is None else code

    return run


def ran(out: Path, run: Callable[[list[str], Path], int], step: Step = STEP) -> StepResult:
    found = run_step(step, out, load_cases(), out / "cache", run)
    assert gathered(step, out) == found, "what another machine reads is what this one found"
    return found


def test_a_report_becomes_each_cases_status_and_first_tensor(tmp_path: Path) -> None:
    found = ran(tmp_path, writes(everything()))
    assert found.verdict is Verdict.FAIL and found.line == everything().line()
    assert found.cases["failfam/fail"] == "FAIL at blocks.0.attn.hook_scores"
    assert found.cases["knownfam/known"] == "KNOWN at blocks.0.attn.hook_scores"
    assert found.cases["passfam/pass"] == "PASS"


def test_a_run_without_its_network_is_inconclusive_with_the_reason(tmp_path: Path) -> None:
    nothing = run_of()
    nothing.skipped = {"llama/hub": OUT_OF_REACH}
    found = ran(tmp_path, writes(nothing))
    assert (found.verdict, found.line.endswith(OUT_OF_REACH)) == (Verdict.INCONCLUSIVE, True)


def test_a_report_of_the_night_before_is_not_this_nights(tmp_path: Path) -> None:
    ran(tmp_path, writes(run_of(case("llama/hub"))))
    found = ran(tmp_path, lambda command, log: log.write_text("Killed\n") and -9)
    assert found.verdict is Verdict.ERROR and not found.whole
    assert found.line == "ended with -9: Killed"


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (writes(run_of(case("llama/hub")), code=1), "exit code 1 is not that of the verdict PASS"),
        (lambda command, log: Path(command[-1], "report.json").write_text("{}") * 0, "not a Report"),
        (lambda command, log: execute(["sleep", "9"], log, 0.1), "did not end within 0.1 s"),
    ],
    ids=["exit code and report differ", "damaged report", "hangs"],
)
def test_a_step_that_cannot_be_believed_is_an_error(
    tmp_path: Path, run: Callable[[list[str], Path], int], said: str
) -> None:
    found = ran(tmp_path, run)
    assert found.verdict is Verdict.ERROR and said in found.line


def test_a_command_that_ends_well_and_leaves_no_report_is_no_pass(tmp_path: Path) -> None:
    found = ran(tmp_path, lambda command, log: log.write_text("hello\n") * 0)
    assert found.verdict is Verdict.ERROR and "no report" in found.line


JUNIT = """<testsuites><testsuite name="pytest"><testcase classname="t" name="a"/>{}</testsuite></testsuites>"""
BAD = '<testcase classname="t" name="b"><failure message="x"/></testcase>'


@pytest.mark.parametrize(
    ("code", "log", "junit", "verdict", "said"),
    [
        (0, "1 passed", JUNIT.format(""), Verdict.PASS, "1 passed"),
        (1, "1 failed", JUNIT.format(BAD), Verdict.FAIL, "1 failed"),
        (1, "1 failed", JUNIT.format(""), Verdict.ERROR, "no test in it did"),
        (3, "INCONCLUSIVE: no CUDA device\n1 deselected", JUNIT.format(""), Verdict.INCONCLUSIVE, "no CUDA device"),
        (3, "INTERNALERROR> boom", JUNIT.format(""), Verdict.ERROR, "boom"),
        (4, "usage: pytest", "", Verdict.ERROR, "usage"),
    ],
)
def test_pytests_exit_code_its_file_and_its_last_words_make_the_verdict(
    tmp_path: Path, code: int, log: str, junit: str, verdict: Verdict, said: str
) -> None:
    step = next(step for step in plan() if step.name == "gpu-tests")

    def run(command: list[str], file: Path) -> int:
        file.write_text(log)
        if junit:
            Path(command[-1]).write_text(junit)
        return code

    found = ran(tmp_path, run, step)
    assert found.verdict is verdict and said in found.line
    assert found.cases.get("t::b", "PASS") == ("FAIL" if verdict is Verdict.FAIL else "PASS")


def test_a_skipped_test_is_no_pass_and_an_expected_failure_a_known_one(tmp_path: Path) -> None:
    skips = [
        f'<testcase classname="t" name="{kind}"><skipped type="pytest.{kind}"/></testcase>'
        for kind in ("skip", "xfail")
    ]
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT.format("".join(skips)))
    assert nightly._of_junit(path) == {"t::a": "PASS", "t::xfail": "KNOWN"}


@pytest.mark.parametrize(
    ("other", "status"), [([], "PASS"), (["logits"], "other bytes")], ids=["the same bytes", "other bytes"]
)
def test_what_a_gpu_does_not_repeat_is_told_once(tmp_path: Path, other: list[str], status: str) -> None:
    step = next(step for step in plan() if step.name == "gpu-repeat")
    case = RepeatedCase(id="llama/hub", tensors=44, differing=other)
    repeated = Repeated(candidate="torch", device="cuda:0", times=3, cases=[case])

    def run(command: list[str], log: Path) -> int:
        write_json(repeated.model_dump(), Path(command[-1]) / "repeat.json")
        return 0

    found = ran(tmp_path, run, step)
    assert found.verdict is Verdict.PASS and found.cases == {"llama/hub": status} and "on cuda:0" in found.line
    assert ("other bytes" in night(tmp_path, found)[1]) is bool(other)
    assert night(tmp_path, found)[1] == ""


@pytest.mark.parametrize("text", ["{}", '{"line": "x", "cases": [{"id": "a"}]}', "nonsense"])
def test_a_damaged_diff_is_an_error(tmp_path: Path, text: str) -> None:
    step = next(step for step in plan() if step.name == "gpu-cpu")
    found = ran(tmp_path, lambda command, log: Path(command[-1], "diff.json").write_text(text) * 0, step)
    assert found.verdict is Verdict.ERROR and "not what `diff` writes" in found.line


def test_a_diff_says_of_each_case_whether_it_is_worse(tmp_path: Path) -> None:
    step, document = next(step for step in plan() if step.name == "gpu-cpu"), diff_views.document(differing())

    def run(command: list[str], log: Path) -> int:
        write_json(document, Path(command[-1]) / "diff.json")
        return 1

    found = ran(tmp_path, run, step)
    assert found.verdict is Verdict.FAIL and found.line == document["line"]
    assert found.cases["llama/v5"] == "FAIL" and found.cases["mistral/v5"] == "PASS"


def test_a_machine_that_never_reported_is_inconclusive_with_the_remedy(tmp_path: Path) -> None:
    found = gathered(STEP, tmp_path)
    assert found.verdict is Verdict.INCONCLUSIVE and "make nightly STEPS=release" in found.line


def test_no_step_of_that_name_is_an_error() -> None:
    assert [step.name for step in chosen(plan(), "gpu-*")] == [s.name for s in plan() if s.name.startswith("gpu")]
    with pytest.raises(NightlyError, match="no step matches 'cpu'"):
        chosen(plan(), "cpu")


def test_the_process_of_a_step_runs_in_the_suites_root(tmp_path: Path) -> None:
    code = execute([sys.executable, "-c", "import os; print(os.getcwd()); raise SystemExit(3)"], tmp_path / "log")
    assert (code, (tmp_path / "log").read_text().strip()) == (3, str(ROOT))


# --- for real, in this process --------------------------------------------------------------------


def in_this_process(command: list[str], log: Path) -> int:
    done = CliRunner().invoke(cli.app, command[len(nightly.OURS) :])
    log.write_text(done.output)
    return done.exit_code


def only_llama(spec: str) -> Step:
    return Step("main", (*nightly.OURS, "run", "--candidate", spec, "--cases", "llama/hub"))


def test_a_planted_fault_fails_the_night(tmp_path: Path) -> None:
    assert ran(tmp_path / "a", in_this_process, only_llama("stored:0.2.2")).cases == {"llama/hub": "PASS"}
    stored = tmp_path / "stored"
    (stored / "llama").mkdir(parents=True)
    source = ROOT / "rust_outputs" / "0.2.2"
    (stored / "candidate.json").write_bytes((source / "candidate.json").read_bytes())
    # The trace of another case: every number in it is honest, and none is this case's.
    (stored / "llama" / "hub.json").write_bytes((source / "llama" / "v5.json").read_bytes())
    found = ran(tmp_path / "b", in_this_process, only_llama(f"stored:{stored}"))
    assert found.verdict in (Verdict.FAIL, Verdict.ERROR) and found.cases["llama/hub"] != "PASS"
    assert "llama/hub" in night(tmp_path, found)[1]


def test_git_main_out_of_reach_is_inconclusive_and_one_that_does_not_compile_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARITY_CACHE", str(tmp_path / "cache"))
    gone = ran(tmp_path / "a", in_this_process, only_llama(f"git:{tmp_path}/nowhere@main"))
    assert gone.verdict is Verdict.INCONCLUSIVE
    assert "git says" in gone.line and "check the network and the URL" in gone.line
    tools = tmp_path / "bin"
    tools.mkdir()
    spec = committed(tmp_path / "repository")
    for name, script in {"rustc": "echo rustc 9.9.9", "cargo": 'cat "$PARITY_SAYS" >&2; exit 101'}.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    says = tmp_path / "says"
    monkeypatch.setenv("PARITY_SAYS", str(says))
    for text, verdict in {
        "error: failed to get `serde`\n\nCaused by:\n  [6] Could not resolve host": Verdict.INCONCLUSIVE,
        "error[E0308]: mismatched types\nerror: could not compile `candle-mi` (lib)": Verdict.ERROR,
    }.items():
        says.write_text(text)
        assert ran(tmp_path / "b", in_this_process, only_llama(spec)).verdict is verdict, text
    # A mirror that was fetched once, and a remote that went away.
    (tmp_path / "repository").rename(tmp_path / "moved")
    assert ran(tmp_path / "c", in_this_process, only_llama(spec)).verdict is Verdict.INCONCLUSIVE


def test_no_gpu_and_no_hub_are_inconclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(nightly, "prepare", unobtainable)
    steps = {step.name: step for step in plan(main=f"path:{write_crate(tmp_path / 'crate')}")}
    found = ran(tmp_path, in_this_process, steps["gpu-release"])
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "no CUDA device: run on a machine with an NVIDIA GPU" in found.line
    found = ran(tmp_path, in_this_process, steps["hub"])
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "cannot get" in found.line and "HF_TOKEN" in found.line


def unobtainable(case: object, cache: Path) -> None:
    raise ModelError("cannot get google/gemma-2-2b@main from the hub: no route to host")


def test_the_command_gathers_concludes_and_ends_with_the_verdicts_code(tmp_path: Path) -> None:
    for step in plan():
        write_json(FINE.model_copy(update={"name": step.name}).model_dump(mode="json"),
                          tmp_path / step.name / "step.json")  # fmt: skip
    arguments = ["nightly", "--gathered", "--out", str(tmp_path)]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    broken = BROKEN.model_copy(update={"name": "main"})
    write_json(broken.model_dump(mode="json"), tmp_path / "main" / "step.json")
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 1 and (tmp_path / "issue.md").is_file()
    assert CliRunner().invoke(cli.app, [*arguments, "--steps", "hub"]).exit_code == 0
    (tmp_path / "hub" / "step.json").unlink()
    assert CliRunner().invoke(cli.app, [*arguments, "--steps", "hub"]).exit_code == 3
    assert "## INCONCLUSIVE" in (tmp_path / "summary.md").read_text()
