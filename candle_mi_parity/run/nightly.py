"""The nightly run: a few commands of this suite, each in a process of its own, and what each of them said.

A step that crashes, hangs or eats the memory costs itself alone. What a step found lies in its own folder below the
output directory, ``step.json`` and the reports, so that steps may run on several machines and be gathered;
:mod:`nightly_verdict` compares them with the night before.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from junitparser import Error, Failure, JUnitXml, Skipped
from pydantic import BaseModel, ConfigDict, ValidationError

from candle_mi_parity.compare.run_result import Verdict
from candle_mi_parity.compare.verdict import Outcome, Status
from candle_mi_parity.errors import ParityError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.files.json_out import write_json
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.report.report_model import Report
from candle_mi_parity.run.repeat import Repeated
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.spec.paths import ROOT

RELEASE = "0.2.2"
MAIN = "git:https://github.com/mi-for-the-rust-of-us/candle-mi@main"
CUDA = "cuda:0"
HOURS = 5

Model = TypeVar("Model", bound=BaseModel)

OURS = (sys.executable, "-c", "from candle_mi_parity.cli.cli import main; main()")
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")


class NightlyError(ParityError):
    """The nightly run cannot be made as asked, or what it left is not what it writes."""


@dataclass(frozen=True)
class Step:
    """One command of the night.

    :ivar command: without the options that say where its results go.
    :ivar cases: the cases whose model and SAE have to be had first, as from the hub.
    """

    name: str
    command: tuple[str, ...]
    cases: str = ""


class StepResult(BaseModel):
    """What a step found.

    :ivar line: the verdict in one line; where it is no PASS and no FAIL, the reason and the remedy.
    :ivar cases: case → ``PASS``, ``FAIL at blocks.0.hook_…`` and so on.
    :ivar whole: whether all its cases were reached.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    command: list[str]
    verdict: Verdict
    line: str
    cases: dict[str, str]
    whole: bool = True

    @property
    def conclusive(self) -> bool:
        return self.verdict is not Verdict.INCONCLUSIVE


def plan(release: str = RELEASE, main: str = MAIN) -> list[Step]:
    """All steps of a night: CPU over two candidates, the GPU, the hub."""
    return [
        Step("release", (*OURS, "run", "--candidate", release)),
        Step("main", (*OURS, "run", "--candidate", main)),
        Step("gpu-tests", (*PYTEST, "-m", "gpu")),
        Step("gpu-release", (*OURS, "run", "--candidate", release, "--device", CUDA)),
        Step("gpu-cpu", (*OURS, "diff", "torch", "torch", "--cases", "*/hub", "--device-b", CUDA)),
        Step("gpu-repeat", (*OURS, "repeat", "--candidate", "torch", "--cases", "*/hub", "--device", CUDA)),
        Step("gpu-repeat-release", (*OURS, "repeat", "--candidate", release, "--cases", "*/hub", "--device", CUDA)),
        Step("hub", (*OURS, "run", "--candidate", release, "--cases", "gemma-2-2b/*"), cases="gemma-2-2b/*"),
    ]


def chosen(steps: list[Step], glob: str) -> list[Step]:
    """:raises NightlyError: no step has such a name."""
    found = [step for step in steps if fnmatch.fnmatchcase(step.name, glob)]
    if not found:
        raise NightlyError(f"no step matches {glob!r}: there are {', '.join(step.name for step in steps)}")
    return found


Execute = Callable[[list[str], Path], int]


def execute(command: list[str], log: Path, seconds: float = HOURS * 3600) -> int:
    """Run a command from the suite's root, its output into ``log``; its exit code.

    :raises NightlyError: it did not end in time and was killed.
    """
    with log.open("w", encoding="utf-8") as file:
        try:
            return subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            raise NightlyError(f"killed, for it did not end within {seconds:g} s; full log: {log}") from None


def run_step(step: Step, out: Path, table: list[Case], cache: Path, run: Execute = execute) -> StepResult:
    """Run a step and write ``step.json`` into its folder, which is emptied first.

    :param table: all cases.
    """
    folder = (out / step.name).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log, places = folder / "log.txt", _places(step, folder)
    if missing := _unobtainable(step, table, cache):
        result = _result(step, Verdict.INCONCLUSIVE, missing, {})
    else:
        try:
            code = run([*step.command, *places], log)
            result = _read(step, folder, code)
        except NightlyError as error:
            result = _result(step, Verdict.ERROR, str(error), {}, whole=False)
        if log.is_file():
            print(log.read_text(encoding="utf-8", errors="replace"), flush=True)
    write_json(result.model_dump(mode="json"), folder / "step.json")
    return result


def gathered(step: Step, out: Path) -> StepResult:
    """What a step left in its folder, on this machine or another.

    :raises NightlyError: it is not what :func:`run_step` writes.
    """
    path = out / step.name / "step.json"
    if not path.is_file():
        said = (
            f"no result at {path}: its machine is not there, or broke off; run `make nightly STEPS={step.name}` on it"
        )
        return _result(step, Verdict.INCONCLUSIVE, said, {})
    return read_model(StepResult, path)


def read_model(model: type[Model], path: Path) -> Model:
    """:raises NightlyError: the file is not such a model."""
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, ValueError) as error:
        raise NightlyError(f"{path}: not a {model.__name__}: {one_line(str(error))}") from error


