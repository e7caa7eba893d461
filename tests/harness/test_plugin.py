"""The pytest plugin: outcomes of judged cases, skips, required tools, and the summary."""

from types import SimpleNamespace

import pytest
import torch

from candle_mi_parity.spec.cases import OPT_IN_LANES

pytest_plugins = ["pytester"]

PREAMBLE = """
import pytest
from candle_mi_parity.compare.verdict import CaseResult, Status, TensorResult
from tests.plugin import check


def judged(status, wrong=False, error=""):
    tensors = [TensorResult("blocks.0.attn.hook_q", Status.PASS, position_ratio=1.0, compared=10)]
    if wrong:
        scores = TensorResult("blocks.0.attn.hook_scores", Status.FAIL, "values", position_ratio=1e6, compared=10)
        tensors.append(scores)
    return CaseResult("llama/v5", "llama", "a" * 64, status, "command", [] if error else tensors, error=error)
"""


def outcomes(pytester: pytest.Pytester, body: str, *arguments: str) -> pytest.RunResult:
    pytester.makepyfile(PREAMBLE + body)
    return pytester.runpytest_inprocess("-p", "tests.plugin", *arguments)


@pytest.mark.parametrize(
    ("result", "belongs", "outcome"),
    [
        ("Status.KNOWN, wrong=True", True, "xfailed"),
        ("Status.FAIL, wrong=True", True, "failed"),
        ("Status.ERROR, error='crash: emitter was ended by SIGKILL'", True, "failed"),
        ("Status.PASS", True, "passed"),
        ("Status.PASS", False, "failed"),  # nothing was compared
    ],
)
def test_the_outcome_of_a_judged_case(pytester: pytest.Pytester, result: str, belongs: bool, outcome: str) -> None:
    done = outcomes(pytester, f"def test_it(): check(judged({result}), lambda name: {belongs})\n")
    done.assert_outcomes(**{outcome: 1})
    if not belongs:
        done.stdout.fnmatch_lines(["*nothing was compared*"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_gpu_tests_without_a_gpu_are_inconclusive(pytester: pytest.Pytester) -> None:
    body = "@pytest.mark.gpu\ndef test_it(): pass\n\ndef test_other(): pass\n"
    done = outcomes(pytester, body, "-m", "gpu")
    assert done.ret == 3
    done.stdout.fnmatch_lines(["*INCONCLUSIVE: -m gpu was asked for and no gpu test ran (no CUDA device*"])
    assert outcomes(pytester, body, "-m", "not gpu").ret == 0
    required = outcomes(pytester, body, "-m", "gpu", "--require-gpu")
    required.assert_outcomes(errors=1)
    assert required.ret == 1


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA A", total_memory=8 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)


@pytest.mark.usefixtures("a_gpu")
def test_with_a_gpu_its_tests_run_and_the_header_names_it(pytester: pytest.Pytester) -> None:
    done = outcomes(pytester, "@pytest.mark.gpu\ndef test_it(): pass\n", "-m", "gpu", "--require-gpu")
    done.assert_outcomes(passed=1)
    assert done.ret == 0
    header = [
        "parity: torch *, transformers *",
        "parity: CUDA device: NVIDIA A, 8.00 GiB, driver *; gate: position < 8*",
    ]
    done.stdout.fnmatch_lines(header)


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(
    "body",
    ["def test_it(): pytest.skip('of its own')", "@pytest.mark.skip(reason='of its own')\ndef test_it(): pass"],
    ids=["inside", "by a marker"],
)
def test_a_gpu_test_that_skips_itself_does_not_count_as_run(pytester: pytest.Pytester, body: str) -> None:
    body = f"@pytest.mark.gpu\n{body}\n\n@pytest.mark.skip(reason='x')\ndef test_other(): pass\n"
    assert outcomes(pytester, body, "-m", "gpu").ret == 3, "the only gpu test was skipped"
    required = outcomes(pytester, body, "--require-gpu")
    found = required.parseoutcomes()
    assert found.get("failed", 0) + found.get("errors", 0) == 1 and found["skipped"] == 1
    assert required.ret == 1
    required.stdout.fnmatch_lines(["*--require-gpu: skipped: of its own*"])


@pytest.mark.parametrize("lane", OPT_IN_LANES)
def test_an_opt_in_lane_is_skipped_with_its_remedy(pytester: pytest.Pytester, lane: str) -> None:
    body = f"@pytest.mark.{lane}\ndef test_it(): pass\n"
    done = outcomes(pytester, body, "-rs")
    done.assert_outcomes(skipped=1)
    done.stdout.fnmatch_lines([f"*{OPT_IN_LANES[lane]}: select it with -m {lane}"])
    outcomes(pytester, body, "-m", lane).assert_outcomes(passed=1)
    outcomes(pytester, f"@pytest.mark.rust\n{body}", "--require-rust").assert_outcomes(skipped=1)


def test_a_test_sees_no_variable_of_a_runner_a_terminal_or_a_git_hook(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """typer and rich take either of the first two for a terminal with colours."""
    names = ("GITHUB_ACTIONS", "FORCE_COLOR", "GITHUB_STEP_SUMMARY", "TTY_COMPATIBLE", "GIT_INDEX_FILE")
    for name in (*names, "GIT_AUTHOR_NAME"):
        monkeypatch.setenv(name, "1")
    wanted = "set() == {*NAMES} & {*os.environ} and 'GIT_AUTHOR_NAME' in os.environ"
    body = f"import os\nNAMES = {names}\ndef test_it(): assert {wanted}\n"
    outcomes(pytester, body).assert_outcomes(passed=1)


def test_goldens_are_not_regenerated_without_a_reason(pytester: pytest.Pytester) -> None:
    done = outcomes(pytester, "def test_it(): pass\n", "--force-regen", "--reason", "short")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*only with --reason*"])


SUMMARY = """
import pytest
from tests.plugin import record
from candle_mi_parity.compare.verdict import CaseResult, Status, TensorResult

CASES = [("llama/hub", Status.PASS, 1.5), ("llama/v5", Status.FAIL, 2e6), ("phi3/hub", Status.PASS, 0.5)]


@pytest.mark.parametrize("case", CASES)
def test_it(case, request):
    name, status, ratio = case
    tensor = TensorResult("blocks.0.attn.hook_q\x1b[2J", status, position_ratio=ratio, compared=1)
    record(request.config, "0.2.2", CaseResult(name, "", "", status, "command", [tensor]))


@pytest.mark.parametrize("i", range(3))
def test_skipped(i):
    pytest.skip("no such thing here")
"""


def section(pytester: pytest.Pytester, *arguments: str) -> list[str]:
    pytester.makepyfile(SUMMARY)
    done = pytester.runpytest_subprocess("-p", "tests.plugin", *arguments)
    done.assert_outcomes(passed=3, skipped=3)
    start = next(i for i, line in enumerate(done.outlines) if "= parity =" in line)
    return [line for line in done.outlines[start + 1 :] if line and not line.startswith(("=", "SKIPPED"))]


@pytest.mark.thorough
def test_the_summary_is_the_same_with_and_without_workers(pytester: pytest.Pytester) -> None:
    serial = section(pytester)
    assert serial == [
        "0.2.2      llama       PASS  hub 1.5",
        "0.2.2      phi3        PASS  hub 0.5",
        "0.2.2      llama/v5                     FAIL       worst ratio 2e+06, first at "
        "blocks.0.attn.hook_q\\x1b[2J, ratio 2e+06",
        "skipped 3: no such thing here",
    ]
    assert section(pytester, "-n", "2") == serial
