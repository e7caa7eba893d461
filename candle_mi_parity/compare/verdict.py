"""What a comparison can say, from one tensor to a whole run; every report is a view of these."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from candle_mi_parity.spec.cases import Download


class Status(StrEnum):
    """Of a tensor or a case. UNMEASURED is neither a pass nor a divergence."""

    PASS = "PASS"
    KNOWN = "KNOWN"
    FAIL = "FAIL"
    UNMEASURED = "UNMEASURED"
    ERROR = "ERROR"


class Verdict(StrEnum):
    """Of a run, with its exit code."""

    PASS = "PASS"
    FAIL = "FAIL"
    ERROR = "ERROR"
    INCONCLUSIVE = "INCONCLUSIVE"

    @property
    def exit_code(self) -> int:
        return {Verdict.PASS: 0, Verdict.FAIL: 1, Verdict.ERROR: 2, Verdict.INCONCLUSIVE: 3}[self]


@dataclass(frozen=True)
class Worst:
    """The element with the largest ratio, or the first that is not finite.

    :ivar relative: \\|got − expected\\| / \\|expected\\|.
    :ivar ulp: the error in units of float32's spacing at the expected value.
    :ivar noise: σ of the element, absolute.
    :ivar ratio: error over σ.
    """

    index: list[int]
    got: float
    expected: float
    absolute: float
    relative: float
    ulp: float
    noise: float
    ratio: float

    @staticmethod
    def of(index: list[int], got: float, expected: float, noise: float, ratio: float) -> Worst:
        """Absolute, relative and ULP error follow from the two values."""
        size = abs(got - expected)
        if expected == 0:
            endless = math.inf if size else 0.0
            return Worst(index, got, expected, size, endless, endless, noise, ratio)
        ulp = size / float(np.spacing(np.float32(abs(expected))))
        return Worst(index, got, expected, size, size / abs(expected), ulp, noise, ratio)


@dataclass(frozen=True)
class TensorResult:
    """One tensor, or scalar, judged.

    :ivar reason: why it is not a pass: missing, unexpected, shape, dtype, nonfinite, masked, values, noisy.
    :ivar position_ratio: largest rms(error)/noise over positions; gate 8.
    :ivar element_ratio: largest \\|error\\|/σ over elements; gate 32.
    :ivar rms_ratio: rms(error)/rms(noise) over the whole tensor, 0 for an exact one.
    :ivar compared: number of elements compared.
    :ivar left_out: elements that the mask forbids, where the two sides may differ.
    :ivar past: elements past the gate.
    :ivar exact: no rounding separates the two sides; bit equality was asked.
    :ivar inputs_agreed: whether the tensors it is computed from passed; None when it has none.
    """

    name: str
    status: Status
    reason: str = ""
    position_ratio: float = 0.0
    element_ratio: float = 0.0
    rms_ratio: float = 0.0
    compared: int = 0
    left_out: int = 0
    past: int = 0
    exact: bool = False
    inputs_agreed: bool | None = None
    worst: Worst | None = None
    detail: str = ""

    @property
    def ratio(self) -> float:
        """The larger of the two ratios, each in units of its gate × 8, so that 8 is the gate for both."""
        return max(self.position_ratio, self.element_ratio / 4)

    def message(self) -> str:
        """Everything a reader needs to start: ``tensor: [index] got, expected …``."""
        text = f"{self.name}: {self.status.value}"
        text += f" ({self.reason})" if self.reason else ""
        if self.worst is not None:
            w = self.worst
            text += (
                f"\n  {w.index} got {w.got:.9g}, expected {w.expected:.9g}"
                f"\n  absolute {w.absolute:.3g}, relative {w.relative:.3g}, {w.ulp:.3g} ULP,"
                f" noise {w.noise:.3g}, ratio {w.ratio:.3g} (gate 32)"
                f"\n  position ratio {self.position_ratio:.3g} (gate 8),"
                f" {self.past} of {self.compared} past the gate"
            )
            text += f", {self.left_out} masked left out" if self.left_out else ""
            agreed = {True: "\n  inputs agreed", False: "\n  inputs DIFFER: inherited until shown otherwise"}
            text += agreed.get(self.inputs_agreed is True, "") if self.inputs_agreed is not None else ""
        return text + (f"\n  {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class Diagnosis:
    """Of the first diverging tensor of a case.

    :ivar shape: one phrase, as ``one head (3)`` or ``from position 8 on``; ``spread`` when nothing stands out.
    :ivar picture: log₁₀ of the largest error over σ, position × head (or block of features).
    :ivar rows: position of each row of the picture.
    :ivar column: what a column is: ``head`` or ``features``.
    """

    tensor: str
    shape: str
    picture: list[list[float]]
    rows: list[int]
    column: str


@dataclass(frozen=True)
class Flip:
    """A feature that is active on one side only.

    :ivar index: [batch row, position, feature].
    :ivar pre: the truth's pre-activation.
    :ivar margin: ``|pre − θ|``, absolute.
    :ivar over_noise: margin over σ; inside the gate (32) rounding explains the flip.
    """

    index: list[int]
    got: float
    pre: float
    margin: float
    over_noise: float
    excused: bool


@dataclass(frozen=True)
class Ranked:
    """One rank of the last position's features, truth beside candidate; None past the end of a list."""

    expected: tuple[int, float] | None
    got: tuple[int, float] | None


