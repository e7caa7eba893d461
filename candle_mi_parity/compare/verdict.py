"""Results of a comparison, of one tensor and of a whole case; every report is a view of these."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from candle_mi_parity.compare.sae_view import SaeView
from candle_mi_parity.compare.suspects import suspect
from candle_mi_parity.spec.cases import Download
from candle_mi_parity.spec.hook_points import place

TOKENS = "tokens"
"""Name of the result on the token ids of a text, which come before every tensor."""
TOO_NOISY = "tensors are too noisy in"
"""Part of the ``error`` of a case that is UNMEASURED because of noise."""


class Status(StrEnum):
    """Status of a tensor or case. UNMEASURED is neither a pass nor a divergence; KNOWN is an explained divergence."""

    PASS = "PASS"
    KNOWN = "KNOWN"
    FAIL = "FAIL"
    UNMEASURED = "UNMEASURED"
    ERROR = "ERROR"


class Failure(StrEnum):
    """Why a case has no numbers.

    The first three are refusals by candle-mi; the next six are failures of the emitter.
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
    NOT_BUILT = "not-built"
    """The emitter's part that it needs does not compile against this candle-mi."""
    ABSENT = "absent"
    """Nothing is stored for the case, or the candidate does not have the feature that it needs."""
    INPUT = "input"
    """The model, the SAE or the prompt is not available or has no truth."""
    INTERNAL = "internal"
    """A bug of this suite."""

    @property
    def refused(self) -> bool:
        return self in (Failure.MODEL, Failure.SAE, Failure.FORWARD)

    @property
    def crashed(self) -> bool:
        return self in ("panic", "crash", "timeout", "protocol", "io", "request")


class Outcome(StrEnum):
    """What a candidate made of a case, from best to worst, whether it is known or not.

    A refusal is better than a wrong number, which nobody notices. ABSENT (nothing is stored, or the candidate does
    not have the feature) and ERROR (the suite failed) say nothing about the candidate.
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
        """0 is best; defined for judged outcomes."""
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

    :ivar reason: why it does not pass: missing, unexpected, shape, dtype, nonfinite, masked, values, noisy, …
    :ivar position_ratio: largest rms(error)/noise over positions; gate 8.
    :ivar element_ratio: largest \\|error\\|/σ over elements; gate 32.
    :ivar rms_ratio: rms(error)/rms(noise) over the whole tensor, 0 for an exact one.
    :ivar compared: number of elements compared.
    :ivar left_out: masked elements, which are not compared.
    :ivar past: elements past the gate; of a leaking mask, masked entries that are not 0.
    :ivar leaked: sum of the absolute values of such entries.
    :ivar exact: the tensor must be bitwise equal.
    :ivar inputs_agreed: whether the tensors it is computed from passed; None if it has none.
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

    @property
    def place(self) -> str:
        """Where the worst element is: ``batch 0, head 1, query 17, key 4``."""
        return place(self.name, self.worst.index) if self.worst else ""

    def message(self) -> str:
        """Everything that a reader needs to start: ``tensor: place got, expected …``."""
        text = f"{self.name}: {self.status.value}"
        text += f" ({self.reason})" if self.reason else ""
        if self.worst is not None:
            w = self.worst
            text += (
                f"\n  {self.place} got {w.got:.9g}, expected {w.expected:.9g}"
                f"\n  absolute {w.absolute:.3g}, relative {w.relative:.3g}, {w.ulp:.3g} ULP,"
                f" noise {w.noise:.3g}, ratio {w.ratio:.3g} (gate 32)"
                f"\n  position ratio {self.position_ratio:.3g} (gate 8),"
                f" {self.past} of {self.compared} past the gate"
            )
            text += f", {self.left_out} masked left out" if self.left_out else ""
            if self.inputs_agreed is not None:
                differ = "inputs DIFFER: inherited until shown otherwise"
                text += f"\n  {'inputs agreed' if self.inputs_agreed else differ}"
        return text + (f"\n  {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class Diagnosis:
    """The error of the first diverging tensor of a case.

    :ivar shape: one phrase, such as ``one head (3)`` or ``from position 8 on``; ``spread`` if nothing stands out.
    :ivar picture: log₁₀ of the largest error over σ, position × head (or block of features).
    :ivar rows: position of each row of the picture.
    :ivar column: ``head`` or ``features``.
    """

    tensor: str
    shape: str
    picture: list[list[float]]
    rows: list[int]
    column: str


@dataclass(frozen=True)
class Explained:
    """The counterfactual under which PyTorch computes the candidate's numbers, or the known cause of a refusal.

    :ivar ids: of the explanations that are listed for the release; empty for one that was found by search.
    :ivar says: one sentence for each explanation, or the change.
    :ivar change: the counterfactual change in a few words; empty for a refusal.
    :ivar ratios: of every tensor, scalar and decision; they all pass, gate 8.
    :ivar remedy: what a user can do; empty if there is nothing.
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
        sentence = self.says.rstrip(".") + "; " if self.ids else ""
        return f"{name}{sentence}{self.equal}"


