"""How far two candidates are apart at one tensor, in units of the truth's rounding noise; 8 and 32 are the gate.

Neither candidate is right here: the difference B − A stands in the place that the error has in a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from candle_mi_parity.alike import common, restricted
from candle_mi_parity.gate import ELEMENT_GATE, POSITION_GATE, UNIT, UNITS, measure
from candle_mi_parity.judge import selected
from candle_mi_parity.trace import Emitted
from candle_mi_parity.truth import Truth
from candle_mi_parity.verdict import TensorResult

TOP_TOKENS = 10


@dataclass(frozen=True)
class Distance:
    """Between A and B.

    :ivar same: equal to the bit, wherever both hold the tensor.
    :ivar position: largest rms(B − A)/noise over positions; gate 8.
    :ivar element: largest \\|B − A\\|/σ over elements; gate 32.
    :ivar decisions: features, tokens or counts that differ.
    """

    same: bool
    position: float = 0.0
    element: float = 0.0
    decisions: int = 0

    @property
    def inside(self) -> bool:
        """Rounding can explain it; written so that NaN is not inside. Decisions are left to the verdicts."""
        return self.same or (self.position < POSITION_GATE and self.element < ELEMENT_GATE)

    @property
    def ratio(self) -> float:
        """As ``TensorResult.ratio``: 8 is the gate."""
        return max(self.position, self.element / 4)


SAME = Distance(True)
ENDLESS = Distance(False, math.inf, math.inf)


def tensor_distance(name: str, truth: Truth, a: Emitted, b: Emitted) -> Distance | None:
    """Of a tensor that both hold in the truth's shape; None where the parts that they keep have nothing in common.

    :raises TraceError: bytes that are not what a trace declares.
    """
    part = common(a.entries[name], b.entries[name])
    if part is not None and (not part.rows or part.columns == []):
        return None
    one, other = (restricted(trace.tensor(name), trace.entries[name], part) for trace in (a, b))
    if one.dtype == other.dtype and np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes():
        return SAME
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return ENDLESS
    one, other = one.astype(np.float64), other.astype(np.float64)
    chain, _, kind = name.partition(".")
    if chain in truth.sae and kind == "features":
        pre = truth.sae[chain].pre
        fire, flips = (one != 0) & (other != 0), int(np.count_nonzero((one != 0) != (other != 0)))
        return _measured(other - one, selected(pre.value, part), selected(pre.noise, part), fire, UNIT, flips)
    expected = truth.tensors[name]
    value, noise, mask = selected(expected.value, part), selected(expected.noise, part), None
    if expected.allowed is not None:
        mask = np.broadcast_to(selected(expected.allowed, part), one.shape)
        if name.endswith("hook_pattern"):
            # Whether a forbidden key is read is a decision. Where both read it, the position's noise is the measure.
            if (((one != 0) != (other != 0)) & ~mask).any():
                return ENDLESS
            read = mask | (one != 0)
            value, mask = np.where(mask, value, one), read
    unit = UNIT if chain in truth.sae else UNITS[a.dtype]
    return _measured(other - one, value, noise, mask, unit)


def _measured(
    error: np.ndarray, value: np.ndarray, noise: np.ndarray, mask: np.ndarray | None, unit: float, decisions: int = 0
) -> Distance:
    found = measure(error, value, noise, mask, unit=unit)
    return Distance(False, float(found.position.max()), float(found.element.max()), decisions)


def figure_distance(name: str, a: Emitted, b: Emitted, one: TensorResult, other: TensorResult) -> Distance | None:
    """Of what is judged beside the tensors: a scalar in units of its σ, or decisions counted.

    :param one: A's result, which carries the scalar's noise.
    """
    if decide := _DECISIONS.get(name):
        decisions = decide(a, b)
        return SAME if not decisions else Distance(False, decisions=decisions)
    if one.worst is None or other.worst is None:
        return None
    size = abs(other.worst.got - one.worst.got)
    return SAME if size == 0 else Distance(False, element=size / one.worst.noise)


def _next_tokens(a: Emitted, b: Emitted) -> int:
    one, other = (trace.tensor("logits").argmax(-1) for trace in (a, b))
    return int(np.count_nonzero(one != other))


def _top_tokens(a: Emitted, b: Emitted) -> int:
    tops = [set(np.argsort(-trace.tensor("logits")[0, -1], kind="stable")[:TOP_TOKENS].tolist()) for trace in (a, b)]
    return len(tops[0] - tops[1])


def _top_features(a: Emitted, b: Emitted) -> int:
    one, other = ({feature.index for feature in trace.top_features} for trace in (a, b))
    return max(len(one - other), len(other - one))


def _active(a: Emitted, b: Emitted) -> int:
    one, other = (trace.scalars.get("sae.n_active_last_pos", math.nan) for trace in (a, b))
    return 0 if one == other else max(1, int(abs(other - one))) if math.isfinite(other - one) else 1


_DECISIONS: dict[str, Callable[[Emitted, Emitted], int]] = {
    "logits.next_token": _next_tokens,
    "logits.top10_last_pos": _top_tokens,
    "sae.top_features_last_pos": _top_features,
    "sae.n_active_last_pos": _active,
}
