"""What the suite adds to pytest: options, skips that are counted or refused, known divergences, a summary."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from candle_mi_parity.run import library_versions
from candle_mi_parity.verdict import CaseResult, Status

INCONCLUSIVE = 3

_LINES = pytest.StashKey[set[str]]()
_GPU_RAN = pytest.StashKey[list[str]]()


class KnownDivergence(AssertionError):  # noqa: N818 -- not an error: the expected one
    """The divergence that the ledger records, and no other; the only thing that excuses a test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("candle-mi-parity")
    group.addoption("--require-gpu", action="store_true", help="a test that needs CUDA fails where there is none")
    group.addoption("--require-rust", action="store_true", help="a test that needs cargo fails where there is none")
    group.addoption("--reason", default="", help="why goldens are regenerated; recorded in each")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LINES] = set()
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


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """xdist: a worker that ends hands its lines to the controller, so that ``-n`` prints what a serial run prints."""
    node.config.stash[_LINES].update(getattr(node, "workeroutput", {}).get("parity", []))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """``-m gpu`` that ran no gpu test proves nothing, and must not look like a pass."""
    config = session.config
    nothing_failed = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    on_controller = not hasattr(config, "workerinput")
    if not on_controller:
        config.workeroutput["parity"] = sorted(config.stash[_LINES])  # type: ignore[attr-defined,index]
    if on_controller and _gpu_was_asked_for(config) and not config.stash[_GPU_RAN] and nothing_failed:
        session.exitstatus = INCONCLUSIVE


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if lines := config.stash[_LINES]:
        terminalreporter.section("parity")
        for line in sorted(lines):
            terminalreporter.write_line(line)
    if _gpu_was_asked_for(config) and not config.stash[_GPU_RAN]:
        reason = missing_tool("gpu") or "none was collected"
        terminalreporter.write_line(f"INCONCLUSIVE: -m gpu was asked for and no gpu test ran ({reason})")


def record(config: pytest.Config, candidate: str, result: CaseResult) -> None:
    """Keep a case that is not a plain pass for the summary."""
    if result.status is Status.PASS:
        return
    first = result.first_divergence
    line = f"{candidate:<10} {result.id:<28} {result.status.value:<10}"
    line += f" first at {first.name}, ratio {first.ratio:.3g}" if first else f" {result.error}"
    config.stash[_LINES].add(line)


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
    # A case that passes has just the unmeasured tensors that its row declares.
    fine = (Status.PASS, Status.UNMEASURED) if result.status is Status.PASS else (Status.PASS,)
    bad = [tensor.message() for tensor in group if tensor.status not in fine]
    assert not bad, f"{result.id}\n" + "\n".join(bad[:3]) + f"\n{result.known}\n  reproduce: {result.reproduce}"
