"""The steps of :mod:`gpu_check`; each runs in a process of its own: STEP DEVICE EMITTER OUT."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from candle_mi_parity.candidate import cuda
from candle_mi_parity.candidate.program import ProgramSource
from candle_mi_parity.candidate.sources import Source
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.compare.gate import ELEMENT_GATE, POSITION_GATE, measure
from candle_mi_parity.compare.verdict import Status
from candle_mi_parity.errors import ParityError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.judge.case import Progress, judge_case
from candle_mi_parity.models.checkpoint import weight_bytes
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.oracle.arithmetic import ACCUMULATION, Arithmetic
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.oracle.rounding import MatmulScales, NoisePool, RoundingNoise, Truth64
from candle_mi_parity.run.repeat import digests
from candle_mi_parity.spec.cases import load_cases
from candle_mi_parity.spec.explanations import NOTHING_KNOWN
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.trace import Emitted

if TYPE_CHECKING:
    import pytest

DATA: dict[str, Any] = tomllib.loads(Path(__file__).with_name("gpu_check.toml").read_text(encoding="utf-8"))
CASES = {case.id: case for case in load_cases()}
SAMPLES = 16
MIB = 2**20
NO_EMITTER = "no --emitter FILE, which `make cuda-build` compiles"

Op = Callable[..., torch.Tensor]


class Outcome(StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"
    NOT_RUN = "NOT RUN"


@dataclass(frozen=True)
class Line:
    """One measurement.

    :ivar says: what was found, and of a failure what was expected; of what was not run the reason.
    """

    step: str
    name: str
    outcome: Outcome
    says: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Setup:
    """What is checked.

    :ivar emitter: the emitter's binary, or a command line that speaks its protocol; empty for none.
    """

    device: str
    emitter: str
    out: Path

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``."""
        return self.device.partition(":")[0]

    def candle_mi(self, scratch: str) -> ProgramSource:
        """candle-mi in a process of its own."""
        candidate = parse_candidate(f"command:{self.emitter}")
        return ProgramSource(candidate, self.out / "traces" / scratch, self.device)


# --- the fast tests -------------------------------------------------------------------------------


class _Counting:
    """A plugin of pytest that counts outcomes."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.outcomes[report.outcome] += 1
            self.failed += [report.nodeid] if report.failed else []


def tests(setup: Setup) -> Iterator[Line]:
    """The fast tests of the device."""
    import pytest

    chosen, counting = DATA["tests"][setup.kind], _Counting()
    arguments = ["-q", "-n", "0", "-p", "no:cacheprovider", "-m", chosen["markers"], "-k", chosen["names"]]
    code = pytest.main([*arguments, *DATA["tests"]["files"]], plugins=[counting])
    yield tested(code, counting.outcomes, counting.failed)


def tested(code: int, outcomes: Counter[str], failed: list[str]) -> Line:
    """The line of pytest's exit code and counts; no test that ran is no pass."""
    says = ", ".join(f"{count} {word}" for word, count in sorted(outcomes.items())) or "no test was collected"
    if failed or code not in (0, 3):
        first = f"; first {failed[0]}" if failed else ""
        return Line("tests", "pytest", Outcome.FAIL, f"{says}, exit code {int(code)}, expected 0{first}")
    return Line("tests", "pytest", Outcome.PASS if code == 0 and outcomes["passed"] else Outcome.NOT_RUN, says)


# --- rounding -------------------------------------------------------------------------------------


def _rms_norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


OPERATIONS: dict[str, Op] = {
    "matmul": lambda x, w: x @ w,
    "linear": lambda x, w: functional.linear(x, w.t(), w[0]),
    "scores": lambda x, w: x[None] @ w[None],
    "softmax": lambda x: torch.softmax(x, -1),
    "rms_norm": _rms_norm,
    "layer_norm": lambda x: functional.layer_norm(x, x.shape[-1:]),
    "mean": lambda x: x.abs().mean(-1, keepdim=True),
    "exp": torch.exp,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 0.125),
    "sin": torch.sin,
    "cos": torch.cos,
}


def _given(shape: list[int], scale: float) -> list[torch.Tensor]:
    """Normal float32 numbers: [rows, entries], or of a matmul [rows, terms] and [terms, columns]."""
    rng = np.random.default_rng(shape)
    sizes = [shape] if len(shape) == 2 else [shape[:2], shape[1:]]
    return [torch.from_numpy(rng.standard_normal(size, dtype=np.float32) * np.float32(scale)) for size in sizes]


def _operations() -> Iterator[tuple[str, Op, list[torch.Tensor]]]:
    """Name, operation and operands of each row and shape."""
    for row in DATA["rounding"]:
        for name in row["operations"]:
            for shape in row["shapes"]:
                yield f"{name} {'×'.join(map(str, shape))}", OPERATIONS[name], _given(shape, row.get("scale", 1.0))


