"""The pytest plugin of this suite's own tests: options, lanes, skips with a remedy, known divergences as expected
failures, and a summary."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Generator
from typing import Any

import pytest

from candle_mi_parity.candidate import cuda
from candle_mi_parity.candidate.checkout import OF_A_HOOK
from candle_mi_parity.compare.verdict import CaseResult, Outcome, Status
from candle_mi_parity.files.escape import one_line, printable
from candle_mi_parity.run.run import library_versions
from candle_mi_parity.spec.cases import OPT_IN_LANES

INCONCLUSIVE = 3

Seen = tuple[str, str, str, float, str]
"""Candidate, case, status, worst ratio, and the first divergence or the error."""

FROM_OUTSIDE = re.compile(rf"GITHUB_|(FORCE_COLOR|PY_COLORS|TTY_\w+|{'|'.join(OF_A_HOOK)})$")
"""Variables of GitHub's runners, of terminals, and of git's hooks."""

_SEEN = pytest.StashKey[set[Seen]]()
_GPU_RAN = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("candle-mi-parity")
    group.addoption("--require-gpu", action="store_true", help="a test that needs CUDA fails where there is none")
    group.addoption("--require-rust", action="store_true", help="a test that needs cargo fails where there is none")
    group.addoption("--reason", default="", help="why goldens are regenerated; recorded in each")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SEEN] = set()
    config.stash[_GPU_RAN] = []
    config.pluginmanager.register(_GpuWatch(config.stash[_GPU_RAN]))
    option = config.option
    regenerates = any(getattr(option, name, False) for name in ("force_regen", "regen_all"))
    if regenerates and len(str(option.reason).strip()) < 10:
        raise pytest.UsageError("goldens are regenerated only with --reason 'why the truth moved'")


def pytest_sessionstart() -> None:
    """Take away what changes how a command prints, where it writes a summary, and to which repository git commits."""
    for name in filter(FROM_OUTSIDE.match, list(os.environ)):
        del os.environ[name]


def pytest_report_header() -> list[str]:
    versions = library_versions()
    device = cuda.describe("cuda:0")
    return [
        "parity: " + ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "numpy")),
        f"parity: CUDA device: {device}; gate: position < 8, element < 32 times the predicted rounding noise",
    ]


def missing_tool(marker: str) -> str:
    """Why tests with a marker cannot run here, and the remedy, or empty."""
    if marker == "gpu":
        return cuda.missing("cuda")
    if marker == "rust" and shutil.which("cargo") is None:
        return "no cargo: install a Rust toolchain from rustup.rs"
    return ""


def _unselected_lane(item: pytest.Item) -> str:
    """The opt-in lane of a test that was not selected, or empty."""
    asked = str(item.config.getoption("markexpr", ""))
    return next((lane for lane in OPT_IN_LANES if item.get_closest_marker(lane) and lane not in asked), "")


def _missing(item: pytest.Item) -> dict[str, str]:
    """The markers of a test that cannot run here → the reason."""
    reasons = {name: missing_tool(name) for name in ("gpu", "rust") if item.get_closest_marker(name)}
    return {name: reason for name, reason in reasons.items() if reason}


def _required(item: pytest.Item) -> list[str]:
    """The markers of a test that the command line requires to run."""
    return [n for n in ("gpu", "rust") if item.get_closest_marker(n) and item.config.getoption(f"--require-{n}")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if lane := _unselected_lane(item):
            item.add_marker(pytest.mark.skip(reason=f"{OPT_IN_LANES[lane]}: select it with -m {lane}"))
        for name, reason in _missing(item).items():
            if name not in _required(item):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name, reason in _missing(item).items():
        if name in _required(item):
            pytest.fail(f"--require-{name}: {reason}", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A required test that skips itself fails, unless its lane was not selected."""
    report = yield
    required = _required(item)
    if required and report.skipped and not hasattr(report, "wasxfail") and not _unselected_lane(item):
        report.longrepr = f"--require-{required[0]}: skipped: {_skip_reason(report)}"
        report.outcome = "failed"
    return report


class _GpuWatch:
    """Notes which gpu tests ran, also those of xdist's workers."""

    def __init__(self, ran: list[str]) -> None:
        self._ran = ran

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and "gpu" in report.keywords and not report.skipped:
            self._ran.append(report.nodeid)


