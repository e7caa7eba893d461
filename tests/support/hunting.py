"""Candidates with a fault, imagined judgements, and hunts that stay in this process."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.compare.hunt_result import HuntResult
from candle_mi_parity.hunt import worker
from candle_mi_parity.hunt.bench import Answer, Bench, Found
from candle_mi_parity.hunt.genes import Genes
from candle_mi_parity.hunt.grammar import Grammar
from candle_mi_parity.hunt.hunt import Hunt, Limits
from candle_mi_parity.hunt.worker import Worker
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.spec.explanations import NOTHING_KNOWN
from candle_mi_parity.spec.families import MAPPED, RECURRENT
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.trace.trace import InMemory
from candle_mi_parity.trace.truth import Truth

KEYS = {family: {"rms_norm_eps", "hidden_act", "rope_theta", "sliding_window"} for family in MAPPED}
KEYS |= {family: {"head_size_divisor", "hidden_size", "layer_norm_epsilon", "norm_eps"} for family in RECURRENT}
Fault = Callable[[PreparedCase, dict[str, np.ndarray]], None]


class Faulty(TorchSource):
    """The control with a fault."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self._fault = fault

    def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> InMemory:
        made = super().trace(subject, mode, truth, inputs)
        arrays = {name: array.copy() for name, (array, _) in made.arrays.items()}
        self._fault(subject, arrays)
        return InMemory(
            {name: (array, None) for name, array in arrays.items()}, made.dtype, made.scalars, made.top_features
        )


def bench(directory: Path, fault: Fault = lambda subject, arrays: None) -> Bench:
    return Bench(Faulty(fault), NOTHING_KNOWN, directory / "scratch")


class Here(Executor):
    """Does the work at once, in this process."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(work(*arguments, **named))
        except BrokenProcessPool as error:
            done.set_exception(error)
        return done


class Imagined(Bench):
    """Judges by the genes alone."""

    def __init__(self, directory: Path, answer: Callable[[str, Genes], Answer]) -> None:
        super().__init__(TorchSource(), NOTHING_KNOWN, directory / "scratch")
        self._imagined = answer

    def judge(self, family: str, genes: Genes, found: Sequence[Found] = ()) -> Answer:
        return self._imagined(family, genes)

    def numbers(self, family: str, genes: Genes) -> str:
        answer = self._imagined(family, genes)
        return answer.digest or answer.key


Answering = Callable[[str, Genes], Answer]


def digest_of(*slots: str) -> Answering:
    """Agrees; the numbers depend on some slots only."""
    return lambda family, genes: Answer("agree", digest=str([genes.get(slot) for slot in slots]))


def new_where(slot: str, value: list[Any]) -> Answering:
    def answer(family: str, genes: Genes) -> Answer:
        meets = genes.get(slot) == value
        return Answer("new", "", "logits", "values", digest="x") if meets else Answer("agree", digest=str(genes))

    return answer


def hunted(
    monkeypatch: pytest.MonkeyPatch, directory: Path, answer: Answering, inputs: int, result: HuntResult
) -> HuntResult:
    """A hunt in this process."""
    own = Worker(Imagined(directory, answer), NOTHING_KNOWN, directory, directory)
    monkeypatch.setattr(worker, "_worker", own)
    monkeypatch.setattr(worker, "_keys", lambda one: ("rope_theta", "use_cache") if one.family == "llama" else ())
    grammar = Grammar(result.families, {family: set(KEYS[family]) for family in result.families})
    limits = Limits(inputs=inputs, search=0.0)
    return Hunt(
        result, grammar, NOTHING_KNOWN, directory, limits, lambda found: None, start=lambda hunt: Here()
    ).run()


RELU = ["set", "relu"]
