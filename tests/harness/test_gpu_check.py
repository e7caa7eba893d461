"""``make gpu-check`` on the CPU: honest lines pass, and each check fails on a planted fault. No GPU is involved."""

import json
import lzma
import shlex
import sys
from collections import Counter
from itertools import count
from pathlib import Path

import pytest
import torch
import typer

from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.errors import DeviceError
from candle_mi_parity.oracle.arithmetic import ACCUMULATION
from candle_mi_parity.spec.paths import ROOT
from validation import gpu_check, gpu_steps
from validation.gpu_steps import DATA, OPERATIONS, STEPS, Line, Op, Outcome, Setup

PORT = ROOT / "docs" / "examples" / "port.py"
CASE = "llama/hub"


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """Of the data the smallest matmul and one case."""
    row = {"operations": ["matmul"], "shapes": [[24, 64, 64]]}
    small = {"rounding": [row], **{step: DATA[step] | {"cases": [CASE]} for step in ("determinism", "memory")}}
    monkeypatch.setattr(gpu_steps, "DATA", DATA | small | {"candle-mi": {"cases": [CASE]}})
    return Setup("cpu", "", tmp_path)


def outcomes(step: str, setup: Setup) -> list[Outcome]:
    return [line.outcome for line in gpu_steps.lines_of(step, setup)]


def test_the_steps_fit_into_eight_minutes_and_ask_each_family() -> None:
    assert set(DATA["seconds"]) == set(STEPS) and sum(DATA["seconds"].values()) <= 440
    asked = {case.partition("/")[0] for case in DATA["candle-mi"]["cases"]}
    assert not [case for case in DATA["candle-mi"]["cases"] if case not in gpu_steps.CASES]
    assert asked >= {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "starcoder2", "rwkv6", "rwkv7"}


# --- rounding -------------------------------------------------------------------------------------


def truncated(x: torch.Tensor) -> torch.Tensor:
    """TF32's 10 bits of mantissa."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def one_wrong_element(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    found = x @ w
    if found.dtype == torch.float32:
        found[3, 5] += 1e-3
    return found


WRONG: dict[str, Op] = {
    "TF32": lambda x, w: truncated(x) @ truncated(w) if x.dtype == torch.float32 else x @ w,
    "one element": one_wrong_element,
    "NaN": lambda x, w: (x @ w) * (torch.nan if x.dtype == torch.float32 else 1),
    "float64": lambda x, w: x.double() @ w.double(),
    "another row": lambda x, w: (x @ w).flip(0) if x.dtype == torch.float32 else x @ w,
    "another shape": lambda x, w: (x @ w)[: 12 if x.dtype == torch.float32 else None],
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_matmul_fails(setup: Setup, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    assert outcomes("rounding", setup) == [Outcome.PASS]
    monkeypatch.setitem(OPERATIONS, "matmul", WRONG[fault])
    [line] = gpu_steps.lines_of("rounding", setup)
    assert line.outcome is Outcome.FAIL and "expected" in line.says


@pytest.mark.parametrize("accumulation", [1e-4, 1e6])
def test_noise_of_a_wrong_size_fails(setup: Setup, monkeypatch: pytest.MonkeyPatch, accumulation: float) -> None:
    monkeypatch.setitem(ACCUMULATION, "cpu", accumulation)
    assert outcomes("rounding", setup) == [Outcome.FAIL]


@pytest.mark.thorough
def test_each_operation_passes_on_the_cpu(tmp_path: Path) -> None:
    lines = list(gpu_steps.rounding(Setup("cpu", "", tmp_path)))
    assert [line for line in lines if line.outcome is not Outcome.PASS] == []
    assert {line.name.partition(" ")[0] for line in lines} == set(OPERATIONS)


# --- candle-mi ------------------------------------------------------------------------------------


def port(setup: Setup, replaced: tuple[str, str] = ("", "")) -> Setup:
    """The example of the emitter's protocol, with one text of its source replaced, in place of candle-mi."""
    text = PORT.read_text(encoding="utf-8")
    assert replaced[0] in text
    program = setup.out / "port.py"
    program.write_text(text.replace(*replaced) if replaced[0] else text, encoding="utf-8")
    return Setup("cpu", shlex.join([sys.executable, str(program)]), setup.out)


