"""Inputs on which the suite once gave a wrong verdict (public cases), each beside an input that must pass."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.compare.run_result import RunResult
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.files.versions import is_at_least
from candle_mi_parity.judge.case import Progress, judge_case
from candle_mi_parity.judge.notes import padding_notes
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.oracle import compute, hooks
from candle_mi_parity.oracle.hooks import forward, load_model
from candle_mi_parity.oracle.streaming import load_streamed
from candle_mi_parity.report import page, report_model, tables, views_ci
from candle_mi_parity.spec.cases import Case, TinyModel
from candle_mi_parity.spec.edits import Zero
from candle_mi_parity.spec.explanations import NOTHING_KNOWN
from tests.support.planting import CASES, ChangeWeights, Weights, local
from tests.support.results import VERSIONS, shown


def tiny(family: str, **settings: Any) -> Case:
    """A case of a generated model."""
    model = TinyModel(source="tiny", config=f"models/{family}.json", **{"dialect": "hub", **settings})
    return CASES[f"{family}/hub"].model_copy(update={"id": f"{family}/tried", "model": model})


@pytest.fixture
def judged(tmp_path: Path) -> Callable[[Case], CaseResult]:
    """Judge a case with torch in float32 as the candidate."""

    def judge(case: Case) -> CaseResult:
        with TorchSource() as source:
            return judge_case(case, source, "torch", tmp_path / "cache", NOTHING_KNOWN, Progress()).result

    return judge


Judged = Callable[[Case], CaseResult]


# --- E2: a tensor that is missing from the checkpoint


def without(name: str) -> ChangeWeights:
    return lambda weights: weights.pop(name)


BIAS = "model.layers.1.self_attn.k_proj.bias"


@pytest.mark.parametrize(
    ("family", "change", "config", "message"),
    [
        ("qwen3", None, {"tie_word_embeddings": ...}, "lacks lm_head.weight, which transformers would initialise"),
        ("llama", without("lm_head.weight"), {}, "lacks lm_head.weight, which transformers would initialise"),
        ("qwen2", without(BIAS), {}, f"lacks {BIAS}"),
        ("llama", None, {"num_hidden_layers": 4}, "(and 6 more), which transformers would initialise"),
        ("llama", None, {"num_key_value_heads": 1}, "k_proj.weight has shape (40, 64), expected (20, 64)"),
    ],
)
def test_a_checkpoint_with_missing_tensors_has_no_truth(
    judged: Judged, tmp_path: Path, family: str, change: ChangeWeights | None, config: dict[str, Any], message: str
) -> None:
    found = judged(local(tmp_path / "model", family, change, **config))
    assert found.status is Status.ERROR and message in found.error, found.error
    assert found.error.endswith("at random: there is no truth") and not found.tensors


@pytest.mark.every(3)
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_a_complete_checkpoint_passes(judged: Judged, tmp_path: Path, family: str) -> None:
    found = judged(local(tmp_path / "model", family))
    assert (found.status, found.notes) == (Status.PASS, []), found.message()


def test_a_tensor_that_transformers_ignores_is_noted(judged: Judged, tmp_path: Path) -> None:
    def more(weights: Weights) -> None:
        weights["model.layers.0.self_attn.q_proj.bias"] = np.ones(80, np.float32)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(10, np.float32)

    found = judged(local(tmp_path / "model", "llama", more))
    assert found.status is Status.PASS
    (note,) = found.notes
    assert note.startswith("transformers ignores model.layers.0.self_attn.q_proj.bias in the files")


# --- E4: two models that compute only zeros agree


def zeroed(part: str) -> ChangeWeights:
    """Fill the weights that have this in their names with 0."""
    return lambda weights: weights.update({name: 0 * weights[name] for name in weights if part in name})


def test_a_model_that_computes_only_zeros_is_unmeasured(judged: Judged, tmp_path: Path) -> None:
    edited = tiny("llama", change={"num_hidden_layers": 1})
    cases = {
        "39 of 42": local(tmp_path / "all", "llama", zeroed("")),
        "29 of 42": local(tmp_path / "norms", "llama", zeroed("norm")),
        "": edited.model_copy(update={"edits": [Zero(kind="zero", hook="hook_embed")]}),
    }
    for count, case in cases.items():
        found = judged(case)
        assert found.status is Status.UNMEASURED, found.message()
        assert count in found.error and "tensors are 0 everywhere: nothing was exercised" in found.error


def test_one_layer_of_zeros_is_noted(judged: Judged, tmp_path: Path) -> None:
    found = judged(local(tmp_path / "model", "llama", zeroed("layers.1.input_layernorm")))
    notes = [note for note in found.notes if note.startswith("not exercised: blocks.1.attn.hook_q, ")]
    assert found.status is Status.PASS and "0 everywhere" in notes[0]


@pytest.mark.parametrize("name", ["llama/edit-zero-attention", "llama/edit-zero-stream"])
def test_a_hook_that_an_edit_zeroes_is_not_noted(judged: Judged, name: str) -> None:
    found = judged(CASES[name])
    assert (found.status, found.notes) == (Status.PASS, [])


# --- E6: a fault of the input is not reported as a fault of the suite

SLIDING = {"layer_types": ["sliding_attention"] * 3}
NO_LOW = {"rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ROTARY = {"partial_rotary_factor": 0.5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}

UNRUNNABLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "no head_dim": ("qwen3", {"head_dim": None}, "head_dim"),
    "llama3 scaling without its low frequency": ("llama", {"rope_scaling": NO_LOW}, "low_freq_factor"),
    "odd head_dim": ("llama", {"head_dim": 15}, "even rotary dimension"),
    "partial rotary that the family does not implement": ("llama", ROTARY, "size of tensor a"),
    "sliding layers without a window": ("qwen2", SLIDING, "sliding_window"),
    "unknown kind of layer": ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "KeyError: 'chunked_attention'"),
    "unknown activation": ("llama", {"hidden_act": "nope"}, "it does not know the hidden_act 'nope'"),
    "heads that do not divide the width": ("llama", {"num_attention_heads": 7}, "not a multiple"),
    "padding id outside the vocabulary": ("llama", {"pad_token_id": 500}, "Padding_idx"),
    "a string for a number": ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps"),
}


@pytest.mark.parametrize("name", UNRUNNABLE)
@pytest.mark.every(3)
def test_a_config_that_transformers_cannot_run_is_an_input_error(judged: Judged, tmp_path: Path, name: str) -> None:
    family, config, message = UNRUNNABLE[name]
    found = judged(local(tmp_path / "model", family, **config))
    if name == "odd head_dim" and not is_at_least("transformers", 5, 17):
        pytest.skip(f"this transformers looks at the weights first: {found.error}")
    assert found.status is Status.ERROR
    assert found.error.startswith("transformers cannot run this config: ") and message in found.error, found.error


@pytest.mark.parametrize("dialect", ["hub", "v5"])
def test_a_config_from_which_no_model_can_be_generated_is_an_input_error(judged: Judged, dialect: str) -> None:
    found = judged(tiny("qwen3", dialect=dialect, null=["head_dim"]))
    assert found.error.startswith("transformers cannot run this config: "), found.error


def test_a_config_that_transformers_reads_as_another_class_names_both(judged: Judged, tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention", "full_attention"]
    found = judged(local(tmp_path / "model", "mistral", layer_types=types, sliding_window=8))
    assert found.status is Status.ERROR
    assert "its `layer_types`: model_type is 'mistral', and the model that it makes is a 'ministral'" in found.error


@pytest.mark.parametrize("place", ["model", "truth"])
def test_a_fault_of_the_suite_is_internal(
    judged: Judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The same exceptions, raised by the suite on a config that transformers runs."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("The size of tensor a (20) must match the size of tensor b (10)")

    monkeypatch.setattr(*{"model": (hooks, "mode_for"), "truth": (compute, "sample")}[place], broken)
    found = judged(local(tmp_path / "model"))
    assert found.error.startswith("internal: RuntimeError: The size of tensor a"), found.error


# --- E7: a config that says which attention to use


@pytest.mark.every(4)
@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize(
    "value", ["sdpa", "eager", "flash_attention_2", "flex_attention", "someone/kernels", {"": "sdpa"}, None], ids=str
)
def test_a_config_does_not_choose_the_attention(tmp_path: Path, key: str, value: Any) -> None:
    directory = prepare(local(tmp_path / "model", "llama", None, **{key: value}), tmp_path).model_dir
    for model in (load_model(directory, torch.float32), load_streamed(directory, torch.float32)):
        assert "blocks.2.attn.hook_scores" in forward(model, torch.tensor([[1, 5]])).tensors


# --- E10: a stale copy of a tensor in another shard


def sharded(directory: Path, *, twice: bool) -> Case:
    case = local(directory)
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, copied = sorted(weights), "model.layers.1.mlp.up_proj.weight"
    shards = {
        f"model-0000{i + 1}-of-00002.safetensors": {name: weights[name] for name in names[i::2]} for i in range(2)
    }
    index = {name: file for file, held in shards.items() for name in held}
    if twice:
        other = next(held for held in shards.values() if copied not in held)
        other[copied] = weights[copied] + 1
    for file, held in shards.items():
        save_file(held, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return case


def test_an_index_that_transformers_cannot_read_is_an_input_error(judged: Judged, tmp_path: Path) -> None:
    case = sharded(tmp_path / "model", twice=False)
    path = tmp_path / "model" / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": json.loads(path.read_text())["weight_map"]}))
    found = judged(case)
    assert found.error == f"transformers cannot load these weights: {tmp_path / 'model'}: KeyError: 'metadata'"


def test_a_tensor_in_two_shards_is_refused_before_a_truth_is_computed(judged: Judged, tmp_path: Path) -> None:
    found = judged(sharded(tmp_path / "model", twice=True))
    assert found.status is Status.ERROR
    assert "mlp.up_proj.weight is in model-00001-of-00002.safetensors and in model-00002-of" in found.error
    assert "which copy is used depends on the reader" in found.error
    assert not (tmp_path / "cache" / "truth").exists()
    shutil.rmtree(tmp_path / "model")
    assert judged(sharded(tmp_path / "model", twice=False)).status is Status.PASS


# --- E11: padding


@pytest.mark.parametrize(
    ("tokens", "config", "message"),
    [
        ([0, 0, 0, 1, 5, 9], {"pad_token_id": 0}, "3 at the left"),
        ([1, 5, 9, 0, 0], {"pad_token_id": 0}, "2 at the right"),
        ([0, 1, 5, 0], {"pad_token_id": 0}, "1 at the left, 1 at the right"),
        ([1, 1, 1, 5, 9], {"pad_token_id": 1, "bos_token_id": 1}, "2 at the left"),
        ([1, 5, 9, 2, 2], {"pad_token_id": 2, "eos_token_id": [2, 7]}, "1 at the right"),
        ([1, 5, 0, 9, 7], {"pad_token_id": 0}, ""),
        ([0, 0, 1, 5, 9], {"pad_token_id": None}, ""),
        ([1, 5, 9, 2], {"pad_token_id": 2, "eos_token_id": 2}, ""),
        ([1, 5, 9, 7], {"pad_token_id": 1, "bos_token_id": 1}, ""),
    ],
)
def test_padding_fed_as_tokens_is_noted(
    tmp_path: Path, tokens: list[int], config: dict[str, Any], message: str
) -> None:
    case = local(tmp_path / "model", **config).model_copy(update={"tokens": tokens})
    notes = padding_notes(prepare(case, tmp_path))
    start = f"the prompt holds the padding id {config['pad_token_id']} ({message}) as plain tokens: candle-mi takes"
    assert len(notes) == bool(message) and all(note.startswith(start) for note in notes)


def test_the_note_on_padding_is_in_every_view(judged: Judged, tmp_path: Path) -> None:
    found = judged(local(tmp_path / "model", pad_token_id=0).model_copy(update={"tokens": [0, 0, 1, 5, 9]}))
    assert found.status is Status.PASS and len(found.notes) == 1
    run = RunResult("torch", {}, VERSIONS, [found], {})
    terminal, document = shown(partial(tables.run_tables, run)), json.dumps(report_model.document(run))
    assert all("as plain tokens" in view for view in (page.render(run), views_ci.summary(run), terminal, document))
    found.notes = []
    assert "as plain tokens" not in page.render(run)


# --- a value beyond the candidate's own format


def loud(up: float, down: float) -> ChangeWeights:
    """Scale two weights: where ``down`` is small, no hook point holds the large values."""

    def change(weights: Weights) -> None:
        weights["model.layers.1.mlp.up_proj.weight"] *= up
        weights["model.layers.1.mlp.down_proj.weight"] *= down

    return change


@pytest.mark.parametrize("change", [loud(300, 1000), loud(5e4, 0.01)], ids=["at a hook", "between two hooks"])
def test_what_float16_cannot_hold_is_unmeasured(judged: Judged, tmp_path: Path, change: ChangeWeights) -> None:
    case = local(tmp_path / "model", "llama", change)
    found = judged(case.model_copy(update={"dtype": "float16"}))
    assert found.status is Status.UNMEASURED, found.message()
    assert found.error.startswith("blocks.1.mlp.hook_post: the truth's largest value ")
    assert "is beyond float16's range" in found.error
    by_name = {tensor.name: tensor for tensor in found.tensors}
    assert by_name["blocks.1.mlp.hook_pre"].status is Status.PASS, "what comes before is measured"
    assert {tensor.reason for tensor in found.tensors if tensor.status is not Status.PASS} == {"unmeasurable"}
    assert "is beyond float16's range at blocks." in by_name["logits"].detail


def test_a_product_of_queries_and_keys_that_float16_cannot_hold_is_unmeasured(judged: Judged, tmp_path: Path) -> None:
    """The scores are these products times a factor below 1, and may be within the range themselves."""

    def change(weights: Weights) -> None:
        weights["model.layers.1.self_attn.q_proj.weight"] *= 100
        weights["model.layers.1.self_attn.k_proj.weight"] *= 80

    found = judged(local(tmp_path / "model", "llama", change).model_copy(update={"dtype": "float16"}))
    assert found.status is Status.UNMEASURED, found.message()
    assert found.error.startswith("blocks.1.attn.hook_scores: the truth's largest value ")
    by_name = {tensor.name: tensor for tensor in found.tensors}
    assert by_name["blocks.1.attn.hook_k"].status is Status.PASS


def test_what_the_format_holds_is_measured(judged: Judged, tmp_path: Path) -> None:
    for dtype, up, down in (("float16", 300, 10), ("float16", 1000, 0.01), ("float32", 300, 1000)):
        case = local(tmp_path / f"{dtype}-{up}", "llama", loud(up, down))
        found = judged(case.model_copy(update={"dtype": dtype}))
        assert found.status is Status.PASS, found.message()


def test_a_weight_that_float16_cannot_hold_is_unmeasured(judged: Judged, tmp_path: Path) -> None:
    def change(weights: Weights) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = -7e4

    found = judged(local(tmp_path / "model", "llama", change).model_copy(update={"dtype": "float16"}))
    assert found.status is Status.UNMEASURED
    assert found.error == "model.layers.1.mlp.up_proj.weight holds 7e+04, which is beyond float16's range"
