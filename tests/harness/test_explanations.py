"""A known divergence is excused only by the counterfactual that is listed for it; a fault on top of it fails.

The candidates are torch's float32 under another config or with other weights.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.compare.run_result import RunResult, Verdict
from candle_mi_parity.compare.verdict import CaseResult, Explained, Outcome, Status, TensorResult
from candle_mi_parity.judge.case import Judgement, Progress, judge_case
from candle_mi_parity.judge.explain import hold_table
from candle_mi_parity.judge.hypotheses import hypotheses
from candle_mi_parity.judge.known import NotExplained, facts_of, known_divergence, known_refusal
from candle_mi_parity.judge.search import Search
from candle_mi_parity.run.options import RunOptions
from candle_mi_parity.run.run import run
from candle_mi_parity.spec.counterfactual import PLAIN, Counterfactual
from candle_mi_parity.spec.explanations import Explanations, combined, load_explanations
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.trace import CandleMi
from tests.support.explaining import changed, evidence, searched
from tests.support.planting import RELEASE, Arrays, Giving, Real, explanation, real, rerun

TABLE = load_explanations()
NEWER = RELEASE.model_copy(update={"version": "0.3.0"})
CHECKOUT = CandleMi(version="0.2.3-dev", source="path", checksum=None, revision=None, tree_digest="b" * 64)


def diverging(tmp_path: Path, name: str) -> Real:
    """float32 that computes what the explanation says."""
    case, config, weights = HONEST[name]
    return changed(tmp_path / "model", real(case), config, weights)


def known(there: Real, arrays: Arrays | None = None, identity: CandleMi = RELEASE) -> tuple[Explained | None, str]:
    found = known_divergence(evidence(there, arrays), TABLE, identity)
    return (found, "") if isinstance(found, Explained) else (None, found.why)


def biases(block: str, *names: str) -> dict[str, float]:
    """These biases at 0."""
    return {f"{block}.{name}_proj.bias": 0.0 for name in names}


def block(kind: str, theta: float, **more: float) -> dict[str, Any]:
    """A config with this rotary block."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


NESTED = {"rope_theta": 10000.0, "rope_parameters": None}
ALTERNATING = ["sliding_attention", "full_attention"]
PATTERN = "blocks.0.attn.hook_pattern"

HONEST: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
    "CMI001": ("llama/v5", NESTED, {}),
    "CMI002": ("qwen2/absent-rope-theta", {"rope_theta": 1e6}, {}),
    "CMI004": ("phi3/partial-rotary", {"partial_rotary_factor": 1.0}, {}),
    "CMI006": ("mistral/window", {"sliding_window": 9}, {}),
    "CMI007": ("phi3/window", {"sliding_window": None}, {}),
    "CMI008": ("qwen2/window", {"use_sliding_window": False}, {}),
    "CMI009": ("gemma2/layer-types", {"layer_types": None, "sliding_window": 9}, {}),
    "CMI012": ("llama/attention-bias", {}, biases("self_attn", *"qkvo")),
    "CMI013": ("llama/absent-norm-eps", {"rms_norm_eps": 1e-5}, {}),
    "CMI015": ("llama/activation", {"hidden_act": "silu"}, {}),
    "CMI018": ("gemma2/gelu", {"hidden_activation": "gelu_pytorch_tanh"}, {}),
    "CMI019": ("llama/mlp-bias", {}, biases("mlp", "gate", "up", "down")),
    "CMI037": ("mistral/rope-theta-twice", block("default", 1e6), {}),
    "CMI038": ("llama/rope-scaling-null", block("default", 5e5), {}),
    "CMI039": ("llama/rope-original-length-twice", {"original_max_position_embeddings": 64}, {}),
    "CMI040": ("gemma/rope-original-length-absent", {"original_max_position_embeddings": 8192}, {}),
    "CMI041": ("qwen2/attention-bias-false", {}, biases("self_attn", *"qkv")),
    "CMI044": ("mistral/rope-longrope-no-length", {"max_position_embeddings": 64}, {}),
}
"""Explanation → its case, and the config and weights under which float32 does what candle-mi does."""