@pytest.mark.thorough
def test_an_emitter_that_computes_something_else_fails(setup: Setup) -> None:
    assert outcomes("candle-mi", port(setup)) == [Outcome.PASS]
    [line] = gpu_steps.lines_of("candle-mi", port(setup, ('config["rope_theta"] **', "10000 **")))
    assert line.outcome is Outcome.FAIL and "blocks.0.attn.hook_scores" in line.says
    [line] = gpu_steps.lines_of("candle-mi", port(setup, ("plain = ", "plain = 0 and ")))
    assert line.outcome is Outcome.NOT_RUN and "this port knows" in line.says
    [line] = gpu_steps.lines_of("candle-mi", Setup("cpu", "no-such-program", setup.out))
    assert line.outcome is Outcome.FAIL and "cannot be started" in line.says


def test_without_an_emitter_candle_mi_is_not_run(setup: Setup) -> None:
    [line] = gpu_steps.lines_of("candle-mi", setup)
    assert line.outcome is Outcome.NOT_RUN and "--emitter" in line.says


# --- determinism ----------------------------------------------------------------------------------


def test_an_operation_that_is_not_deterministic_fails(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    same = gpu_steps.determinism(setup)
    assert next(same).outcome is Outcome.PASS
    calls = count()
    monkeypatch.setitem(OPERATIONS, "matmul", lambda x, w: x @ w + 1e-3 * next(calls))
    line = next(gpu_steps.determinism(setup))
    assert line.outcome is Outcome.FAIL and "matmul 24×64×64" in line.says


@pytest.mark.thorough
def test_a_run_that_is_not_deterministic_fails(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcomes("determinism", port(setup)) == [Outcome.PASS] * 3
    changing = ('at("logits", at(', 'at("logits", np.random.rand() * at(')  # a small factor could round to nothing
    line = list(gpu_steps.lines_of("determinism", port(setup, changing)))[-1]
    assert line.outcome is Outcome.FAIL and "logits" in line.says
    honest = TorchSource.trace

    def noisy(self: TorchSource, *given: object) -> object:
        trace = honest(self, *given)  # type: ignore[arg-type]
        trace.tensor("logits")[...] += torch.rand(1).item()
        return trace

    monkeypatch.setattr(TorchSource, "trace", noisy)
    line = list(gpu_steps.lines_of("determinism", setup))[1]
    assert line.outcome is Outcome.FAIL and "logits" in line.says


def test_what_compared_nothing_is_not_deterministic() -> None:
    assert gpu_steps.repeated("x", 0, []).outcome is Outcome.FAIL


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_run_that_holds_too_much_memory_fails(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcomes("memory", setup) == [Outcome.PASS]
    held: list[torch.Tensor] = []
    honest = TorchSource.trace

    def greedy(self: TorchSource, *given: object) -> object:
        held.append(torch.ones(48 * gpu_steps.MIB))  # 192 MiB
        return honest(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(TorchSource, "trace", greedy)
    [line] = gpu_steps.lines_of("memory", setup)
    assert line.outcome is Outcome.FAIL and "expected 0.0 to 161" in line.says


def test_a_peak_below_the_weights_fails() -> None:
    assert [gpu_steps.peaked("x", peak, 10, 20).outcome for peak in (9, 10, 20, 21)] == [
        Outcome.FAIL,
        Outcome.PASS,
        Outcome.PASS,
        Outcome.FAIL,
    ]


# --- the tests, and all together ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "counts", "failed", "expected"),
    [
        (0, {"passed": 3}, [], Outcome.PASS),
        (0, {"skipped": 3}, [], Outcome.NOT_RUN),
        (3, {"skipped": 1}, [], Outcome.NOT_RUN),
        (1, {"passed": 2, "failed": 1}, ["test_x.py::test"], Outcome.FAIL),
        (2, {"passed": 2}, [], Outcome.FAIL),
        (5, {}, [], Outcome.FAIL),
    ],
)
def test_only_tests_that_ran_and_passed_pass(
    code: int, counts: dict[str, int], failed: list[str], expected: Outcome
) -> None:
    line = gpu_steps.tested(code, Counter(counts), failed)
    assert line.outcome is expected and (not failed or failed[0] in line.says)


def test_a_step_that_is_out_of_time_is_not_run(setup: Setup) -> None:
    [line] = gpu_check.in_process("rounding", setup, 0.05)
    assert line.outcome is Outcome.NOT_RUN and line.says == "out of time after 0.05 s"


@pytest.mark.thorough
def test_lines_before_a_crash_are_kept_and_the_crash_fails(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys, os; open(sys.argv[4] + '/memory.jsonl', 'w').write(sys.argv[3]); os.abort()"
    line = json.dumps({"step": "memory", "name": "x", "outcome": "PASS", "says": "", "seconds": 1.0})
    monkeypatch.setattr(gpu_check, "MODULE", ["-c", program])
    found = gpu_check.in_process("memory", Setup("cpu", f"{line}\n{line[:9]}", setup.out), 60)
    assert [line.outcome for line in found] == [Outcome.PASS, Outcome.FAIL]
    assert "ended with code -6 after 1 lines" in found[-1].says


def test_a_missing_package_is_not_run_and_an_error_fails(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(error: Exception) -> Line:
        def step(_: Setup) -> list[Line]:
            raise error

        monkeypatch.setitem(STEPS, "memory", step)
        [line] = gpu_steps.lines_of("memory", setup)
        return line

    missing = stopped(ModuleNotFoundError("No module named 'gguf'", name="gguf"))
    assert missing.outcome is Outcome.NOT_RUN and "package gguf is not installed" in missing.says
    assert stopped(DeviceError("cuda:0 is out of memory")).outcome is Outcome.FAIL


def test_the_exit_code_says_the_worst() -> None:
    lines = {outcome: Line("memory", "x", outcome, "") for outcome in Outcome}
    some: list[list[str]] = [["PASS"], ["PASS", "NOT RUN"], ["PASS", "NOT RUN", "FAIL"], []]
    assert [gpu_check.exit_code([lines[Outcome(one)] for one in each]) for each in some] == [0, 3, 1, 3]


def test_without_a_gpu_it_says_so_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(typer.Exit) as ended:
        gpu_check.main(out=tmp_path / "out")
    said = capsys.readouterr()
    assert (ended.value.exit_code, said.out, (tmp_path / "out").exists()) == (2, "", False)
    assert said.err == ("gpu-check: no CUDA device was found: run on a machine with an NVIDIA GPU and its driver\n")


def test_a_compressed_emitter_is_unpacked(tmp_path: Path) -> None:
    packed = tmp_path / "parity-emitter.xz"
    packed.write_bytes(lzma.compress(b"#!/bin/sh\n"))
    out = tmp_path / "out"
    out.mkdir()
    assert gpu_check.unpacked(str(packed), out) == str(out / "parity-emitter")
    assert (out / "parity-emitter").read_bytes() == b"#!/bin/sh\n" and (out / "parity-emitter").stat().st_mode & 0o100
    assert gpu_check.unpacked("python port.py", out) == "python port.py"


@pytest.mark.thorough
def test_all_together_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With any time, since the limits are those of a machine with a GPU that does nothing else."""
    steps = ["candle-mi", "memory", "tests"]
    monkeypatch.setattr(gpu_check, "DATA", DATA | {"seconds": dict.fromkeys(STEPS, 1200)})
    with pytest.raises(typer.Exit) as ended:
        gpu_check.main("cpu", "", tmp_path, steps)
    report = json.loads((tmp_path / gpu_check.FILE).read_text(encoding="utf-8"))
    assert ended.value.exit_code == report["exit_code"] == 3, report
    assert {line["step"] for line in report["lines"]} == set(steps)
    assert [line["says"] for line in report["lines"] if line["outcome"] != "PASS"] == [gpu_steps.NO_EMITTER]
    assert report["device"] == "cpu" and report["torch"] == torch.__version__.partition("+")[0]
    assert len(capsys.readouterr().out.splitlines()) == len(report["lines"])
