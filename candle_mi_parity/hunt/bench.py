"""One input of a hunt judged: model in memory, truth in memory, trace from the candidate's process."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.candidate.sources import Source
from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.compare.suspects import in_any_layer
from candle_mi_parity.compare.verdict import CaseResult, Explained, Status, TensorResult
from candle_mi_parity.errors import CaseTableError, ExplanationError, ParityError, TraceError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.hunt.genes import Genes, case_of
from candle_mi_parity.judge.case import Judged, Progress, failure_of, judge_mode, status_of
from candle_mi_parity.judge.known import Evidence, explained, known_divergence, known_refusal
from candle_mi_parity.judge.notes import unexercised
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.models.generate import model_key, tensor_values, tiny_config, write_config
from candle_mi_parity.models.prepared_case import PreparedCase, prepare, stated_sizes
from candle_mi_parity.models.unusual import varied, write_unusual
from candle_mi_parity.oracle.built import Shapes, built_model
from candle_mi_parity.oracle.compute import round_weights
from candle_mi_parity.oracle.hooks import require_weights
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.oracle.torch_state import TORCH
from candle_mi_parity.spec.cases import Case, TinyModel
from candle_mi_parity.spec.counterfactual import Counterfactual
from candle_mi_parity.spec.explanations import Explanations, combined
from candle_mi_parity.spec.families import family_of
from candle_mi_parity.spec.hook_points import place
from candle_mi_parity.trace.trace import Emitted
from candle_mi_parity.trace.truth import Truth

AnswerKind = Literal["agree", "known", "new", "refused", "no-truth", "unmeasured", "broken", "fault"]
"""``broken``: the candidate panicked, crashed or hung. ``fault``: an exception in this suite."""
SECONDS = 20.0
"""Time limit for one answer of the candidate."""


@dataclass(frozen=True)
class Answer:
    """What became of an input.

    :ivar key: ids of explanations, a message without its numbers, or empty.
    :ivar first: the first tensor that nothing known explains, of a divergence.
    :ivar position: largest ratio of a position's error, of which the gate passes 8; ``element`` of an entry's, of 32.
    :ivar digest: of both sides' logits; empty without them.
    """

    kind: AnswerKind
    key: str = ""
    first: str = ""
    reason: str = ""
    detail: str = ""
    position: float = 0.0
    element: float = 0.0
    digest: str = ""

    @property
    def signature(self) -> tuple[str, str, str]:
        """Two divergences with one signature may have one cause."""
        return self.kind, in_any_layer(self.first), self.reason


@dataclass(frozen=True)
class Found:
    """Another divergence of this hunt: the cause's number, the counterfactual that explains it, where it begins."""

    number: int
    change: Counterfactual
    point: str