ON_TOP: dict[str, tuple[str, dict[str, Any], dict[str, float], str]] = {
    "another theta than 10,000": ("CMI001", NESTED | {"rope_theta": 20000.0}, {}, "blocks.0.attn.hook_scores"),
    "a window of two too many": ("CMI006", {"sliding_window": 10}, {}, PATTERN),
    "no window at all": ("CMI006", {"sliding_window": None}, {}, PATTERN),
    "a window where none is read": ("CMI007", {"sliding_window": 9}, {}, PATTERN),
    "a window in layer 0": (
        "CMI008",
        {"layer_types": [*ALTERNATING, "full_attention"]},
        {},
        "blocks.0.attn.hook_pattern",
    ),
    "layer types unread and no window + 1": ("CMI009", {"layer_types": None}, {}, PATTERN),
    "one bias of four is added": ("CMI012", {}, biases("self_attn", *"qko"), "blocks.0.attn.hook_v"),
    "eps 2e-5": ("CMI013", {"rms_norm_eps": 2e-5}, {}, "blocks.0.attn.hook_q"),
    "relu for silu": ("CMI015", {"hidden_act": "relu"}, {}, "blocks.0.mlp.hook_post"),
    "silu for the tanh gelu": ("CMI018", {"hidden_activation": "silu"}, {}, "blocks.0.mlp.hook_post"),
    "a third theta": ("CMI037", block("default", 2e4), {}, "blocks.0.attn.hook_scores"),
    "half of a factor": ("CMI038", block("linear", 5e5, factor=2.0), {}, "blocks.0.attn.hook_scores"),
    "a third length": ("CMI039", {"original_max_position_embeddings": 16}, {}, "blocks.0.attn.hook_scores"),
    "another default": ("CMI040", {"original_max_position_embeddings": 16}, {}, "blocks.0.attn.hook_scores"),
    "two biases of three": ("CMI041", {}, biases("self_attn", *"qk"), "blocks.0.attn.hook_v"),
    "another length": ("CMI044", {"max_position_embeddings": 1000}, {}, "blocks.0.attn.hook_scores"),
    "one bias of three is added": ("CMI019", {}, biases("mlp", "gate", "up"), "blocks.0.mlp.hook_post"),
}
"""Fault on top → the explanation, what the candidate is instead, and the first tensor that differs under it."""


GUESSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "CMI054": ("scalar", {"query_pre_attn_scalar": 32.0}, "blocks.0.attn.hook_scores"),
    "CMI055": ("softcap", {"attn_logit_softcapping": 2.0}, PATTERN),
    "CMI056": ("final-softcap", {"final_logit_softcapping": 1.0}, "logits"),
    "CMI057": ("window", {"sliding_window": 3}, PATTERN),
    "CMI058": ("tanh", {"hidden_act": "relu"}, "blocks.0.mlp.hook_post"),
}
"""Explanation → its case of a guessed architecture, a fault on top, and the first tensor that differs under it."""


@pytest.mark.parametrize("name", GUESSED)
def test_what_a_guessed_architecture_reads_is_explained_and_a_fault_on_top_is_not(name: str) -> None:
    case, fault, first = GUESSED[name]
    there = real(f"a2d-llama/pretrained-{case}")
    rows = [row for row in TABLE.explanation if row.id in (name, "CMI052")]
    change = combined(rows)

    def computed(change: Counterfactual) -> Arrays:
        tensors = there.oracle.under(change).truth().tensors
        return {tensor: expected.value.astype(np.float32) for tensor, expected in tensors.items()}

    found, why = known(there, computed(change))
    assert found is not None and set(found.ids) == {name, "CMI052"}, why
    found, why = known(there, computed(change.model_copy(update={"config_set": {**change.config_set, **fault}})))
    assert found is None and name in why and f"first {first} " in why, why