def _on(device: str, operation: Op, given: list[torch.Tensor]) -> torch.Tensor:
    """The result of an operation in strict float32."""
    with torch.no_grad(), cuda.strict_float32(device):
        return operation(*(operand.to(device) for operand in given)).cpu()


def rounding(setup: Setup) -> Iterator[Line]:
    """The error of each operation in float32 on the device against float64 on the CPU, in units of the noise σ."""
    for name, operation, given in _operations():
        started = time.monotonic()
        found = _on(setup.device, operation, given)
        line = rounded(name, found, *_expected(operation, given, ACCUMULATION[setup.kind]))
        yield replace(line, seconds=time.monotonic() - started)


def _expected(operation: Op, given: list[torch.Tensor], accumulation: float) -> tuple[torch.Tensor, torch.Tensor]:
    """An operation in float64, and the deviation of its noise."""
    wide, scales, pool = [operand.double() for operand in given], MatmulScales(), NoisePool(0)
    with torch.no_grad():
        with Truth64(scales):
            truth = operation(*wide)
        square = torch.zeros_like(truth)
        for _ in range(SAMPLES):
            with RoundingNoise(pool, scales, Arithmetic(accumulation=accumulation)):
                sample = operation(*wide)
            square += (sample - truth).square()
    return truth, (square / SAMPLES).sqrt()


def rounded(name: str, found: torch.Tensor, truth: torch.Tensor, noise: torch.Tensor) -> Line:
    """The line of an operation's result; every row of a result is a position."""
    if found.shape != truth.shape or found.dtype != torch.float32:
        says = f"a result {list(found.shape)} of {found.dtype}, expected {list(truth.shape)} of torch.float32"
        return Line("rounding", name, Outcome.FAIL, says)
    error, expected, sigma = (x.double().reshape(1, -1, x.shape[-1]).numpy() for x in (found - truth, truth, noise))
    ratios = measure(error, expected, sigma, samples=SAMPLES)
    position, element, (low, high) = float(ratios.position.max()), float(ratios.element.max()), DATA["limits"]["rms"]
    # Written so that NaN fails.
    right = low <= ratios.rms <= high and position < POSITION_GATE / 2 and element < ELEMENT_GATE / 2
    says = f"error / noise: rms {ratios.rms:.3g}, position {position:.3g}, element {element:.3g}"
    if not right:
        halves = f"{POSITION_GATE / 2:g} and {ELEMENT_GATE / 2:g}"
        says += f"; expected rms {low} to {high}, and of the others less than half the gate, {halves}"
    return Line("rounding", name, Outcome.PASS if right else Outcome.FAIL, says)


# --- candle-mi ------------------------------------------------------------------------------------


def candle_mi(setup: Setup) -> Iterator[Line]:
    """candle-mi on the device, one case a family, judged as in any run."""
    if not setup.emitter:
        yield Line("candle-mi", "all cases", Outcome.NOT_RUN, NO_EMITTER)
        return
    with setup.candle_mi("judged") as source:
        for case in DATA["candle-mi"]["cases"]:
            yield judged(case, source)


def judged(case: str, source: Source) -> Line:
    """The line of a case; a divergence that is known elsewhere is a failure here."""
    result = judge_case(CASES[case], source, "the emitter", cache_root(), NOTHING_KNOWN, Progress()).result
    outcome = {Status.PASS: Outcome.PASS, Status.UNMEASURED: Outcome.NOT_RUN}.get(result.status, Outcome.FAIL)
    if first := result.first_divergence:
        says = f"first at {first.name}, {first.ratio:.3g} times the noise, expected < 8 at a position"
    else:
        worst = f", the worst {result.worst.ratio:.2g} of 8" if result.worst else ""
        says = one_line(result.error) or f"{len(result.tensors)} tensors{worst}"
    return Line("candle-mi", case, outcome, says, result.seconds)


# --- determinism ----------------------------------------------------------------------------------


def determinism(setup: Setup) -> Iterator[Line]:
    """Each operation, transformers and candle-mi twice, compared bit for bit."""
    unequal = [name for name, operation, given in _operations() if _differs(setup.device, operation, given)]
    yield repeated("operations", len(list(_operations())), unequal)
    for case in DATA["determinism"]["cases"]:
        yield _twice(f"transformers {case}", case, lambda _: TorchSource(setup.device))
    for case in DATA["determinism"]["cases"] if setup.emitter else []:
        yield _twice(f"candle-mi {case}", case, setup.candle_mi)
    if not setup.emitter:
        yield Line("determinism", "candle-mi", Outcome.NOT_RUN, NO_EMITTER)