class Bench:
    """Judges inputs of one candidate.

    :param table: what is known of it.
    :param scratch: a directory for the model of one input at a time.
    """

    def __init__(self, source: Source, table: Explanations, scratch: Path) -> None:
        self.source, self._table, self.scratch = source, table, scratch
        scratch.mkdir(parents=True, exist_ok=True)
        identity = source.identity
        self._release = table.baseline(identity.version) if identity is not None else ""

    def judge(self, family: str, genes: Genes, found: Sequence[Found] = ()) -> Answer:
        """Judge one input; never raises."""
        with self.cleared():
            return self._answer(family, genes, found)

    def numbers(self, family: str, genes: Genes) -> str:
        """A digest of both sides' logits without a judgement, or the message of a refusal; never raises."""
        with self.cleared():
            try:
                with TORCH:
                    oracle = self.oracle(case_of(family, genes))
                    truth = oracle.without_noise()
                inputs = oracle.inputs("free")
                return _digest(truth, self.source.trace(oracle.subject, "free", truth, inputs))
            except Exception as error:
                return message(error)

    def _answer(self, family: str, genes: Genes, found: Sequence[Found]) -> Answer:
        try:
            case = case_of(family, genes)
        except CaseTableError as error:
            return Answer("fault", detail=message(error))
        try:
            with TORCH:
                oracle = self.oracle(case)
        except ParityError as error:
            return Answer("no-truth", message(error))
        except Exception as error:
            return Answer("fault", detail=f"{type(error).__name__}: {one_line(str(error), 300)}")
        try:
            return self._judged(oracle, found)
        except EmitterError as error:
            return self._refusal(error, oracle.subject)
        except TraceError as error:  # what the candidate wrote is no answer to this input
            return Answer("broken", "", "trace", "trace", one_line(str(error), 300))
        except ParityError as error:
            return Answer("no-truth", message(error))
        except Exception as error:
            return Answer("fault", detail=f"{type(error).__name__}: {one_line(str(error), 300)}")

    @contextmanager
    def cleared(self) -> Iterator[None]:
        """Remove an input's files afterwards, and forget its model."""
        try:
            yield
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir(parents=True, exist_ok=True)
            if isinstance(self.source, TorchSource):
                self.source.forget()

    def oracle(self, case: Case) -> Oracle:
        """The oracle of an input, whose model is built in memory where its files are plain.

        :raises ParityError: there is no such model.
        """
        model, dtype = case.model, getattr(torch, case.dtype)
        assert isinstance(model, TinyModel)
        plain = not model.layout and model.shards == 1
        built = self._build(model, dtype) if plain else None
        subject = prepare(case, self.scratch, built.config if built is not None else None)
        oracle = Oracle(subject, self.scratch, self.source.device, filed=False)
        if built is not None:
            oracle.load = partial(_with_weights_of, built)
            round_weights(built, dtype)
            oracle.computation.model = built
        return oracle

    def _build(self, model: TinyModel, dtype: torch.dtype) -> nn.Module:
        """The model in float64, its files in the scratch directory, and for the control the model in ``dtype``."""
        config = tiny_config(model)
        offset = family_of(str(config["model_type"])).norm_offset
        key = model_key(config, model.dialect, model.shards, model.seed, model.weights, model.layout)
        directory = self.scratch / "models" / key
        directory.mkdir(parents=True)
        try:
            write_config(config, model.dialect, directory)

            def weights(shapes: Shapes) -> Mapping[str, np.ndarray]:
                stated_sizes(read_config(directory), directory)  # transformers' own are those of a large model
                plain = {name: _values(name, shape, offset) for name, shape in shapes.items()}
                return varied(plain, offset, model.weights) if model.weights else plain

            built = built_model(directory, weights)
            arrays = {name: parameter.detach().numpy() for name, parameter in built.named_parameters()}
            write_unusual({name: array.astype(np.float32) for name, array in arrays.items()}, (), 1, directory)
            if isinstance(self.source, TorchSource):
                self.source.models[directory, dtype] = built_model(directory, weights, dtype)
        except BaseException:
            shutil.rmtree(directory)  # half a model must not be taken for one
            raise
        return built

    def _judged(self, oracle: Oracle, found: Sequence[Found]) -> Answer:
        judged = judge_mode(oracle, self.source, "free", Progress())
        digest = _digest(oracle.truth(), judged.evidence.trace)
        tensors = judged.tensors
        position = max((tensor.position_ratio for tensor in tensors if tensor.status is Status.PASS), default=0.0)
        element = max((tensor.element_ratio for tensor in tensors if tensor.status is Status.PASS), default=0.0)
        first = next((tensor for tensor in tensors if tensor.status is Status.FAIL), None)
        if first is None:
            status, _ = status_of(tensors, oracle.subject.case, in_part=False)
            judged_whole = status is Status.PASS and not unexercised(oracle.truth())
            kind: AnswerKind = "agree" if judged_whole else "unmeasured"
            return Answer(kind, position=position, element=element, digest=digest)
        return replace(self._divergence(judged, first, found), digest=digest)

    def _divergence(self, judged: Judged, first: TensorResult, found: Sequence[Found]) -> Answer:
        """Whether a divergence is known, as another of this hunt is, or new."""
        identity = self.source.identity
        evidence = replace(judged.evidence, release=self._release)
        name = first.name
        if identity is not None:
            try:
                known = known_divergence(evidence, self._table, identity, smallest=False)
            except ExplanationError as error:
                return Answer("new", first=name, reason="overlap", detail=str(error))
            if isinstance(known, Explained):
                whole = len(known.ratios) == len({tensor.name for tensor in judged.tensors})
                return Answer("known" if whole else "unmeasured", " ".join(known.ids))
            name = known.first or name
            here = [one for one in found if one.point == in_any_layer(name)]
            if (cause := self._as_found(evidence, here)) is not None:
                return Answer("new", str(cause), name, first.reason, "as another")
        where = place(first.name, first.worst.index) if first.worst else ""
        detail = first.detail or f"{first.ratio:.3g} of 8 {where}".strip()
        return Answer("new", "", name, first.reason, detail, first.position_ratio, first.element_ratio)

    def _as_found(self, evidence: Evidence, found: Sequence[Found]) -> int | None:
        """The number of another divergence of this hunt that explains this one, with what is known or without."""
        rows = [row for row in self._table.applicable(evidence.facts, self._release) if row.change is not None]
        for one in found:
            for size in range(len(rows), -1, -1):
                for part in map(list, combinations(rows, size)):
                    try:
                        change = combined(part).with_also(one.change)
                    except ExplanationError:
                        continue
                    if isinstance(explained(evidence, change, part), Explained):
                        return one.number
        return None

    def _refusal(self, error: EmitterError, subject: PreparedCase) -> Answer:
        failure = failure_of(error)
        if not failure.refused:
            reason = f"{failure.value}: {message(error)}"
            return Answer("broken", "", failure.value, reason, one_line(error.message, 300))
        known, _ = known_refusal(error, subject, self._table, self._release)
        if known is not None:
            return Answer("known", " ".join(known.ids))
        return Answer("refused", message(error))

    def evidence(self, family: str, genes: Genes) -> tuple[CaseResult, Evidence]:
        """The result and the evidence of an input that diverges, for a search. Its files are not removed.

        :raises ParityError: it cannot be judged.
        """
        with TORCH:
            oracle = self.oracle(case_of(family, genes))
        judged = judge_mode(oracle, self.source, "free", Progress())
        result = CaseResult(oracle.subject.case.id, family, oracle.subject.digest, Status.FAIL, "")
        result.tensors = judged.tensors
        return result, replace(judged.evidence, release=self._release)


