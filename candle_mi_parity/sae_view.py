"""What a reader wants to see of an SAE beside its verdict: flips with margins, MSE, the strongest features."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    :ivar flips: those nearest to mattering first, at most :data:`candle_mi_parity.look_sae.SHOWN`.
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
