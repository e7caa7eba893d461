"""Fixtures: each model and SAE is loaded once a session, and each case is judged once."""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from candle_mi_parity.candidate import cuda
from candle_mi_parity.candidate.sources import Source, StoredSource, open_source
from candle_mi_parity.candidate.spelling import parse_candidate, stored_releases
from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.compare.verdict import CaseResult
from candle_mi_parity.judge.case import Progress, judge_case
from candle_mi_parity.spec.cases import OPT_IN_LANES, Case, load_cases
from candle_mi_parity.spec.explanations import load_explanations
from candle_mi_parity.spec.families import RECURRENT
from candle_mi_parity.spec.paths import OUTPUTS, ROOT, cache_root
from tests import plugin

CASES = {case.id: case for case in load_cases()}
STORED = stored_releases(OUTPUTS)
NEWEST = STORED[-1]
PLAIN = [name for name in CASES if name.endswith("/hub")]
ATTENTIVE = [name for name in PLAIN if name.partition("/")[0] not in RECURRENT]
"""RWKV has no attention."""
WITH_SAE = ["gemma2/hub", "llama/sae-standard", "llama/sae-jumprelu", "llama/sae-topk", "smollm2/hub"]
LIVE = "0.2.2"
CUDA = "cuda:0"


@pytest.fixture(scope="session")
def torch_cpu() -> Iterator[TorchSource]:
    """transformers in float32 on the CPU; it keeps its models and SAEs in memory."""
    with TorchSource("cpu") as source:
        yield source


@pytest.fixture(scope="session")
def torch_cuda() -> Iterator[TorchSource]:
    """The same on CUDA."""
    with TorchSource(CUDA) as source:
        yield source


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    """The emitter of the default release, built or from the cache, one process for all tests."""
    out = tmp_path_factory.mktemp("traces")
    with open_source(parse_candidate(LIVE), cache_root(), out, print) as source:
        yield source


@pytest.fixture(scope="session")
def judged(request: pytest.FixtureRequest) -> Callable[[str, str], CaseResult]:
    """Judge a case against a candidate, once a session."""
    table = load_explanations()

    @functools.cache
    def judge(candidate: str, case_id: str) -> CaseResult:
        stored = candidate in STORED
        source = StoredSource(OUTPUTS / f"{candidate}.json") if stored else request.getfixturevalue(candidate)
        spec = {"live": LIVE}.get(candidate, f"stored:{candidate}" if stored else "torch")
        result = judge_case(CASES[case_id], source, spec, cache_root(), table, Progress()).result
        plugin.record(request.config, candidate, result)
        return result

    return judge


def pytest_configure(config: pytest.Config) -> None:
    """Forbid the network, also in processes that a test starts, unless ``-m hub`` is given."""
    guard, asked = ROOT / "tests" / "offline", str(config.getoption("markexpr", ""))
    if "hub" not in asked or "not hub" in asked:
        sys.path.insert(0, str(guard))
        importlib.import_module("no_network").forbid()
        os.environ["PYTHONPATH"] = os.pathsep.join([str(guard), os.environ.get("PYTHONPATH", "")])


def pytest_report_header() -> str:
    return f"parity: candidates: {', '.join(_candidates())}; live is candle-mi {LIVE}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``candidate`` and ``case_id`` runs for each pair.

    ``plain_case_id`` and ``sae_case_id`` are the plain cases and one of each kind of SAE, against the newest stored
    release.
    """
    names = metafunc.fixturenames
    if "case_id" in names and "judged" in names and "candidate" in names:
        pairs = [_pair(candidate, case) for candidate in _candidates() for case in CASES.values()]
        metafunc.parametrize(("candidate", "case_id"), [pair for pair in pairs if pair is not None])
    for name, cases in (("plain_case_id", PLAIN), ("attentive_case_id", ATTENTIVE), ("sae_case_id", WITH_SAE)):
        if name in names:
            metafunc.parametrize(("candidate", name), [_pair(NEWEST, CASES[case]) for case in cases])


def _candidates() -> list[str]:
    """CUDA only where there is a GPU, so that no parameter is skipped."""
    return [*STORED, "torch_cpu", *(["torch_cuda"] if _has_card() else []), "live"]


def _has_card() -> bool:
    return shutil.which("nvidia-smi") is not None and not cuda.missing("cuda")


def _pair(candidate: str, case: Case) -> Any:
    """A pair with its markers; None for a full-size model that is not run live, as none is stored."""
    if case.lane == "fullsize" and candidate != "live":
        return None
    marks = [getattr(pytest.mark, case.lane)] if case.lane in OPT_IN_LANES else []
    marks += {"torch_cuda": [pytest.mark.gpu], "live": [pytest.mark.rust]}.get(candidate, [])
    if candidate != NEWEST and not (candidate == "live" and case.id in PLAIN):
        marks.append(pytest.mark.thorough)
    return pytest.param(candidate, case.id, id=f"{candidate}-{case.id}", marks=marks)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes with one thread, as in the processes of a hunt."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