def _with_weights_of(built: nn.Module, directory: Path) -> nn.Module:
    """The model of a directory with another config and the weights of a model.

    :raises ModelError: it has other weights.
    """
    held = {name: parameter.detach().numpy() for name, parameter in built.named_parameters()}

    def weights(shapes: Shapes) -> Mapping[str, np.ndarray]:
        require_weights(directory, shapes.keys() - held.keys(), {})
        other = {name: (held[name].shape, shape) for name, shape in shapes.items() if held[name].shape != shape}
        require_weights(directory, (), other)
        return held

    return built_model(directory, weights)


@lru_cache(maxsize=4096)
def _values(name: str, shape: tuple[int, ...], offset: int) -> np.ndarray:
    return tensor_values(name, shape, offset)


def message(error: Exception) -> str:
    """An error's message without numbers and paths, by which inputs are counted."""
    text = re.sub(r"(/[\w.+@-]+)+(/config\.json)?", "…", one_line(str(error), 400))
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "N", text)[:200]


def _digest(truth: Truth, trace: Emitted) -> str:
    """Of both sides' last tensors: the reconstruction of an SAE, or the logits."""
    names = [name for name in ("logits", "sae.recon") if name in truth.tensors]
    digest = hashlib.sha256()
    for name in names:
        digest.update(truth.tensors[name].value.tobytes())
        digest.update(np.ascontiguousarray(trace.tensor(name)).tobytes() if name in trace.entries else b"absent")
    return digest.hexdigest()[:16]
