"""What a comparison can say, from one tensor to a whole run; every report is a view of these."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from candle_mi_parity.compare.suspects import suspect
from candle_mi_parity.spec.cases import Download


class Status(StrEnum):
    """Of a tensor or a case. UNMEASURED is neither a pass nor a divergence; KNOWN is a divergence that is
    explained."""

    PASS = "PASS"
    KNOWN = "KNOWN"
    FAIL = "FAIL"
    UNMEASURED = "UNMEASURED"
    ERROR = "ERROR"


class Failure(StrEnum):
    """Why a case has no numbers.

    The first three are refusals of candle-mi; the next six are an emitter that did not answer as agreed.
    """

    MODEL = "model"
    SAE = "sae"
    FORWARD = "forward"
    PANIC = "panic"
    CRASH = "crash"
    TIMEOUT = "timeout"
    PROTOCOL = "protocol"
    IO = "io"
    REQUEST = "request"
    ABSENT = "absent"
    """Nothing is stored for the case."""
    INPUT = "input"
    """The model, the SAE or the prompt cannot be had or has no truth."""
    INTERNAL = "internal"
    """A fault of this suite."""

    @property
    def refused(self) -> bool:
        return self in (Failure.MODEL, Failure.SAE, Failure.FORWARD)

    @property
    def crashed(self) -> bool:
        return self in (
            *(Failure.PANIC, Failure.CRASH, Failure.TIMEOUT),
            *(Failure.PROTOCOL, Failure.IO, Failure.REQUEST),
        )


class Outcome(StrEnum):
    """What a candidate made of a case, from best to worst; what is known does not enter.

    A refusal stands before a wrong number, which nobody notices. ABSENT and ERROR say nothing of the candidate:
    nothing is stored, or the suite could not do its part.
    """

    AGREES = "agrees"
    UNMEASURED = "unmeasured"
    REFUSED = "refused"
    DIVERGES = "diverges"
    CRASHED = "crashed"
    ABSENT = "absent"
    ERROR = "error"

    @property
    def judged(self) -> bool:
        return self not in (Outcome.ABSENT, Outcome.ERROR)

    @property
    def sign(self) -> str:
        return {"agrees": "✓", "refused": "⊘", "diverges": "≠", "crashed": "✗", "error": "!"}.get(self, "?")

    @property
    def colour(self) -> str:
        """The class of its cell on a page."""
        return {Outcome.AGREES: "good", Outcome.DIVERGES: "bad", Outcome.CRASHED: "bad"}.get(self, "warn")

    @property
    def rank(self) -> int:
        """0 is best; only of what was judged."""
        return list(Outcome).index(self)


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
    :ivar past: elements past the gate; of a mask, forbidden entries that are not 0.
    :ivar leaked: sum of the absolute values of such entries.
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
    leaked: float = 0.0
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


@dataclass(frozen=True)
class Explained:
    """Under which counterfactual PyTorch computes the candidate's numbers, or as what a refusal is known.

    :ivar ids: of the explanations that were listed for the release; empty for one that was found by search.
    :ivar says: one sentence for each explanation, or what is changed.
    :ivar change: what is changed, in a few words; empty for a refusal.
    :ivar ratios: of every tensor, scalar and decision, which all pass under it; 8 is the gate.
    :ivar remedy: what a user can do; empty where there is nothing.
    :ivar key: the counterfactual as JSON; empty for a refusal.
    """

    ids: list[str]
    says: str
    change: str = ""
    ratios: dict[str, float] = field(default_factory=dict)
    remedy: str = ""
    key: str = ""

    @property
    def tensors(self) -> int:
        return len(self.ratios)

    @property
    def worst(self) -> float:
        return max(self.ratios.values(), default=0.0)

    @property
    def equal(self) -> str:
        """``equal to PyTorch with sliding_window + 1, all 44 tensors, worst 1.4 of 8``; empty for a refusal."""
        size = f"all {self.tensors} tensors, worst {self.worst:.2g} of 8"
        return f"equal to PyTorch with {self.change}, {size}" if self.change else ""

    def line(self) -> str:
        """``CMI006: …; equal to PyTorch with sliding_window + 1, all 44 tensors, worst 1.4 of 8``."""
        name = f"{', '.join(self.ids)}: " if self.ids else ""
        if not self.change:
            return f"{name}refused: {self.says}"
        said = self.says.rstrip(".") + "; " if self.ids else ""
        return f"{name}{said}{self.equal}"


@dataclass
class CaseResult:
    """One case judged.

    :ivar tensors: of the whole forward, in execution order.
    :ivar teacher_forced: the same with every half-layer fed the truth's residual; only when the case diverged.
    :ivar diagnosis: what the error of the first diverging tensor looks like.
    :ivar sae: flips, MSE and strongest features, per chain.
    :ivar expected: number of tensors that could be compared.
    :ivar in_part: the candidate's trace was stored in part; ``expected`` counts that part.
    :ivar error: why there is nothing to compare, one line; ``failure`` says the same to a program.
    :ivar explained: under which counterfactual the candidate is right; a case is KNOWN when it is a listed one.
    :ivar unexplained: what was tried to explain the divergence, and why it does not.
    :ivar notes: what a reader of the verdict has to know beside it, one sentence each.
    :ivar reproduce: the one command that shows it again.
    :ivar shrink: the command that makes a failing Rust test of it; empty where there is none.
    :ivar downloads: which commits and files of the hub the case was computed from.
    """

    id: str
    family: str
    digest: str
    status: Status
    reproduce: str
    tensors: list[TensorResult] = field(default_factory=list)
    teacher_forced: list[TensorResult] = field(default_factory=list)
    diagnosis: Diagnosis | None = None
    sae: list[SaeView] = field(default_factory=list)
    expected: int = 0
    in_part: bool = False
    error: str = ""
    failure: Failure | None = None
    explained: Explained | None = None
    unexplained: str = ""
    notes: list[str] = field(default_factory=list)
    shrink: str = ""
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
    def note(self) -> str:
        """What is known of the divergence, or what was tried to explain it; empty for nothing."""
        return self.explained.line() if self.explained else self.unexplained

    @property
    def outcome(self) -> Outcome:
        if self.status is Status.PASS:
            return Outcome.AGREES
        if self.status is Status.UNMEASURED:
            # Without a tensor it is a model that the hub did not give.
            return Outcome.UNMEASURED if self.tensors else Outcome.ERROR
        if self.failure is None:
            return Outcome.DIVERGES if self.tensors else Outcome.ERROR
        if self.failure.refused:
            return Outcome.REFUSED
        if self.failure.crashed:
            return Outcome.CRASHED
        return Outcome.ABSENT if self.failure is Failure.ABSENT else Outcome.ERROR

    @property
    def worst(self) -> TensorResult | None:
        return max(self.tensors, key=lambda tensor: tensor.ratio, default=None)

    @property
    def forced_divergences(self) -> list[str]:
        """Tensors only: a next token that flips with its logits is no divergence of its own."""
        return [t.name for t in self.teacher_forced if t.status is Status.FAIL and not t.name.startswith("logits.")]

    def message(self) -> str:
        """The case in full: its error, or each diverging tensor's first and the command that shows it."""
        first = self.first_divergence
        body = self.error or (first.message() if first else "nothing diverges")
        body += f"\n  shape of the error: {self.diagnosis.shape}" if self.diagnosis else ""
        body += f"\n  look at: {parts}" if first and not self.explained and (parts := suspect(first.name)) else ""
        body += f"\n  {self.explained.line()}" if self.explained else ""
        body += f"\n  {self.unexplained}" if self.unexplained else ""
        body += "".join(f"\n  note: {note}" for note in self.notes)
        body += f"\n  reproduce: {self.reproduce}"
        body += f"\n  a failing Rust test of it: {self.shrink}" if self.shrink else ""
        return f"{self.id}: {self.status.value}\n{body}"
