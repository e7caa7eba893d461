"""What the suite adds to pytest: options, skips that are counted or refused, known divergences, a summary."""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Generator
from typing import Any

import pytest

from candle_mi_parity.candidate import cuda
from candle_mi_parity.compare.check_result import CheckResult
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.files.escape import one_line, printable
from candle_mi_parity.run.run import library_versions
from candle_mi_parity.spec.cases import OPT_IN_LANES

INCONCLUSIVE = 3

Seen = tuple[str, str, str, float, str]
"""Candidate, case, status, worst ratio, and where it first diverges or why there is nothing to compare."""

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


def pytest_report_header() -> list[str]:
    versions = library_versions()
    device = cuda.describe("cuda:0")
    return [
        "parity: " + ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "numpy")),
        f"parity: CUDA device: {device}; gate: position < 8, element < 32 times the predicted rounding noise",
    ]


@pytest.fixture
def assert_parity() -> Callable[..., CheckResult]:
    """``assert_parity(model=…, prompt=…, sae=…)`` fails the test where :func:`candle_mi_parity.check` says no."""
    from candle_mi_parity import check

    def holds(**asked: Any) -> CheckResult:
        result = check(**asked)
        if not result.agrees:
            wrong = [p.case.message() for p in result.prompts if p.case.status is not Status.PASS]
            pytest.fail(printable("\n".join([result.sentence, *wrong[:3]])), pytrace=False)
        return result

    return holds


def missing_tool(marker: str) -> str:
    """Why tests with a marker cannot run here, and the remedy; empty when they can."""
    if marker == "gpu":
        return cuda.missing("cuda")
    if marker == "rust" and shutil.which("cargo") is None:
        return "no cargo: install a Rust toolchain from rustup.rs"
    return ""


def _waits(item: pytest.Item) -> str:
    """The lane that a test belongs to and that was not selected; empty when it is to run."""
    asked = str(item.config.getoption("markexpr", ""))
    return next((lane for lane in OPT_IN_LANES if item.get_closest_marker(lane) and lane not in asked), "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if lane := _waits(item):
            item.add_marker(pytest.mark.skip(reason=f"{OPT_IN_LANES[lane]}: select it with -m {lane}"))
        for marker in ("gpu", "rust"):
            reason = missing_tool(marker)
            if reason and item.get_closest_marker(marker) and not config.getoption(f"--require-{marker}"):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in ("gpu", "rust"):
        reason = missing_tool(marker)
        if reason and item.get_closest_marker(marker) and item.config.getoption(f"--require-{marker}"):
            pytest.fail(f"--require-{marker}: {reason}", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What is required and skips for whatever reason of its own has failed; a lane that waits is not required."""
    report = yield
    required = [
        name
        for name in ("gpu", "rust")
        if item.get_closest_marker(name) and item.config.getoption(f"--require-{name}")
    ]
    if required and report.skipped and not hasattr(report, "wasxfail") and not _waits(item):
        report.longrepr = f"--require-{required[0]}: skipped: {_skip_reason(report)}"
        report.outcome = "failed"
    return report


class _GpuWatch:
    """Which gpu tests ran; reports reach the controller, also from xdist's workers."""

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
    """xdist: a worker that ends hands the controller what it saw, so that ``-n`` prints what a serial run does."""
    node.config.stash[_SEEN].update(tuple(seen) for seen in getattr(node, "workeroutput", {}).get("parity", []))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """``-m gpu`` that ran no gpu test proves nothing, and must not look like a pass."""
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
    """pytest keeps it as (file, line, ``Skipped: reason``)."""
    last = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return one_line(last.removeprefix("Skipped: "))


def _passing(seen: set[Seen]) -> list[str]:
    """A line per candidate and family: each case's worst ratio, of which 8 is the gate."""
    ratios: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for candidate, case, status, ratio, _ in sorted(seen):
        if status == Status.PASS.value:
            family, _, kind = case.partition("/")
            ratios[candidate, family].append(f"{kind or case} {ratio:.2g}")
    return [f"{candidate:<10} {family:<11} PASS  {', '.join(cases)}" for (candidate, family), cases in ratios.items()]


def _others(seen: set[Seen]) -> list[str]:
    """A line per case that is no plain pass: its worst ratio and its first divergence."""
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
    A case that does just what is known of it is an expected failure; whether all that is known is still needed,
    a test of its own says.
    """
    if result.status is Status.KNOWN:
        pytest.xfail(printable(f"{result.id}: {result.note}"))
    assert not result.error, printable(result.message())
    group = [tensor for tensor in result.tensors if belongs(tensor.name)]
    assert group, f"{result.id}: nothing was compared; the case has {len(result.tensors)} tensors"
    # A case that passes has just the unmeasured tensors that its row declares.
    fine = (Status.PASS, Status.UNMEASURED) if result.status is Status.PASS else (Status.PASS,)
    bad = [tensor.message() for tensor in group if tensor.status not in fine]
    said = f"{result.id}\n" + "\n".join(bad[:3]) + f"\n{result.note}\n  reproduce: {result.reproduce}"
    assert not bad, printable(said)
