"""What a variant computes, as a trace that the gate judges like any candidate's."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.errors import OracleError
from candle_mi_parity.models.checkpoint import read_config
from candle_mi_parity.models.prepared_case import Subject, prepare, random_tokens
from candle_mi_parity.oracle.hooks import forward, load_model
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.oracle.rounding import MatmulScales, NoisePool, RoundingNoise, Truth64
from candle_mi_parity.spec.cases import Case, RandomTokens
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.trace import InMemory
from proof.sums import Reordered
from proof.variants import Setting, Variant

PLAIN = Setting(id="torch as it is", cases=["*"])


class OtherAttention(TorchSource):
    """transformers' own attention code, in which scores and patterns cannot be recorded."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        self._implementation = implementation

    def model(self, directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
        return load_model(directory, dtype, self.device, self._implementation)


def oracle_of(case: Case) -> Oracle:
    """The case's oracle; its truth is in the cache, or computed."""
    return Oracle(prepare(case, cache_root()), cache_root())


def dumps(variant: Variant, oracle: Oracle) -> Iterator[InMemory]:
    """What the variant computes: one trace, or one for each sample of the noise model."""
    setting, subject = variant.setting, oracle.subject
    if setting.samples:
        yield from _samples(oracle, setting.samples)
        return
    source = OtherAttention(setting.attention) if setting.attention else TorchSource()
    with source, _settled(setting):
        emitted = source.trace(_in_batch(subject, setting.batch), "free", oracle.truth(), oracle.inputs("free"))
    yield emitted if setting.batch == 1 else _first_row(emitted)


def plain_digests(oracle: Oracle) -> dict[str, str]:
    """Of torch's float32 as it is, see :func:`digests`."""
    if (known := _PLAIN.get(oracle.subject.digest)) is None:
        known = digests(next(dumps(Variant(PLAIN, oracle.subject.case), oracle)))
        _PLAIN[oracle.subject.digest] = known
    return known


_PLAIN: dict[str, dict[str, str]] = {}


def digests(dump: InMemory) -> dict[str, str]:
    """Name → sha256 of the bytes, by which dumps are told apart."""
    return {
        name: hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        for name, (array, _) in dump.arrays.items()
    }


@contextmanager
def _settled(setting: Setting) -> Iterator[None]:
    """Threads, oneDNN and the order of sums as the setting has them; afterwards as they were."""
    before, mode = torch.get_num_threads(), Reordered(setting.sums) if setting.sums else nullcontext()
    torch.set_num_threads(setting.threads or before)
    try:
        with nullcontext() if setting.onednn else _without_onednn(), mode:
            yield
    finally:
        torch.set_num_threads(before)
    if isinstance(mode, Reordered) and not mode.calls:
        raise OracleError(f"{setting.id}: no operation was computed in another order; the variant varies nothing")


@contextmanager
def _without_onednn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TF32 acceleration")  # said wherever there is no Intel GPU
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def _in_batch(subject: Subject, rows: int) -> Subject:
    if rows == 1:
        return subject
    if len(subject.tokens) > 1:
        raise OracleError(f"{subject.case.id} is a batch already")
    others = RandomTokens(random=len(subject.tokens[0]), seed=1, batch=rows - 1)
    vocabulary = int(str(read_config(subject.model_dir)["vocab_size"]))
    return replace(subject, tokens=[*subject.tokens, *random_tokens(others, vocabulary)])


def _first_row(emitted: InMemory) -> InMemory:
    """Without the SAE, whose scalars are of all rows, and the lens, which is fed one row anyway."""
    arrays = {
        name: (array[:1], None) for name, (array, _) in emitted.arrays.items() if not name.startswith(("sae", "lens"))
    }
    return InMemory(dict(arrays), emitted.dtype, {}, [])


def _samples(oracle: Oracle, count: int) -> Iterator[InMemory]:
    """Samples of the noise model, from another seed than those that made the truth's noise.

    They hold the forward pass alone: no lens, no SAE.
    """
    subject, truth = oracle.subject, oracle.truth()
    tokens, scales = torch.tensor(subject.tokens), MatmulScales()
    with Truth64(scales), torch.no_grad():
        forward(oracle.model, tokens)
    pool = NoisePool(int(subject.digest[16:32], 16))
    done = 0
    while done < count:
        rows = max(1, min(count - done, 160 // tokens.numel()))  # as the oracle batches its own
        with RoundingNoise(pool, scales, oracle.arithmetic), torch.no_grad():
            captured = forward(oracle.model, tokens.repeat(rows, 1)).tensors
        done += rows
        arrays = {name: as_emitted(tensor) for name, tensor in captured.items() if name in truth.tensors}
        for row in range(rows):
            of_row = {name: (array.reshape(rows, -1, *array.shape[1:])[row], None) for name, array in arrays.items()}
            yield InMemory(dict(of_row), "float32", {}, [])


def as_emitted(tensor: torch.Tensor) -> np.ndarray:
    """A float64 sample as a candidate would write it."""
    return tensor.numpy().astype(np.float32)