def _differs(device: str, operation: Op, given: list[torch.Tensor]) -> bool:
    one, two = (_on(device, operation, given).numpy().tobytes() for _ in range(2))
    return one != two


def _twice(name: str, case: str, opened: Callable[[str], Source]) -> Line:
    """The line of a case that is run twice, each time from the beginning."""
    started, found = time.monotonic(), []
    for scratch in ("first", "second"):
        with opened(scratch) as source:
            found.append(digests(_trace(case, source)))
    names = [name for name in dict.fromkeys(chain(*found)) if found[0].get(name) != found[1].get(name)]
    line = repeated(name, len(found[0]), names)
    return replace(line, seconds=time.monotonic() - started)


def _trace(case: str, source: Source) -> Emitted:
    subject = prepare(CASES[case], cache_root())
    oracle = Oracle(subject, cache_root(), source.device)
    return source.trace(subject, "free", oracle.truth(), oracle.inputs("free"))


def repeated(name: str, count: int, unequal: list[str]) -> Line:
    """The line of what was run twice."""
    if unequal or not count:
        says = f"{len(unequal)} of {count} have other bytes the second time, expected none: {', '.join(unequal[:3])}"
        return Line("determinism", name, Outcome.FAIL, says)
    return Line("determinism", name, Outcome.PASS, f"{count} of {count} have the same bytes twice")


# --- memory ---------------------------------------------------------------------------------------


def memory(setup: Setup) -> Iterator[Line]:
    """The peak of memory in a run of transformers on the device."""
    for case in DATA["memory"]["cases"]:
        started = time.monotonic()
        subject = prepare(CASES[case], cache_root())
        truth = Oracle(subject, cache_root(), setup.device).truth()
        weights = weight_bytes(subject.model_dir, 4)
        captures = sum(4 * tensor.value.size for tensor in truth.tensors.values())

        def work(case: str = case) -> None:
            with TorchSource(setup.device) as source:
                _trace(case, source)

        work()  # what is imported and initialised once
        # What the CPU's allocator kept from before does not show in its peak.
        least = weights if setup.kind == "cuda" else 0
        line = peaked(
            case, _peak(setup.device, work), least, 2 * (weights + captures) + DATA["memory"][setup.kind] * MIB
        )
        yield replace(line, seconds=time.monotonic() - started)


def _peak(device: str, work: Callable[[], None]) -> int:
    """How many bytes more than before were held at once: allocated by torch on CUDA, resident on the CPU."""
    gc.collect()
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        before = _resident("VmRSS")
        work()
        return _resident("VmHWM") - before
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def peaked(name: str, peak: int, least: int, most: int) -> Line:
    """The line of a peak; less than the weights means that the run was not on the device."""
    right = least <= peak <= most
    says = f"peak {peak / MIB:.1f} MiB, expected {least / MIB:.1f} to {most / MIB:.1f} MiB"
    return Line("memory", name, Outcome.PASS if right else Outcome.FAIL, says)


STEPS: dict[str, Callable[[Setup], Iterator[Line]]] = {
    "tests": tests,
    "rounding": rounding,
    "candle-mi": candle_mi,
    "determinism": determinism,
    "memory": memory,
}


def do_step(step: str, setup: Setup) -> None:
    """Append the lines of a step to its file as they come, so that a process that is killed leaves those it had."""
    with (setup.out / f"{step}.jsonl").open("w", encoding="utf-8") as file:
        for line in lines_of(step, setup):
            file.write(json.dumps(asdict(line)) + "\n")
            file.flush()


def lines_of(step: str, setup: Setup) -> Iterator[Line]:
    """The lines of a step, and one more where it broke off."""
    try:
        yield from STEPS[step](setup)
    except ModuleNotFoundError as error:
        yield Line(step, "broke off", Outcome.NOT_RUN, f"package {error.name} is not installed on this machine")
    except (ParityError, RuntimeError, OSError, ValueError) as error:
        yield Line(step, "broke off", Outcome.FAIL, one_line(f"{type(error).__name__}: {error}"))


def with_torchs_libraries() -> None:
    """Let the emitter's process find libcublas and the like, which torch's own wheels have."""
    found = sorted(Path(torch.__file__).parents[1].glob("nvidia/*/lib"))
    inherited = filter(None, [os.environ.get("LD_LIBRARY_PATH")])
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([*map(str, found), *inherited])


def main(step: str, device: str, emitter: str, out: str) -> None:
    with_torchs_libraries()
    do_step(step, Setup(device, emitter, Path(out)))


if __name__ == "__main__":
    main(*sys.argv[1:])