def _places(step: Step, folder: Path) -> list[str]:
    if "pytest" in step.command:
        return ["--junitxml", str(folder / "junit.xml")]
    return ["--out", str(folder)]


def _unobtainable(step: Step, table: list[Case], cache: Path) -> str:
    """Why a step's models cannot be had; downloads them where they can."""
    try:
        for case in table:
            if step.cases and fnmatch.fnmatchcase(case.id, step.cases):
                prepare(case, cache)
    except ParityError as error:
        return f"{one_line(str(error))}; it needs the hub, or a copy in HF_HOME, and for Gemma HF_TOKEN"
    return ""


def _result(step: Step, verdict: Verdict, line: str, cases: dict[str, str], whole: bool = True) -> StepResult:
    shown = list(step.command[len(OURS) :] if step.command[: len(OURS)] == OURS else step.command[2:])
    return StepResult(name=step.name, command=shown, verdict=verdict, line=line, cases=cases, whole=whole)


def _read(step: Step, folder: Path, code: int) -> StepResult:
    """From the exit code and the report that goes with it; a report that says otherwise is an error."""
    verdict = next((verdict for verdict in Verdict if verdict.exit_code == code), None)
    if verdict is None:
        return _result(step, Verdict.ERROR, f"ended with {code}: {_last_line(folder)}", {}, whole=False)
    if "pytest" in step.command:
        return _read_pytest(step, folder, verdict)
    if (folder / "repeat.json").is_file():
        repeated = read_model(Repeated, folder / "repeat.json")
        cases = {case.id: case.status for case in repeated.cases}
        return _result(step, verdict, repeated.line, cases)
    if (folder / "diff.json").is_file():
        return _result(step, verdict, *_of_diff(folder / "diff.json"))
    if not (folder / "report.json").is_file():
        if verdict in (Verdict.PASS, Verdict.FAIL):
            raise NightlyError(f"ended with {code} and left no report: {_last_line(folder)}")
        return _result(step, verdict, _last_line(folder), {}, whole=False)
    report = read_model(Report, folder / "report.json")
    if report.verdict is not verdict:
        raise NightlyError(f"exit code {code} is not that of the verdict {report.verdict.value} in its report")
    cases = {case.id: _status(case.status, case.first_divergence) for case in report.cases}
    line = report.line
    if verdict is Verdict.INCONCLUSIVE:
        why = [case.error for case in report.cases if case.error] or list(report.skipped.values())
        # What held most of the cases back: the hub's are never in the default lane.
        line += f": {one_line(Counter(why).most_common(1)[0][0])}" if why else ""
    return _result(step, verdict, line, cases, whole=not report.fault)


def _read_pytest(step: Step, folder: Path, verdict: Verdict) -> StepResult:
    """pytest's own 3, an internal error, is no INCONCLUSIVE: that one says so in a line."""
    if verdict is Verdict.INCONCLUSIVE:
        said = [line for line in _log(folder) if line.startswith(verdict.value)]
        if not said:
            return _result(step, Verdict.ERROR, f"pytest broke off: {_last_line(folder)}", {}, whole=False)
        return _result(step, verdict, one_line(said[-1]), {})
    cases = _of_junit(folder / "junit.xml")
    if verdict is Verdict.FAIL and "FAIL" not in cases.values():
        raise NightlyError(f"{folder}/junit.xml: pytest failed, and no test in it did")
    return _result(step, verdict, _last_line(folder), cases, whole=verdict is not Verdict.ERROR)


def _of_diff(path: Path) -> tuple[str, dict[str, str]]:
    """The line, and of each case whether it got worse from the one device to the other."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return document["line"], {case["id"]: _compared(case) for case in document["cases"]}
    except (OSError, ValueError, KeyError) as error:
        raise NightlyError(f"{path}: not what `diff` writes: {error!r}") from error


def _compared(case: dict[str, Any]) -> str:
    """What a side could not be had of is no pass."""
    if case["worse"]:
        return "FAIL"
    lost = [side for side in ("a", "b") if case[side]["outcome"] in (Outcome.ERROR.value, Outcome.ABSENT.value)]
    return "ERROR" if lost else "PASS"


def _status(status: Status, first: str | None) -> str:
    return f"{status.value} at {first}" if first else status.value


def _of_junit(path: Path) -> dict[str, str]:
    """Every test of a pytest run that ran; an expected failure is a known divergence, and a skip says nothing."""
    if not path.is_file():
        return {}
    found: dict[str, str] = {}
    for suite in JUnitXml.fromfile(str(path)):
        for test in suite:
            bad = any(isinstance(outcome, Error | Failure) for outcome in test.result)
            skips = [outcome for outcome in test.result if isinstance(outcome, Skipped)]
            known = any(skip.type == "pytest.xfail" for skip in skips)
            if bad or known or not skips:
                found[f"{test.classname}::{test.name}"] = "FAIL" if bad else "KNOWN" if known else "PASS"
    return found


def _log(folder: Path) -> list[str]:
    log = folder / "log.txt"
    return log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []


def _last_line(folder: Path) -> str:
    return one_line(next((line for line in reversed(_log(folder)) if line.strip()), "it said nothing"))
