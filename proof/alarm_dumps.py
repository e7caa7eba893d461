"""A dump of a variant, judged: its largest ratios, and its alarms."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from multiprocessing import get_context

import torch

from candle_mi_parity.compare.compare import compare
from candle_mi_parity.compare.verdict import Status, TensorResult
from candle_mi_parity.models.sae import load_sae
from proof.capture import digests, dumps, oracle_of, plain_digests
from proof.variants import Variant


@dataclass(frozen=True)
class Judged:
    """One dump.

    :ivar sample: of the noise model, not of float32.
    :ivar moved: tensors that differ from plain torch's by at least a bit.
    :ivar unseen: tensors of the truth that the variant cannot record.
    :ivar unmeasured: tensors too noisy to judge.
    :ivar position: largest position ratio over all tensors, gate 8; ``position_at`` is its tensor.
    :ivar element: largest element ratio, gate 32.
    :ivar alarms: what is past the gate, or otherwise failed, in full.
    """

    setting: str
    case: str
    sample: bool
    digest: str
    tensors: int
    moved: int
    unseen: int
    unmeasured: int
    position: float
    position_at: str
    element: float
    element_at: str
    alarms: list[str]


@dataclass(frozen=True)
class NotRun:
    """A variant that this machine cannot compute."""

    setting: str
    case: str
    reason: str


def judge_all(variants: Iterable[Variant]) -> Iterator[Judged | NotRun]:
    """All dumps of all variants; those with an environment of their own in a process that starts in it."""
    for environment, group in groupby(variants, key=lambda variant: variant.setting.environment):
        # Truths and plain torch come from here, not from under the environment of a variant.
        pairs = [(variant, _base(variant)) for variant in group]
        with _environment(environment):
            if not environment:
                for variant, base in pairs:
                    yield from judge_variant(variant, base)
                continue
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                for found in pool.map(judge_variant, *zip(*pairs, strict=True)):
                    yield from found


def _base(variant: Variant) -> dict[str, str]:
    """Digests of plain torch's tensors; of a variant that is plain torch none are needed."""
    oracle = oracle_of(variant.case)
    oracle.truth()
    return {} if variant.setting.is_plain else plain_digests(oracle)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def judge_variant(variant: Variant, base: dict[str, str]) -> list[Judged | NotRun]:
    """Each dump of a variant, computed in this process.

    :param base: name → digest of plain torch's tensors; empty for plain torch itself.
    """
    wanted, found = variant.setting.cpu_capability, torch.backends.cpu.get_cpu_capability()
    if wanted is not None and wanted != found:
        return [NotRun(variant.setting.id, variant.case.id, f"torch runs on {found} here, not on {wanted}")]
    oracle = oracle_of(variant.case)
    truth, subject = oracle.truth(), oracle.subject
    decoder = load_sae(subject.sae_file).decoder if subject.sae_file else None
    judged: list[Judged | NotRun] = []
    for dump in dumps(variant, oracle):
        seen = None if variant.setting.sees_all else set(dump.arrays)
        results = compare(truth, dump, decoder, seen)
        judged.append(_judged(variant, digests(dump), base, results, len(truth.tensors)))
    return judged


def _judged(
    variant: Variant, found: dict[str, str], base: dict[str, str], results: list[TensorResult], expected: int
) -> Judged:
    measured = [result for result in results if result.compared]
    position = max(measured, key=lambda result: result.position_ratio)
    element = max(measured, key=lambda result: result.element_ratio)
    return Judged(
        setting=variant.setting.id,
        case=variant.case.id,
        sample=variant.setting.samples > 0,
        digest=hashlib.sha256("".join(found.values()).encode()).hexdigest(),
        tensors=len(found),
        moved=sum(digest != base[name] for name, digest in found.items()) if base else 0,
        unseen=expected - len(found),
        unmeasured=sum(result.status is Status.UNMEASURED for result in results),
        position=position.position_ratio,
        position_at=position.name,
        element=element.element_ratio,
        element_at=element.name,
        alarms=[result.message() for result in results if result.status is Status.FAIL],
    )