def _gpu_was_asked_for(config: pytest.Config) -> bool:
    asked = str(config.getoption("markexpr", "") or "")
    return "gpu" in asked and "not gpu" not in asked


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """xdist: merge what a worker saw, so that the summary is that of a serial run."""
    node.config.stash[_SEEN].update(tuple(seen) for seen in getattr(node, "workeroutput", {}).get("parity", []))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """``-m gpu`` without a gpu test that ran is INCONCLUSIVE, not a pass."""
    config = session.config
    nothing_failed = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    on_controller = not hasattr(config, "workerinput")
    if not on_controller:
        config.workeroutput["parity"] = sorted(config.stash[_SEEN])  # type: ignore[attr-defined,index]
    if on_controller and _gpu_was_asked_for(config) and not config.stash[_GPU_RAN] and nothing_failed:
        session.exitstatus = INCONCLUSIVE


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    skips = Counter(_skip_reason(report) for report in terminalreporter.stats.get("skipped", []))
    lines = [*_passing(config.stash[_SEEN]), *_others(config.stash[_SEEN])]
    if lines:
        lines += [f"skipped {count}: {reason}" for reason, count in sorted(skips.items())]
        terminalreporter.section("parity")
        for line in lines:
            terminalreporter.write_line(line)
    if _gpu_was_asked_for(config) and not config.stash[_GPU_RAN]:
        reason = missing_tool("gpu") or "none was collected"
        terminalreporter.write_line(f"INCONCLUSIVE: -m gpu was asked for and no gpu test ran ({reason})")


def _skip_reason(report: Any) -> str:
    """The last item of pytest's (file, line, ``Skipped: reason``)."""
    last = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return one_line(last.removeprefix("Skipped: "))


def _passing(seen: set[Seen]) -> list[str]:
    """A line for each candidate and family with the worst ratio of each case; the gate is 8."""
    ratios: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for candidate, case, status, ratio, _ in sorted(seen):
        if status == Status.PASS.value:
            family, _, kind = case.partition("/")
            ratios[candidate, family].append(f"{kind or case} {ratio:.2g}")
    return [f"{candidate:<10} {family:<11} PASS  {', '.join(cases)}" for (candidate, family), cases in ratios.items()]


def _others(seen: set[Seen]) -> list[str]:
    """A line for each other case, with its worst ratio and its first divergence."""
    return [
        f"{candidate:<10} {case:<28} {status:<10} {detail}"
        for candidate, case, status, _, detail in sorted(seen)
        if status != Status.PASS.value
    ]


def record(config: pytest.Config, candidate: str, result: CaseResult) -> None:
    """Keep a case for the summary."""
    first, worst = result.first_divergence, result.worst
    ratio = worst.ratio if worst else 0.0
    detail = f"worst ratio {ratio:.3g}, first at {first.name}, ratio {first.ratio:.3g}" if first else result.error
    config.stash[_SEEN].add((candidate, result.id, result.status.value, ratio, one_line(detail)))


def check(result: CaseResult, belongs: Any) -> None:
    """Assert that a group of a case's tensors passed.

    :param belongs: predicate over tensor names.
    A known divergence is an expected failure.
    """
    if result.status is Status.KNOWN:
        pytest.xfail(printable(f"{result.id}: {result.note}"))
    if result.outcome is Outcome.ABSENT and result.status is Status.UNMEASURED:
        pytest.skip(printable(f"{result.id}: {result.error}"))
    assert not result.error, printable(result.message())
    group = [tensor for tensor in result.tensors if belongs(tensor.name)]
    assert group, f"{result.id}: nothing was compared; the case has {len(result.tensors)} tensors"
    # A case that passes has only the unmeasured tensors that it declares.
    fine = (Status.PASS, Status.UNMEASURED) if result.status is Status.PASS else (Status.PASS,)
    bad = [tensor.message() for tensor in group if tensor.status not in fine]
    message = f"{result.id}\n" + "\n".join(bad[:3]) + f"\n{result.note}\n  reproduce: {result.reproduce}"
    assert not bad, printable(message)