@pytest.mark.every(4)
@pytest.mark.parametrize("name", HONEST)
def test_a_listed_counterfactual_explains_its_divergence(name: str, tmp_path: Path) -> None:
    there = diverging(tmp_path, name)
    found, why = known(there)
    assert found is not None, why
    assert name in found.ids and found.worst < 8
    assert found.tensors >= len(there.truth.tensors)


@pytest.mark.every(4)
@pytest.mark.parametrize("fault", ON_TOP)
def test_a_fault_on_top_of_a_known_divergence_is_not_excused(fault: str, tmp_path: Path) -> None:
    name, config, weights, first = ON_TOP[fault]
    there = changed(tmp_path / "model", real(HONEST[name][0]), config, weights)
    found, why = known(there)
    assert found is None, f"{fault} is excused: {found and found.line()}"
    assert name in why and f"first {first} " in why, why
    source = Giving(lambda *_: there.emitted)
    result = judge_case(there.subject.case, source, "x", cache_root(), TABLE, Progress()).result
    assert (result.status, result.new_at) == (Status.FAIL, first), "the case is named by what is new"


@pytest.mark.parametrize(
    ("tensor", "plant"),
    [
        ("blocks.1.attn.hook_v", lambda array, _: np.multiply(array, 1.0001, out=array)),
        ("blocks.1.hook_mlp_out", lambda array, arrays: np.copyto(array, arrays["blocks.1.hook_resid_post"])),
        ("blocks.1.attn.hook_pattern", lambda array, _: np.copyto(array[0, 0, 20, 5:6], 1e-9)),
        ("logits", lambda array, _: np.multiply(array, 1.0001, out=array)),
    ],
)
def test_a_wrong_tensor_in_a_known_case_is_not_excused(
    tensor: str, plant: Callable[[np.ndarray, Arrays], object], tmp_path: Path
) -> None:
    there = diverging(tmp_path, "CMI006")
    arrays = there.arrays
    plant(arrays[tensor], arrays)
    found, why = known(there, arrays)
    assert found is None and f"first {tensor} " in why, why


def test_a_checkout_may_have_fixed_a_part_and_a_release_may_not(tmp_path: Path) -> None:
    """Layer types are read, the window is still one too long."""
    there = changed(tmp_path / "model", real("gemma2/layer-types"), {"sliding_window": 9})
    found, _ = known(there, identity=CHECKOUT)
    assert found is not None and found.ids == ["CMI006"]
    found, why = known(there)
    assert found is None and "CMI009" in why
    older = replace(evidence(there), release=TABLE.baseline("0.1.0"))
    assert known_divergence(older, TABLE, RELEASE) == NotExplained(""), "another release's rows excuse nothing"


SINGLE = [(name, ()) for name in ("CMI001", "CMI006", "CMI012", "CMI013")]
PAIR = pytest.param("CMI009", ("sliding_window + 1", "layer_types"), marks=pytest.mark.thorough)


