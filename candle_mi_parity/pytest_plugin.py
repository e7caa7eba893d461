"""What the suite adds to pytest: options, skips that are counted or refused, known divergences, a summary."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from candle_mi_parity.run import library_versions
from candle_mi_parity.verdict import CaseResult, Status

INCONCLUSIVE = 3

_RESULTS = pytest.StashKey[dict[tuple[str, str], CaseResult]]()
_GPU_RAN = pytest.StashKey[list[str]]()


class KnownDivergence(AssertionError):  # noqa: N818 -- not an error: the expected one
    """The divergence that the ledger records, and no other; the only thing that excuses a test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("candle-mi-parity")
    group.addoption("--require-gpu", action="store_true", help="a test that needs CUDA fails where there is none")
    group.addoption("--require-rust", action="store_true", help="a test that needs cargo fails where there is none")
    group.addoption("--reason", default="", help="why goldens are regenerated; recorded in each")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULTS] = {}
    config.stash[_GPU_RAN] = []
    config.pluginmanager.register(_GpuWatch(config.stash[_GPU_RAN]))
    option = config.option
    regenerates = any(getattr(option, name, False) for name in ("force_regen", "regen_all"))
    if regenerates and len(str(option.reason).strip()) < 10:
        raise pytest.UsageError("goldens are regenerated only with --reason 'why the truth moved'")


def pytest_report_header() -> list[str]:
    versions = library_versions()
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return [
        "parity: " + ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "numpy")),
        f"parity: CUDA device: {device}; gate: position < 8, element < 32 times the predicted rounding noise",
    ]


def missing_tool(marker: str) -> str:
    """Why tests with a marker cannot run here, and the remedy; empty when they can."""
    if marker == "gpu" and not torch.cuda.is_available():
        return "no CUDA device: run on a machine with an NVIDIA GPU and its driver"
    if marker == "rust" and shutil.which("cargo") is None:
        return "no cargo: install a Rust toolchain from rustup.rs"
    return ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = str(config.getoption("markexpr", ""))
    for item in items:
        if item.get_closest_marker("hub") and "hub" not in asked:
            item.add_marker(pytest.mark.skip(reason="needs a download from the hub: select it with -m hub"))
        for marker in ("gpu", "rust"):
            reason = missing_tool(marker)
            if reason and item.get_closest_marker(marker) and not config.getoption(f"--require-{marker}"):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in ("gpu", "rust"):
        reason = missing_tool(marker)
        if reason and item.get_closest_marker(marker) and item.config.getoption(f"--require-{marker}"):
            pytest.fail(f"--require-{marker}: {reason}", pytrace=False)


class _GpuWatch:
    """Which gpu tests ran; reports reach the controller, also from xdist's workers."""

    def __init__(self, ran: list[str]) -> None:
        self._ran = ran

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and "gpu" in report.keywords:
            self._ran.append(report.nodeid)


def _gpu_was_asked_for(config: pytest.Config) -> bool:
    asked = str(config.getoption("markexpr", "") or "")
    return "gpu" in asked and "not gpu" not in asked


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """``-m gpu`` that ran no gpu test proves nothing, and must not look like a pass."""
    config = session.config
    nothing_failed = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    on_controller = not hasattr(config, "workerinput")
    if on_controller and _gpu_was_asked_for(config) and not config.stash[_GPU_RAN] and nothing_failed:
        session.exitstatus = INCONCLUSIVE


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash[_RESULTS]
    if results:
        terminalreporter.section("parity")
        for (candidate, case), result in sorted(results.items()):
            worst, first = result.worst, result.first_divergence
            line = f"{candidate:<14} {case:<18} {result.status.value:<10}"
            line += f" worst {worst.ratio:.3g} at {worst.name}" if worst else f" {result.error}"
            line += f"; first divergence {first.name}" if first else ""
            terminalreporter.write_line(line)
    if _gpu_was_asked_for(config) and not config.stash[_GPU_RAN]:
        reason = missing_tool("gpu") or "none was collected"
        terminalreporter.write_line(f"INCONCLUSIVE: -m gpu was asked for and no gpu test ran ({reason})")


def record(config: pytest.Config, candidate: str, result: CaseResult) -> None:
    """Keep a result for the summary."""
    config.stash[_RESULTS][candidate, result.id] = result


def check(result: CaseResult, belongs: Any) -> None:
    """Assert that a group of a case's tensors passed.

    :param belongs: predicate over tensor names.
    :raises KnownDivergence: the case does just what its ledger entry records.
    """
    if result.status is Status.KNOWN:
        raise KnownDivergence(f"{result.id}: {result.known}")
    assert not result.error, result.message()
    group = [tensor for tensor in result.tensors if belongs(tensor.name)]
    assert group, f"{result.id}: nothing was compared; the case has {len(result.tensors)} tensors"
    bad = [tensor.message() for tensor in group if tensor.status is not Status.PASS]
    assert not bad, f"{result.id}\n" + "\n".join(bad[:3]) + f"\n{result.known}\n  reproduce: {result.reproduce}"
