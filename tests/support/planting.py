"""An honest trace, and copies of it with one planted fault each.

The honest trace is torch's float32 run of a case, written as the emitter writes one, so that only the planted fault
can fail. A fault in the numbers is planted with :func:`write`, a fault in the model with :func:`changed_model` and
:func:`rerun`.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import torch as torch_file
from safetensors.numpy import load_file, save_file

from candle_mi_parity.candidate.sources import Source, StatelessSource
from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.compare.compare import check_header, compare
from candle_mi_parity.compare.verdict import CaseResult, Status, TensorResult
from candle_mi_parity.files.cache import content_key, publish
from candle_mi_parity.files.digest import file_digest
from candle_mi_parity.judge.case import Progress, judge_case
from candle_mi_parity.judge.known import facts_of
from candle_mi_parity.models.checkpoint import read_config, weight_files
from candle_mi_parity.models.prepared_case import PreparedCase, prepare
from candle_mi_parity.models.sae import load_sae
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.spec.cases import Case, LocalModel, load_cases
from candle_mi_parity.spec.counterfactual import Counterfactual
from candle_mi_parity.spec.explanations import NOTHING_KNOWN, Explanation, combined, load_explanations
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.trace import FORMAT, CandleMi, Emitted, InMemory, Trace
from candle_mi_parity.trace.truth import Truth

RELEASE = CandleMi(version="0.2.2", source="registry", checksum="a" * 64, revision=None, tree_digest=None)
CASES = {case.id: case for case in load_cases()}

Arrays = dict[str, np.ndarray]
Weights = dict[str, np.ndarray]
ChangeWeights = Callable[[Weights], object]
Edit = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class Real:
    """One case, its truth, and torch's float32 run of it.

    :ivar inputs: file of the inputs beside the tokens.
    """

    subject: PreparedCase
    oracle: Oracle
    truth: Truth
    emitted: InMemory
    inputs: Path

    @property
    def arrays(self) -> Arrays:
        """Fresh copies, in execution order."""
        return {name: array.copy() for name, array in arrays_of(self.emitted).items()}

    @property
    def decoder(self) -> np.ndarray | None:
        free_sae = self.subject.sae_file is not None and self.truth.meta["mode"] == "free"
        return load_sae(self.subject.sae_file).decoder if free_sae and self.subject.sae_file else None


@functools.cache
def real(case_id: str, mode: Mode = "free") -> Real:
    """A case of the table; computed once."""
    return real_of(CASES[case_id], mode)


def real_of(case: Case, mode: Mode = "free") -> Real:
    subject = prepare(case, cache_root())
    oracle = Oracle(subject, cache_root())
    truth, inputs = oracle.truth(mode), oracle.inputs(mode)
    with TorchSource() as source:
        return Real(subject, oracle, truth, source.trace(subject, mode, truth, inputs), inputs)


@functools.cache
def known_real(case_id: str, mode: Mode = "free") -> Real:
    """A case in which 0.2.2 is known to diverge, with the float32 run and the truth of its counterfactual.

    The counterfactual may only change the config. A row that does not, as that of a LayerNorm in one pass, which each
    StarCoder2 has, is left out: on these models it changes nothing beyond the noise.
    """
    subject = prepare(CASES[case_id], cache_root())
    table, plain = load_explanations(), Oracle(subject, cache_root())
    rows = table.applicable(facts_of(subject), RELEASE.version)
    change = combined(row for row in rows if row.change is not None and row.change.changes_config)
    assert change.changes_config and not (change.weights_zero or change.variants), case_id
    oracle = plain.under(change)

    def write_model(out: Path) -> None:
        config = change.changed_config(read_config(subject.model_dir))
        (out / "config.json").write_text(json.dumps(config))
        for file in weight_files(subject.model_dir):
            (out / file.name).symlink_to(file.resolve())

    key = content_key("known", subject.model_digest, change.key())
    other = replace(subject, model_dir=publish(cache_root() / "models" / key, write_model))
    truth, inputs = oracle.truth(mode), oracle.inputs(mode)
    with TorchSource() as source:
        return Real(other, oracle, truth, source.trace(other, mode, truth, inputs), inputs)


def explanation(**fields: Any) -> Explanation:
    """A made-up row of the table of explanations."""
    given = {"id": "CMI900", "name": "made-up", "says": "A sentence of some length.", "kind": "wrong number"}
    return Explanation.model_validate(given | {"releases": ["0.2.2"]} | fields)


class Giving(StatelessSource):
    """A candidate whose traces a function makes, from what :meth:`Source.trace` is given."""

    def __init__(
        self, give: Callable[..., Emitted], identity: CandleMi | None = RELEASE, device: str = "cpu"
    ) -> None:
        self._give, self.identity, self.device = give, identity, device

    def trace(self, *asked: Any) -> Emitted:
        return self._give(*asked)


def judged(case: Case, source: Source, cache: Path | None = None) -> CaseResult:
    """Judge a case with no known divergence."""
    return judge_case(case, source, "x", cache or cache_root(), NOTHING_KNOWN, Progress()).result


def arrays_of(dump: InMemory) -> Arrays:
    """The arrays of a dump, in execution order; do not modify them."""
    return {name: array for name, (array, _) in dump.arrays.items()}


def with_arrays(dump: InMemory, arrays: Mapping[str, np.ndarray]) -> InMemory:
    """The dump with other, whole arrays."""
    return replace(dump, arrays={name: (array, None) for name, array in arrays.items()})


def changed_model(directory: Path, base: Path, **change: object) -> Path:
    """A copy of a model directory with another config; None removes a key."""
    directory.mkdir(parents=True)
    keys = {key: value for key, value in change.items() if value is not None}
    left_out = [key for key in change if key not in keys]
    config = Counterfactual.model_construct(config_set=keys, config_drop=left_out).changed_config(read_config(base))
    (directory / "config.json").write_text(json.dumps(config))
    for file in weight_files(base):
        (directory / file.name).symlink_to(file)
    return directory


def local(directory: Path, family: str = "llama", change: ChangeWeights | None = None, **config: object) -> Case:
    """A case of a copy of a family's tiny model; a config key set to ``...`` is taken away."""
    source = real(f"{family}/hub").subject.model_dir
    directory.mkdir(parents=True)
    found = {key: value for key, value in (read_config(source) | config).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(found))
    weights = load_file(source / "model.safetensors")
    if change is not None:
        change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    model = LocalModel(source="local", path=str(directory))
    return CASES[f"{family}/hub"].model_copy(update={"id": f"{family}/tried", "model": model})