@pytest.mark.parametrize(("name", "parts"), [*SINGLE, PAIR])
def test_the_search_finds_a_change_without_the_list(name: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    found = searched(diverging(tmp_path, name))
    assert found.explained is not None, found.unexplained
    assert not found.explained.ids and found.explained.worst < 8
    assert all(part in found.explained.change for part in parts)


def test_a_counterfactual_that_changes_no_tensor_explains_nothing() -> None:
    row = explanation(change={"config_add": {"sliding_window": 1}}, when=["tokens > 1"])
    table = Explanations(format=1, explanation=[row])
    found = known_divergence(evidence(real("mistral/window-7")), table, RELEASE)
    assert isinstance(found, NotExplained) and "it explains nothing" in found.why


@pytest.mark.thorough
@pytest.mark.parametrize("version", ["0.1.6", "0.1.10", "0.1.24", "0.2.2"])
def test_every_divergence_of_a_release_is_explained_by_a_needed_row(version: str, tmp_path: Path) -> None:
    result = run(RunOptions(f"stored:{version}", out=tmp_path), lambda count: Progress())
    assert result.verdict is Verdict.KNOWN and result.stale == [] and result.gone == {}
    other = [case for case in result.cases if case.status is not Status.PASS]
    assert other and all(case.status is Status.KNOWN for case in other)
    assert all(case.explained is not None for case in other if case.outcome is Outcome.DIVERGES)


def judgement(applicable: tuple[str, ...], ids: list[str]) -> Judgement:
    """A case to which explanations apply, and which is explained by ``ids``; it agrees where there is none."""
    tensor = TensorResult(
        "logits", Status.FAIL if ids else Status.PASS, position_ratio=1e6 if ids else 1.0, compared=1
    )
    case = CaseResult("llama/v5", "llama", "", Status.KNOWN if ids else Status.PASS, "", [tensor])
    case.explained = Explained(ids, "says", "change", {"logits": 1.0}) if ids else None
    return Judgement(case, applicable=applicable)


FAILS = CaseResult("mistral/v5", "mistral", "", Status.FAIL, "")
ONLY_TWO = Explanations(format=1, explanation=[row for row in TABLE.explanation if row.id in ("CMI001", "CMI006")])


@pytest.mark.parametrize(
    ("identity", "judgements", "whole", "stale", "gone"),
    [
        (RELEASE, [judgement(("CMI001",), ["CMI001"]), judgement(("CMI006",), ["CMI006"])], True, [], {}),
        (RELEASE, [judgement(("CMI001",), ["CMI001"]), judgement(("CMI006",), [])], True, ["CMI006"], {}),
        (RELEASE, [judgement(("CMI001",), ["CMI001"])], False, [], {}),
        (CHECKOUT, [judgement(("CMI001",), ["CMI001"]), judgement(("CMI006",), [])], True, [], {"CMI006"}),
        (CHECKOUT, [judgement(("CMI001", "CMI006"), ["CMI006"])], True, [], {"CMI001"}),
        (CHECKOUT, [judgement(("CMI001",), ["CMI001"]), judgement(("CMI001",), [])], True, [], {}),
        (NEWER, [judgement(("CMI001",), ["CMI001"]), judgement(("CMI006",), [])], True, [], {"CMI006"}),
        (CHECKOUT, [judgement(("CMI001",), []), Judgement(FAILS, applicable=("CMI001",))], True, [], {}),
    ],
    ids=[
        "needed",
        "never needed",
        "a part of the cases",
        "mended",
        "one of two mended",
        "mended in one case alone",
        "newer release",
        "right in one case, and another fails",
    ],
)
def test_an_explanation_that_no_case_needs_is_stale_in_a_release_and_gone_from_a_checkout(
    identity: CandleMi, judgements: list[Judgement], whole: bool, stale: list[str], gone: set[str]
) -> None:
    result = RunResult("", {}, {}, [], {}, baseline="0.2.2")
    hold_table(judgements, ONLY_TWO, identity, result, whole)
    assert [line.split()[0] for line in result.stale] == stale and set(result.gone) == set(gone)


SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def test_what_another_release_did_is_tried_without_its_words(tmp_path: Path) -> None:
    there = changed(tmp_path / "model", real("llama/rope-linear"), {"rope_scaling": None})
    found = replace(evidence(there), release="0.2.2")
    assert not any(row.id == "CMI003" for one in hypotheses(found, TABLE, "logits", cache_root()) for row in one.rows)
    assert searched(there).explained is not None


def test_a_refusal_is_known_by_its_stage_and_its_whole_message() -> None:
    subject = real("llama/rope-yarn").subject
    message = (
        "config error: unsupported rope_scaling type \"yarn\" (candle-mi implements 'linear', 'llama3', and "
        "'longrope'); see ROADMAP.md §3.3 for status"
    )
    found, _ = known_refusal(EmitterError("model", message), subject, TABLE, "0.2.2")
    assert found is not None and found.ids == ["CMI030"]
    others = [("forward", message), ("model", f"config error: x: {message}"), ("model", "unsupported activation")]
    for stage, text in others:
        assert known_refusal(EmitterError(stage, text), subject, TABLE, "0.2.2")[0] is None, text
    elsewhere = real("llama/hub").subject
    assert known_refusal(EmitterError("model", message), elsewhere, TABLE, "0.2.2")[0] is None, "it does not apply"


def test_every_hypothesis_of_a_case_changes_something_and_is_tried_once() -> None:
    there = real("llama/hub")
    ideas = hypotheses(evidence(there), TABLE, "blocks.0.attn.hook_scores", cache_root())
    keys = [idea.change.key() for idea in ideas]
    assert len(set(keys)) == len(keys) > 60 and PLAIN.key() not in keys
    assert ideas[0].rows, "listed explanations come first"
    assert Search(evidence(there), "blocks.0.attn.hook_scores", 0.0).run(ideas) is None, "no time is left"


@pytest.mark.parametrize(("digits", "known_as"), [(None, "CMI042"), (0.02, "")])
def test_a_layer_norm_in_one_pass_is_explained_and_a_wrong_one_is_not(
    digits: float | None, known_as: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, mean(x²) − mean(x)² rounds by more than a LayerNorm does, and a wrong variance is further off."""
    there = real("starcoder2/embedding-mean")

    def one_pass(x: torch.Tensor, shape: Any, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x.square().mean(-1, keepdim=True) - mean.square()) * (1 if digits is None else 1 + digits)
        return (x - mean) * torch.rsqrt(variance + eps) * weight + bias

    monkeypatch.setattr(torch.nn.functional, "layer_norm", one_pass)
    arrays = rerun(there, there.subject.model_dir)
    monkeypatch.undo()
    found, why = known(there, arrays)
    assert (found.ids if found is not None else why) == [known_as] if known_as else "differ" in why


def as_float32(there: Real, change: Counterfactual) -> Arrays:
    """What a candidate computes that does just what the counterfactual says, rounded once."""
    values = there.oracle.under(change).truth().tensors
    return {name: tensor.value.astype(there.arrays[name].dtype) for name, tensor in values.items()}


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("starcoder2/norm-type", "CMI014"),
        ("mistral/edit-steer-twice", "CMI045"),
        ("qwen3/edit-steer-set-twice", "CMI045"),
        ("gemma2/is-causal-null", "CMI046"),
    ],
)
def test_a_fault_on_top_of_what_no_config_says_is_not_excused(case: str, name: str) -> None:
    there = real(case)
    rows = TABLE.applicable(facts_of(there.subject), "0.2.2")
    arrays = as_float32(there, combined(rows))
    found, why = known(there, arrays)
    assert found is not None and name in found.ids, why
    for tensor in ("blocks.0.hook_mlp_out", "logits"):
        spoilt = {key: array * np.float32(1.001) if key == tensor else array for key, array in arrays.items()}
        found, why = known(there, spoilt)
        assert found is None and f"first {tensor} " in why, why


def test_a_fault_on_top_of_an_sae_that_is_read_otherwise_is_not_excused(tmp_path: Path) -> None:
    there = real("llama/sae-activation-fn")
    assert there.subject.sae_file is not None
    shutil.copytree(there.subject.sae_file, tmp_path / "sae")
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps({k: v for k, v in cfg.items() if k != "activation_fn"}))
    relu = replace(there.subject, sae_file=tmp_path / "sae")
    with TorchSource() as source:
        emitted = source.trace(relu, "free", there.truth, there.inputs)
    candidate = replace(there, emitted=emitted)
    found, why = known(candidate)
    assert found is not None and found.ids == ["CMI043"], why
    arrays = candidate.arrays
    arrays["sae.features"] *= np.float32(1.001)
    found, why = known(candidate, arrays)
    assert found is None and "first sae.features " in why, why
