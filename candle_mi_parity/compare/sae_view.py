"""What a report says of an SAE: decisions that flipped, the reconstruction error, and the strongest features."""

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
    """Decisions of one chain, ``sae`` (on the candidate's own residual) or ``sae_on_truth``.

    :ivar active_got: features that fire at the compared positions; ``active_expected`` is the number of the truth.
    :ivar flips: those with the largest margin first, at most :data:`candle_mi_parity.compare.diagnose_sae.SHOWN`.
    :ivar flipped: number of all flips.
    :ivar mse_got: the candidate's reconstruction MSE; None if its trace has none.
    :ivar mse_noise: absolute noise of ``mse_expected``.
    :ivar top: features of the last position by rank.
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