def rerun(there: Real, model_dir: Path) -> Arrays:
    """The float32 run of another model directory on the same tokens."""
    mode: Mode = "forced" if there.truth.meta["mode"] == "forced" else "free"
    with TorchSource() as source:
        emitted = source.trace(replace(there.subject, model_dir=model_dir), mode, there.truth, there.inputs)
    return arrays_of(emitted)


def entry(name: str, array: np.ndarray, file: str, dtype: str = "") -> dict[str, Any]:
    """An item of the document's ``tensors``; bfloat16, which numpy does not have, comes as float32 and is named."""
    content = np.ascontiguousarray(array)
    if dtype == "bfloat16":
        content = torch.from_numpy(content).bfloat16().view(torch.uint16).numpy()
    return {
        "name": name,
        "shape": list(array.shape),
        "dtype": "bfloat16" if dtype == "bfloat16" else str(array.dtype),
        "sha256": hashlib.sha256(content.tobytes()).hexdigest(),
        "nonfinite": int(np.count_nonzero(~np.isfinite(array))),
        "file": file,
        "key": name,
    }


def document(there: Real, arrays: Mapping[str, np.ndarray], file: str) -> dict[str, Any]:
    """The JSON document of a trace."""
    subject = there.subject
    free = there.truth.meta["mode"] == "free"
    return {
        "format": FORMAT,
        "header": {
            "emitter": "0.1.0",
            "candle_mi": RELEASE.model_dump(),
            "candle": "0.11.1",
            "features": ["sae", "transformer"],
            "device": "cpu",
            "dtype": subject.case.dtype,
            "case": {"id": subject.case.id, "digest": subject.digest},
            "model_digest": subject.model_digest,
            "sae_digest": subject.sae_digest if free else None,
            "inputs_digest": file_digest(there.inputs),
        },
        "run": {"started": "now", "seconds": {"load": 0.1, "forward": 0.1}, "threads": 2, "peak_rss_bytes": None},
        "tokens": subject.tokens,
        "tensors": [entry(name, array, file, subject.case.dtype) for name, array in arrays.items()],
        "scalars": dict(there.emitted.scalars),
        "top_features_last_pos": [feature.model_dump() for feature in there.emitted.top_features],
    }


def write(
    directory: Path, there: Real, arrays: Mapping[str, np.ndarray] | None = None, edit: Edit | None = None
) -> Path:
    """Write a trace.

    :param arrays: None for the honest ones.
    :param edit: changes the document after its digests were computed.
    :returns: the JSON file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    given = there.arrays if arrays is None else arrays
    kept = {name: np.ascontiguousarray(array) for name, array in given.items()}
    if there.subject.case.dtype == "bfloat16":
        tensors = {name: torch.from_numpy(array).bfloat16() for name, array in kept.items()}
        torch_file.save_file(tensors, directory / "trace.safetensors")
    else:
        save_file(kept, directory / "trace.safetensors")
    content = document(there, kept, "trace.safetensors")
    if edit is not None:
        edit(content)
    path = directory / "trace.json"
    path.write_text(json.dumps(content, allow_nan=False))
    return path


def compare_trace(there: Real, path: Path) -> list[TensorResult]:
    """Compare header and tensors, as a run does."""
    trace = Trace(path)
    check_header(there.truth, trace, file_digest(there.inputs))
    return compare(there.truth, trace, there.decoder, None)


def planted(directory: Path, there: Real, **arrays: np.ndarray) -> list[TensorResult]:
    """Judge a copy in which some tensors are replaced."""
    return compare_trace(there, write(directory, there, there.arrays | arrays))


def failures(results: list[TensorResult]) -> list[str]:
    """Names that failed, in execution order."""
    return [result.name for result in results if result.status is Status.FAIL]


def first(results: list[TensorResult]) -> TensorResult:
    """The first divergence."""
    found = next((result for result in results if result.status is Status.FAIL), None)
    assert found is not None, "nothing failed: the planted fault went through"
    return found
