"""What was computed instead: a search for the counterfactual under which a diverging candidate is right.

Single changes are tried first, then pairs. A trial costs one float64 pass; the noise is computed only for what fits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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
"""What the search for one case may take."""
LOOSE = 50.0
"""How many times the gate a trial may miss: it is judged with the plain truth's noise, which is not its own."""
PARTNERS = 8
"""How many single changes that come nearer are tried together with every other that moves the first tensor."""
NEARER = 0.9
"""A change comes nearer when it leaves less than this part of the error of the first diverging tensor."""


@dataclass
class Trial:
    """A single change that was tried.

    :ivar distance: relative error that it leaves at the first diverging tensor.
    :ivar moves: whether it moves that tensor at all.
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
        plain = self._distance(self.evidence.oracle.truth())
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
        nearer = [trial for trial in movers if trial.distance < NEARER * plain][:PARTNERS]
        for pair in _pairs(nearer or movers[:PARTNERS], trials):
            if time.monotonic() > self.deadline:
                return None
            found = self._try(pair, "pairs")
            if isinstance(found, Explained):
                return found
        return None

    def _try(self, idea: Hypothesis, kind: str) -> Explained | Trial | None:
        """None where the change has no truth, as one that the weights do not fit."""
        try:
            truth = _with_noise_of(self.evidence.oracle.truth(), self.evidence.oracle.under(idea.change).values())
            decoder = decoder_of(self.evidence.subject, idea.change)
            results = compare(truth, self.evidence.trace, decoder, self.evidence.selection)
        except Exception:  # whatever transformers says to a config that nobody wrote
            return None
        self.tried[kind] += 1
        if not any(_far(result) for result in results):
            found = explained(self.evidence, idea.change, idea.rows)
            if isinstance(found, Explained):
                return found
        distance = self._distance(truth)
        return Trial(idea, distance, distance != self._plain_distance)

    @property
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
        """What was tried, for a divergence that nothing explains."""
        counts = " and ".join(f"{count} {name}" for name, count in self.tried.items())
        late = ", when its time was over" if time.monotonic() > self.deadline else ""
        return f"none of {counts} that were tried explains it{late}"


def search(
    result: CaseResult,
    evidence: Evidence,
    table: Explanations,
    cache: Path,
    first: list[Hypothesis],
    seconds: float,
    only_first: str = "",
) -> Hypothesis | None:
    """Look for the explanation of a diverging case and say in its result what was found or tried.

    :param first: what is tried before anything else, as what has explained another case.
    :param only_first: why nothing else is tried; empty to try everything.
    :returns: what explains it.
    """
    diverging = result.first_divergence
    if diverging is None or diverging.name not in evidence.oracle.truth().tensors:
        return None
    ideas = [*first, *([] if only_first else hypotheses(evidence, table, diverging.name, cache))]
    attempt = Search(evidence, diverging.name, time.monotonic() + seconds)
    found = attempt.run(ideas)
    if found is None:
        result.unexplained = f"{result.unexplained}; {only_first or attempt.summary()}".removeprefix("; ")
        return None
    result.explained = found
    return next((idea for idea in ideas if idea.change.describe() == found.change), None)


def _pairs(some: list[Trial], others: list[Trial]) -> Iterator[Hypothesis]:
    """Every pair of a change that comes nearer and another one, once."""
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
    """Whether a trial's tensor is further away than the wrong noise could make it."""
    return result.status is Status.FAIL and not result.ratio < LOOSE * POSITION_GATE and result.reason != "missing"


def _with_noise_of(plain: Truth, values: Truth) -> Truth:
    """Values that were computed alone, with the noise of the plain truth where it has the tensor."""
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
