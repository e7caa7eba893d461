"""A search for the counterfactual that explains a diverging candidate: single changes first, then pairs.

A trial costs one float64 pass; the noise is computed only for a counterfactual that fits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from candle_mi_parity.compare.compare import compare
from candle_mi_parity.compare.gate import POSITION_GATE
from candle_mi_parity.compare.tensor_result import selected
from candle_mi_parity.compare.verdict import CaseResult, Explained, Status, TensorResult
from candle_mi_parity.errors import ExplanationError
from candle_mi_parity.judge.hypotheses import Hypothesis, hypotheses
from candle_mi_parity.judge.known import Evidence, decoder_of, explained
from candle_mi_parity.spec.explanations import Explanations
from candle_mi_parity.trace.truth import Truth, TruthTensor

SECONDS = 20.0
"""Time limit of the search for one case."""
LOOSE = 50.0
"""Factor on the gate in a trial, which uses the noise of the plain truth in place of its own."""
PARTNERS = 8
"""Number of single changes that are combined with every other in pairs."""
NEARER = 0.9
"""A change is a candidate for pairs when it leaves less than this part of the error of the first tensor."""
SAME = 1e-9
"""Part of an error that may differ between two processors, of which one rounded the plain truth."""


@dataclass
class Trial:
    """A single change that was tried.

    :ivar distance: relative error of the first diverging tensor under the change.
    :ivar moves: whether the change affects that tensor.
    """

    hypothesis: Hypothesis
    distance: float
    moves: bool


@dataclass
class Search:
    """The search of one case.

    :ivar tried: number of single changes and of pairs that had a truth.
    """

    evidence: Evidence
    first: str
    deadline: float
    tried: dict[str, int] = field(default_factory=lambda: {"single changes": 0, "pairs": 0})

    def run(self, ideas: list[Hypothesis]) -> Explained | None:
        """The first explanation; None where none was found in time."""
        trials: list[Trial] = []
        for idea in ideas:
            if time.monotonic() > self.deadline:
                return None
            found = self._try(idea, "single changes")
            if isinstance(found, Explained):
                return found
            if found is not None:
                trials.append(found)
        movers = [trial for trial in trials if trial.moves]
        movers.sort(key=lambda trial: trial.distance)
        nearer = [trial for trial in movers if trial.distance < NEARER * self._plain_distance][:PARTNERS]
        for pair in _pairs(nearer or movers[:PARTNERS], trials):
            if time.monotonic() > self.deadline:
                return None
            found = self._try(pair, "pairs")
            if isinstance(found, Explained):
                return found
        return None

    def _try(self, idea: Hypothesis, kind: str) -> Explained | Trial | None:
        """None where the change has no truth, for example because the weights do not fit."""
        try:
            truth = _with_noise_of(self.evidence.oracle.truth(), self.evidence.oracle.under(idea.change).values())
            decoder = decoder_of(self.evidence.subject, idea.change)
            results = compare(truth, self.evidence.trace, decoder, self.evidence.selection)
        except Exception:  # transformers may raise anything for a generated config
            return None
        self.tried[kind] += 1
        if not any(_far(result) for result in results):
            found = explained(self.evidence, idea.change, idea.rows)
            if isinstance(found, Explained):
                return found
        distance = self._distance(truth)
        return Trial(idea, distance, not math.isclose(distance, self._plain_distance, rel_tol=SAME))

    @cached_property
    def _plain_distance(self) -> float:
        return self._distance(self.evidence.oracle.truth())

    def _distance(self, truth: Truth) -> float:
        """Relative error of the candidate's first diverging tensor."""
        entry = self.evidence.trace.entries.get(self.first)
        if entry is None or self.first not in truth.tensors:
            return float("inf")
        expected = selected(truth.tensors[self.first].value, entry.part)
        got = self.evidence.trace.tensor(self.first).astype(np.float64)
        if got.shape != expected.shape:
            return float("inf")
        return float(np.linalg.norm(got - expected) / max(float(np.linalg.norm(expected)), 1e-300))

    def summary(self) -> str:
        """What was tried without success."""
        counts = " and ".join(f"{count} {name}" for name, count in self.tried.items())
        late = " before the time limit" if time.monotonic() > self.deadline else ""
        return f"none of {counts} that were tried explains it{late}"


def search(
    result: CaseResult,
    evidence: Evidence,
    table: Explanations,
    cache: Path,
    first: list[Hypothesis],
    seconds: float,
) -> Hypothesis | None:
    """Search for the explanation of a diverging case, and record it, or what was tried, in the result.

    :param first: hypotheses to try first, such as those that explained another case.
    :returns: the explanation, or None.
    """
    diverging = result.first_divergence
    if diverging is None or diverging.name not in evidence.oracle.truth().tensors:
        return None
    # A NaN fails under every change, and a change under which PyTorch has one has no truth.
    if broken := [tensor.name for tensor in result.tensors if tensor.reason == "nonfinite"]:
        no_search = f"{broken[0]} holds NaN or infinities, which no change of a setting explains: none was tried"
        result.unexplained = f"{result.unexplained}; {no_search}".removeprefix("; ")
        return None
    ideas = [*first, *(one for one in hypotheses(evidence, table, diverging.name, cache) if one not in first)]
    attempt = Search(evidence, diverging.name, time.monotonic() + seconds)
    found = attempt.run(ideas)
    if found is None:
        result.unexplained = f"{result.unexplained}; {attempt.summary()}".removeprefix("; ")
        return None
    result.explained = found
    return next((idea for idea in ideas if idea.change.describe() == found.change), None)


def _pairs(some: list[Trial], others: list[Trial]) -> Iterator[Hypothesis]:
    """Every pair of one of ``some`` and another change, once."""
    done: set[str] = set()
    for one in some:
        for other in others:
            try:
                change = one.hypothesis.change.with_also(other.hypothesis.change)
            except ExplanationError:
                continue
            if one is not other and change.key() not in done:
                done.add(change.key())
                yield Hypothesis(change, [*one.hypothesis.rows, *other.hypothesis.rows])


def _far(result: TensorResult) -> bool:
    """Whether a trial's tensor differs by more than the approximate noise can explain."""
    return result.status is Status.FAIL and not result.ratio < LOOSE * POSITION_GATE and result.reason != "missing"


def _with_noise_of(plain: Truth, values: Truth) -> Truth:
    """Values that were computed without noise, with the noise of the plain truth."""
    tensors = {
        name: TruthTensor(tensor.value, plain.tensors[name].noise, tensor.allowed)
        for name, tensor in values.tensors.items()
        if name in plain.tensors and plain.tensors[name].shape == tensor.shape
    }
    sae = {
        name: replace(chain, pre=TruthTensor(chain.pre.value, plain.sae[name].pre.noise))
        for name, chain in values.sae.items()
        if name in plain.sae
    }
    scalars = {name: (value, plain.scalars[name][1]) for name, (value, _) in values.scalars.items()}
    return replace(values, tensors=tensors, sae=sae, scalars=scalars)
