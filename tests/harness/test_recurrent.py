"""Layers that run several times: what the truth is, computed in other ways, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.numpy import load_file
from torch import nn

from candle_mi_parity.candidate.build import build
from candle_mi_parity.candidate.process import EmitterError, EmitterProcess
from candle_mi_parity.candidate.requests import request
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.compare.compare import compare
from candle_mi_parity.compare.verdict import Status
from candle_mi_parity.errors import CaseTableError, OracleError
from candle_mi_parity.judge.hypotheses import _of_recurrent
from candle_mi_parity.models.prepared_case import PreparedCase, prepare
from candle_mi_parity.oracle.hooks import forward, load_model, replacing
from candle_mi_parity.oracle.rounding import Float64
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.spec.counterfactual import Counterfactual
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.spec.recurrent import feedback_key
from tests.support.planting import Real, real, real_of

PLAIN, WHOLE, FED = "llama/recurrent", "llama/recurrent-whole", "llama/recurrent-feedback"


def subject_with(base: str = PLAIN, edits: Any = (), **recurrent: Any) -> PreparedCase:
    row = real(base).subject.case.model_dump(exclude_none=True)
    return prepare(Case.model_validate({**row, "edits": list(edits), "recurrent": recurrent}), cache_root())


def values(case: str | Real) -> dict[str, np.ndarray]:
    truth = (real(case) if isinstance(case, str) else case).truth
    return {name: tensor.value for name, tensor in truth.tensors.items()}


def near(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_a_whole_model_run_three_times_is_a_model_of_three_times_the_layers() -> None:
    """As transformers runs it with its own attention, and without a hook."""
    there = real(WHOLE)
    with Float64():  # type: ignore[no-untyped-call]
        model: Any = load_model(there.subject.model_dir, attention="eager")
        model.model.layers = nn.ModuleList([*model.model.layers] * 3)
        model.config.num_hidden_layers = 9
        logits = model(torch.tensor(there.subject.tokens), use_cache=False).logits
    near(values(WHOLE)["logits"], logits.numpy())


def test_one_pass_is_the_plain_forward_pass() -> None:
    once, plain = values("llama/recurrent-once"), forward_of("llama/recurrent-once")
    assert once.keys() >= plain.keys()
    for name in plain:
        near(once[name], plain[name])


def forward_of(case: str, **edits: Any) -> dict[str, np.ndarray]:
    there = real(case)
    with Float64():  # type: ignore[no-untyped-call]
        found = forward(load_model(there.subject.model_dir), torch.tensor(there.subject.tokens), **edits).tensors
    return {name: tensor.numpy() for name, tensor in found.items()}


def test_with_feedback_the_last_pass_is_one_plain_pass_on_the_stream_with_the_vectors_whatever_the_depth() -> None:
    there = real(FED)
    recurrent = there.subject.case.recurrent
    assert recurrent is not None
    stream = forward_of(FED)[recurrent.hook].copy()
    for index, row in enumerate(recurrent.feedback):
        vector = load_file(there.inputs)[feedback_key(index)].astype(np.float64)
        stream[:, row.position] += row.strength * vector
    fed = forward_of(FED, edits={recurrent.hook: [replacing(torch.from_numpy(stream))]})
    deeper = values(real_of(there.subject.case.model_copy(update={"recurrent": with_depth(there, 2)})))
    near(values(FED)[recurrent.hook], stream)
    for name in set(fed) - {recurrent.hook, "hook_embed"}:
        near(values(FED)[name], fed[name])
        near(deeper[name], fed[name])


def with_depth(there: Real, depth: int) -> Any:
    assert there.subject.case.recurrent is not None
    return there.subject.case.recurrent.model_copy(update={"depth": depth})


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a layer too many": ({"layers": [1, 3]}, "layers [1, 3], but the model has 3"),
    "an empty range": ({"layers": [2, 1]}, "layers [2, 1]"),
    "no pass": ({"layers": [1, 1], "depth": 0}, "greater than or equal to 1"),
    "a position past the prompt": ({"layers": [1, 1], "feedback": [{"position": 12}]}, "position 12 is outside"),
    "a strength of many bits": ({"layers": [1, 1], "feedback": [{"position": 1, "strength": 0.1}]}, "bfloat16"),
    "an unknown key": ({"layers": [1, 1], "sustained": True}, "sustained"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_recurrence_that_cannot_be_run_is_refused(name: str) -> None:
    row, message = BAD[name]
    with pytest.raises((CaseTableError, ValidationError)) as refusal:
        subject_with(**row)
    assert message in str(refusal.value)


def test_what_cannot_be_combined_or_has_no_truth() -> None:
    steer = {"kind": "steer", "hook": "blocks.1.attn.hook_pattern", "how": "scale", "value": 2.0}
    with pytest.raises(ValidationError, match="steering"):
        subject_with(edits=[steer | {"spec": {"edges": [[5, 2]]}}], layers=[1, 1])
    with pytest.raises(OracleError, match="no teacher-forced truth"):
        real(PLAIN).oracle.truth("forced")


def test_the_digest_depends_on_every_part() -> None:
    fed = [{"position": 3}]
    rows: list[dict[str, Any]] = [{"layers": [1, 1]}, {"layers": [0, 1]}, {"layers": [1, 1], "depth": 3}]
    rows += [{"layers": [1, 1], "feedback": fed}, {"layers": [1, 1], "feedback": fed * 2}]
    assert len({subject_with(**row).digest for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        (PLAIN, {"recurrent": {"layers": [1, 1], "depth": 3}}),
        (WHOLE, {"recurrent": {"layers": [0, 1], "depth": 3}}),
        (FED, {"variants": ["feedback-on-the-output"]}),
        (FED, {"recurrent": {"layers": [0, 1], "depth": 3, "feedback": [{"position": 0}]}}),
        ("llama/recurrent-once", {"variants": ["feedback-from-the-first-pass"]}),
    ],
)
def test_a_candidate_that_runs_other_passes_fails_and_a_search_would_try_what_it_did(
    case: str, change: dict[str, Any]
) -> None:
    there, other = real(case), Counterfactual.model_validate(change)
    under = there.oracle.under(other)
    plain, found = (oracle.values().tensors for oracle in (there.oracle, under))  # by one processor
    failed = [name for name, tensor in plain.items() if not np.array_equal(tensor.value, found[name].value)]
    assert failed[0] == there.subject.case.recurrent.hook  # type: ignore[union-attr]
    results = compare(under.truth(), there.emitted, None, None)
    assert next(result for result in results if result.status is Status.FAIL).name == failed[0]
    tried = {one.key() for one in _of_recurrent(there.subject.case.recurrent)}
    assert other.variants or other.key() in tried


@pytest.mark.rust
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth must be >= 1"),
        ({"layers": [1, 3]}, "loop_end (3) >= n_layers (3)"),
        ({"layers": [2, 1]}, "loop_start (2) > loop_end (1)"),
        (
            {"feedback": [{"position": 12, "strength": 1.0, "tensor": "feedback.0"}]},
            "feedback position 12 >= seq_len",
        ),
        ({"feedback": [{"position": 1, "strength": 1.0, "tensor": "feedback.9"}]}, "no tensor"),
        ({"sustained": True}, "unknown field"),
    ],
)
def test_the_emitter_refuses_in_one_line_what_cannot_be_run(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    there = real(FED)
    asked: dict[str, Any] = request(there.subject, "free", there.inputs, tmp_path / "a.json", "cpu")
    asked["recurrent"] |= change
    with (
        EmitterProcess(build(parse_candidate("0.2.2"), cache_root(), print).path) as process,
        pytest.raises(EmitterError) as refusal,
    ):
        process.emit(asked, 60.0)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