@dataclass
class CaseResult:
    """One case judged.

    :ivar tensors: results of the whole forward pass, in execution order.
    :ivar teacher_forced: results with every half-layer fed the truth's residual; only if the case diverged.
    :ivar diagnosis: the error of the first diverging tensor.
    :ivar sae: flips, MSE and strongest features of each chain.
    :ivar expected: number of tensors that could be compared.
    :ivar in_part: the candidate's trace is stored in part; ``expected`` counts that part.
    :ivar error: why there is nothing to compare, one line; ``failure`` is the same for a program.
    :ivar explained: the counterfactual under which the candidate is right; if it is a listed one, the case is KNOWN.
    :ivar unexplained: which explanations were tried without success.
    :ivar beyond_known: the first tensor that differs from the known explanation too; empty where there is none.
    :ivar edited: the edits that stand before the first diverging tensor.
    :ivar notes: remarks on the verdict, one sentence each.
    :ivar reproduce: the command that repeats the case.
    :ivar shrink: the command that makes a failing Rust test of it; empty if there is none.
    :ivar downloads: commits and files of the hub that the case was computed from.
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
    beyond_known: str = ""
    edited: list[str] = field(default_factory=list)
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
    def is_noisy(self) -> bool:
        """Whether noise is the reason that the case is UNMEASURED; a case of an unmapped family has no ``error``."""
        return self.status is Status.UNMEASURED and bool(self.tensors) and (not self.error or TOO_NOISY in self.error)

    @property
    def first_divergence(self) -> TensorResult | None:
        return next((tensor for tensor in self.tensors if tensor.status is Status.FAIL), None)

    @property
    def new_at(self) -> str:
        """The first tensor at which something new is wrong; empty for a case without one."""
        first = self.first_divergence
        return self.beyond_known or (first.name if first else "")

    @property
    def note(self) -> str:
        """The explanation of the divergence, or what was tried to explain it; may be empty."""
        return self.explained.line() if self.explained else self.unexplained

    @property
    def outcome(self) -> Outcome:
        if self.status is Status.PASS:
            return Outcome.AGREES
        if self.status is Status.UNMEASURED and self.failure is not Failure.ABSENT:
            # Without tensors, the hub did not provide the model.
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
        """Names of diverging tensors; next tokens are left out, because they flip with their logits."""
        return [t.name for t in self.teacher_forced if t.status is Status.FAIL and not t.name.startswith("logits.")]

    def message(self) -> str:
        """The case in full: its error or first divergence, and the command that repeats it."""
        first = self.first_divergence
        parts = [
            self.error or (first.message() if first else "nothing diverges"),
            f"shape of the error: {self.diagnosis.shape}" if self.diagnosis else "",
            f"new, beside what is known: first at {self.beyond_known}" if self.beyond_known else "",
            f"edited before it: {', '.join(self.edited)}" if self.edited else "",
            f"look at: {where}" if not self.explained and (where := suspect(self.new_at)) else "",
            self.explained.line() if self.explained else "",
            self.unexplained,
            *(f"note: {note}" for note in self.notes),
            f"reproduce: {self.reproduce}",
            f"a failing Rust test of it: {self.shrink}" if self.shrink else "",
        ]
        return f"{self.id}: {self.status.value}\n" + "\n  ".join(filter(None, parts))
