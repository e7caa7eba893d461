"""``python -m validation.false_positives``: honest variants of the arithmetic, none of which may be past the gate.

``variants.toml`` lists them: another order of summation or attention code, long and extreme prompts, fresh samples of
the noise model. Libraries choose their kernels from the environment when they are loaded, so other kernels need
another run, with ``ATEN_CPU_CAPABILITY=default``, ``MKL_CBWR=COMPATIBLE``, ``OMP_NUM_THREADS=1`` or
``OPENBLAS_CORETYPE=Nehalem`` before the command. Exit code 1 when a tensor fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from pydantic import Field, model_validator
from rich.console import Console
from torch import nn

from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.compare.compare import compare
from candle_mi_parity.compare.verdict import Status, TensorResult
from candle_mi_parity.errors import CaseTableError, OracleError
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.models.sae import load_sae
from candle_mi_parity.oracle.hooks import forward, load_model
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.oracle.rounding import MatmulScales, NoisePool, RoundingNoise, Truth64
from candle_mi_parity.spec.cases import Case, RandomTokens, TableRow, load_cases, read_toml, select
from candle_mi_parity.spec.edits import Edit
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.trace import InMemory
from validation.summation import Reordered, Sums

VARIANTS = Path(__file__).with_name("variants.toml")


class Repeat(TableRow):
    """One token, ``times`` times."""

    token: Annotated[int, Field(ge=0)]
    times: Annotated[int, Field(ge=1)]


class Setting(TableRow):
    """One honest way to compute.

    :ivar cases: globs over the ids of the default lane; each must match.
    :ivar attention: transformers' own code instead of the recording one; scores and patterns are then not recorded.
    :ivar samples: fresh samples of the noise model itself instead of a float32 run.
    :ivar tokens: another prompt, for the truth too; so are ``edits``.
    """

    id: str
    cases: Annotated[list[str], Field(min_length=1)]
    sums: Sums | None = None
    attention: Literal["eager", "sdpa"] | None = None
    samples: Annotated[int, Field(ge=0)] = 0
    tokens: RandomTokens | Repeat | None = None
    edits: list[Edit] = Field(default_factory=list)

    @model_validator(mode="after")
    def _samples_are_not_float32(self) -> Setting:
        if self.samples and (idle := self.model_fields_set - {"id", "cases", "samples"}):
            raise ValueError(f"samples come from the float64 model, on which {', '.join(sorted(idle))} has no effect")
        return self

    @property
    def records_all(self) -> bool:
        """Whether its runs hold every tensor of the truth; of the others only what they hold is judged."""
        return self.attention is None and not self.samples


class Table(TableRow):
    """The whole file."""

    format: Literal[1]
    setting: Annotated[list[Setting], Field(min_length=1)]


@dataclass(frozen=True)
class Judged:
    """One run of a setting.

    :ivar position: the largest position ratio over all tensors, gate 8.
    :ivar element: the largest element ratio, gate 32.
    :ivar failures: the tensors that failed, in full.
    """

    position: float
    element: float
    failures: list[str]


def load_settings(path: Path = VARIANTS) -> list[Setting]:
    """All rows.

    :raises CaseTableError: an unreadable file, an unknown or missing key, a wrong type, an id given twice.
    """
    settings = read_toml(path, Table, CaseTableError).setting
    ids = [setting.id for setting in settings]
    if doubled := sorted({name for name in ids if ids.count(name) > 1}):
        raise CaseTableError(f"{path}: settings given twice: {', '.join(doubled)}")
    return settings


def cases_of(setting: Setting) -> list[Case]:
    """The cases that a setting runs on, with its tokens and edits.

    :raises CaseTableError: a glob that matches no case.
    """
    default = select(load_cases(), [])
    chosen = {case.id: case for glob in setting.cases for case in select(default, [glob])}
    change: dict[str, object] = {}
    if isinstance(setting.tokens, Repeat):
        change = {"tokens": [setting.tokens.token] * setting.tokens.times, "text": None}
    elif setting.tokens is not None:
        change = {"tokens": setting.tokens, "text": None}
    return [
        case.model_copy(update=change | ({"edits": [*case.edits, *setting.edits]} if setting.edits else {}))
        for case in chosen.values()
    ]


def judge(setting: Setting, case: Case) -> list[Judged]:
    """Each run of a setting on a case: one, or one for each sample."""
    oracle = Oracle(prepare(case, cache_root()), cache_root())
    truth, sae = oracle.truth(), oracle.subject.sae_file
    decoder = load_sae(sae).decoder if sae else None
    runs = _samples(oracle, setting.samples) if setting.samples else iter([_float32(setting, oracle)])
    judged = []
    for run in runs:
        results = compare(truth, run, decoder, None if setting.records_all else set(run.arrays))
        judged.append(_judged(results))
    return judged


def _judged(results: list[TensorResult]) -> Judged:
    compared = [result for result in results if result.compared]
    failures = [result.message() for result in results if result.status is Status.FAIL]
    if not compared:
        failures.append("nothing was compared")
    return Judged(
        max((result.position_ratio for result in compared), default=np.inf),
        max((result.element_ratio for result in compared), default=np.inf),
        failures,
    )


class _OtherAttention(TorchSource):
    """transformers' own attention code, in which scores and patterns cannot be recorded."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        self._implementation = implementation

    def model(self, directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
        return load_model(directory, dtype, self.device, self._implementation)


def _float32(setting: Setting, oracle: Oracle) -> InMemory:
    source = _OtherAttention(setting.attention) if setting.attention else TorchSource()
    order = Reordered(setting.sums) if setting.sums else nullcontext()
    with source, order:
        emitted = source.trace(oracle.subject, "free", oracle.truth(), oracle.inputs("free"))
    if isinstance(order, Reordered) and not order.calls:
        raise OracleError(f"{setting.id}: no operation was computed in another order; the variant varies nothing")
    return emitted


def _samples(oracle: Oracle, count: int) -> Iterator[InMemory]:
    """Samples of the noise model, from another seed than those that made the truth's noise.

    They hold the forward pass alone: no lens, no SAE.
    """
    subject, truth = oracle.subject, oracle.truth()
    tokens, scales = torch.tensor(subject.tokens), MatmulScales()
    with Truth64(scales), torch.no_grad():
        forward(oracle.computation.model, tokens)
    pool = NoisePool(int(subject.digest[16:32], 16))
    for _ in range(count):
        with RoundingNoise(pool, scales, oracle.arithmetic), torch.no_grad():
            captured = forward(oracle.computation.model, tokens).tensors
        arrays = {name: as_emitted(tensor) for name, tensor in captured.items() if name in truth.tensors}
        yield InMemory({name: (array, None) for name, array in arrays.items()}, "float32", {}, [])


def as_emitted(tensor: torch.Tensor) -> np.ndarray:
    """A float64 sample as a candidate would write it."""
    return tensor.numpy().astype(np.float32)


def main() -> None:
    """Judge every setting on its cases and print the largest ratios; exit code 1 on a false positive."""
    console = Console(soft_wrap=True)
    runs, failures = 0, []
    for setting in load_settings():
        judged = [(case.id, one) for case in cases_of(setting) for one in judge(setting, case)]
        runs += len(judged)
        failures += [f"{setting.id}: {case}: {failed}" for case, one in judged for failed in one.failures]
        position, element = (max(getattr(one, part) for _, one in judged) for part in ("position", "element"))
        largest = f"at most {position:.2f} of 8 at a position, {element:.1f} of 32 at an element"
        console.print(f"{setting.id}: {len(judged)} runs, {largest}", highlight=False)
    console.print("\n".join(failures), markup=False)
    console.print(f"{len(failures)} false positives in {runs} honest runs", highlight=False)
    raise typer.Exit(1 if failures else 0)


if __name__ == "__main__":
    typer.run(main)