@dataclass(frozen=True)
class SaeView:
    """Of one chain, ``sae`` (on the candidate's own residual) or ``sae_on_truth``.

    :ivar active_got: features that fire at the compared positions; ``active_expected`` is the number of the truth.
    :ivar flips: those nearest to mattering first, at most :data:`candle_mi_parity.compare.look_sae.SHOWN`.
    :ivar flipped: their whole number.
    :ivar mse_got: the candidate's reconstruction MSE; None where its trace has none.
    :ivar mse_noise: absolute, of ``mse_expected``.
    :ivar top: of the last position.
    """

    chain: str
    active_got: int
    active_expected: int
    flipped: int
    flips: list[Flip]
    mse_got: float | None
    mse_expected: float
    mse_noise: float
    top: list[Ranked] = field(default_factory=list)


@dataclass
class CaseResult:
    """One case judged.

    :ivar tensors: of the whole forward, in execution order.
    :ivar forced: the same with every half-layer fed the truth's residual; only when the case diverged.
    :ivar diagnosis: what the error of the first diverging tensor looks like.
    :ivar sae: flips, MSE and strongest features, per chain.
    :ivar expected: number of tensors that could be compared.
    :ivar in_part: the candidate's trace was stored in part; ``expected`` counts that part.
    :ivar error: why there is nothing to compare, one line.
    :ivar known: the ledger's note when the divergence is a known one.
    :ivar reproduce: the one command that shows it again.
    :ivar downloads: which commits and files of the hub the case was computed from.
    """

    id: str
    family: str
    digest: str
    status: Status
    reproduce: str
    tensors: list[TensorResult] = field(default_factory=list)
    forced: list[TensorResult] = field(default_factory=list)
    diagnosis: Diagnosis | None = None
    sae: list[SaeView] = field(default_factory=list)
    expected: int = 0
    in_part: bool = False
    error: str = ""
    known: str = ""
    seconds: float = 0.0
    downloads: tuple[Download, ...] = ()

    @property
    def compared(self) -> int:
        return sum(1 for tensor in self.tensors if tensor.compared)

    @property
    def unmeasured(self) -> int:
        return sum(1 for tensor in self.tensors if tensor.status is Status.UNMEASURED)

    @property
    def first_divergence(self) -> TensorResult | None:
        return next((tensor for tensor in self.tensors if tensor.status is Status.FAIL), None)

    @property
    def worst(self) -> TensorResult | None:
        return max(self.tensors, key=lambda tensor: tensor.ratio, default=None)

    @property
    def forced_divergences(self) -> list[str]:
        """Tensors only: a next token that flips with its logits is no divergence of its own."""
        return [t.name for t in self.forced if t.status is Status.FAIL and not t.name.startswith("logits.")]

    def message(self) -> str:
        """The case in full: its error, or each diverging tensor's first and the command that shows it."""
        first = self.first_divergence
        body = self.error or (first.message() if first else "nothing diverges")
        body += f"\n  shape of the error: {self.diagnosis.shape}" if self.diagnosis else ""
        return f"{self.id}: {self.status.value}\n{body}\n  reproduce: {self.reproduce}"


@dataclass
class RunResult:
    """All cases against one candidate.

    :ivar candidate: as the user spelt it.
    :ivar identity: what the traces say they came from; empty when none was read.
    :ivar skipped: case id → reason and remedy.
    :ivar stale: ledger entries that no longer diverge.
    :ivar fault: what ended the run before its end, one line; what was judged until then is kept.
    """

    candidate: str
    identity: dict[str, str]
    versions: dict[str, str]
    cases: list[CaseResult]
    skipped: dict[str, str]
    stale: list[str]
    strict: bool = False
    fault: str = ""

    def count(self, status: Status) -> int:
        return sum(1 for case in self.cases if case.status is status)

    @property
    def four_counts(self) -> dict[str, int]:
        """Cases by what a reader asks first; an ERROR or a case not run has measured nothing."""
        unmeasured = self.count(Status.UNMEASURED) + self.count(Status.ERROR) + len(self.skipped)
        return {
            "compared": sum(1 for case in self.cases if case.compared),
            "diverging": self.count(Status.FAIL),
            "known": self.count(Status.KNOWN),
            "unmeasured": unmeasured,
        }

    @property
    def verdict(self) -> Verdict:
        """FAIL before ERROR before INCONCLUSIVE before PASS; a run that broke off is an ERROR whatever it saw."""
        if self.fault:
            return Verdict.ERROR
        if self.count(Status.FAIL) or self.stale or (self.strict and self.count(Status.KNOWN)):
            return Verdict.FAIL
        if self.count(Status.ERROR):
            return Verdict.ERROR
        nothing = not any(case.compared for case in self.cases)
        short = any(case.compared < case.expected for case in self.cases)
        if nothing or short or self.count(Status.UNMEASURED):
            return Verdict.INCONCLUSIVE
        return Verdict.PASS

    def line(self) -> str:
        """The verdict in one line, all counts in it."""
        known = [case for case in self.cases if case.status is Status.KNOWN]
        families = ", ".join(sorted({case.family for case in known}))
        text = self.verdict.value
        text += f" ({self.fault})" if self.fault else ""
        if known and self.verdict is Verdict.PASS:
            text += f" except {len(known)} known divergence{'s' * (len(known) > 1)} ({families})"
        tensors = sum(case.compared for case in self.cases)
        counts = ", ".join(f"{self.count(status)} {status.value}" for status in Status if self.count(status))
        text += f": {len(self.cases)} cases ({counts or 'none'}), {tensors} tensors compared"
        unmeasured = sum(case.unmeasured for case in self.cases)
        text += f", {unmeasured} too noisy to judge" if unmeasured else ""
        text += f", {len(self.skipped)} cases not run" if self.skipped else ""
        return text + (f", {len(self.stale)} stale ledger entries" if self.stale else "")
