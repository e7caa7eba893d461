"""A model directory that ``check`` cannot use: one sentence on what was found, what was expected, and where."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.errors import ModelError, ParityError
from candle_mi_parity.judge.notes import other_ids, truncation_notes
from candle_mi_parity.models.dequantize import quantization_of
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.models.resolve import model_directory
from candle_mi_parity.report.check_page import foretold_lines, lines
from candle_mi_parity.run.check import CheckOptions, check, foretold
from candle_mi_parity.run.check_files import require_usable, tokenizer_fault
from candle_mi_parity.run.check_findings import unknown_keys
from candle_mi_parity.run.check_inputs import Prompt
from candle_mi_parity.spec.cases import (
    Case,
    FixtureModel,
    Layout,
    LocalModel,
    Model,
    PackedModel,
    TinyModel,
    load_cases,
    select,
)
from candle_mi_parity.spec.paths import cache_root

TINY = TinyModel(source="tiny", config="models/llama.json", dialect="hub", layout=[Layout.TOKENIZER])
NF4 = FixtureModel(source="fixture", path="quantized/nf4")
WEIGHTS = "model.safetensors"


def packed(id: str) -> Model:
    [case] = select(load_cases(), [id])
    return case.model


def copied(model: Model, tmp_path: Path) -> Path:
    shutil.copytree(model_directory(model, cache_root()), out := tmp_path / "model")
    return out


def configured(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((model / "config.json").read_text())
    change(config)
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "model.safetensors: it has no bytes, and a safetensors file begins with 8 that give the length of its"),
        (5, "model.safetensors: it has 5 bytes, and a safetensors file begins with 8"),
        (100, "model.safetensors: it is cut off: its header has 3072 bytes, and the file has 92 after the first 8"),
        (200_000, "it is cut off: its header describes 625920 bytes of tensors, and 196920 follow it"),
    ],
)
def test_a_file_that_is_cut_off(length: int, message: str, tmp_path: Path) -> None:
    model = copied(TINY, tmp_path)
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:length])
    with pytest.raises(ModelError, match=r"^[^\n]*$") as raised:
        require_usable(model)
    assert message in str(raised.value) and str(model) in str(raised.value)


QUANTIZED = "quantization_config"


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (TINY, lambda config: config.pop("model_type"), 'there is no model_type, expected the name of an'),
        (TINY, lambda config: config.update(model_type=None), "model_type is null, expected the name"),
        (TINY, lambda config: config.update({QUANTIZED: "awq"}), 'it is "awq", expected an object'),
        (TINY, lambda config: config.update({QUANTIZED: {"quant_method": "awq"}}), "files hold plain weights alone"),
        (NF4, lambda config: config.pop(QUANTIZED), "there is no quantization_config, and the files hold 4-bit"),
        (NF4, lambda config: config[QUANTIZED].update(quant_method="gptq"), "says gptq, whose weights have tensors"),
        (
            NF4,
            lambda config: config[QUANTIZED].update(load_in_4bit=False, load_in_8bit=True),
            "says bitsandbytes in 8 bits, whose weights have tensors named *.SCB, and the files hold 4-bit weights",
        ),
        (packed("llama/awq-64"), lambda config: config[QUANTIZED].update(bits=8), "says 8 bits, and model.layers."),
        (packed("llama/gptq"), lambda config: config[QUANTIZED].update(bits=8), "is packed in 4: its qzeros has 8"),
        (
            packed("llama/awq-64"),
            lambda config: config[QUANTIZED].update(quant_method="gptq"),
            "says gptq, and the qweight of model.layers.0.mlp.down_proj has 8 columns for 64 outputs, as AWQ packs",
        ),
        (packed("llama/gptq"), lambda config: config[QUANTIZED].update(quant_method="awq"), "as GPTQ packs it; exp"),
        (packed("llama/gptq"), lambda config: config[QUANTIZED].update(bits="4"), 'bits is "4", expected a whole'),
        (packed("llama/gptq"), lambda config: config[QUANTIZED].update(group_size=0), "group_size is 0, expected -1"),
        (
            packed("llama/gptq"),
            lambda config: config[QUANTIZED].update(checkpoint_format="marlin"),
            'checkpoint_format is "marlin", expected one of gptq, gptq_v2',
        ),
        (packed("llama/awq-64"), lambda config: config[QUANTIZED].update(version="gemv"), 'version is "gemv", exp'),
        (
            packed("llama/awq-64"),
            lambda config: config[QUANTIZED].update(group_size=32),
            "group_size 32, which makes 4 groups of the 128 inputs of model.layers.0.mlp.down_proj, and the file has",
        ),
    ],
)  # fmt: skip
def test_a_config_that_contradicts_the_weights(
    model: Model, change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    directory = copied(model, tmp_path)
    require_usable(directory)
    configured(directory, change)
    with pytest.raises(ModelError, match=r"^[^\n]*$") as raised:
        require_usable(directory)
    assert message in str(raised.value) and f"{directory}/config.json: " in str(raised.value)


def test_every_quantised_checkpoint_of_the_cases_is_usable() -> None:
    found = {
        str(case.model): case.model for case in load_cases() if isinstance(case.model, FixtureModel | PackedModel)
    }
    assert len(found) > 20
    for model in found.values():
        require_usable(directory := model_directory(model, cache_root()))
        assert quantization_of(directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "tokenizer.json is empty; expected the file that save_pretrained writes"),
        ('{"version": ', "tokenizer.json is not valid JSON (Expecting value"),
        (
            '{"version": "1.0", "model": {}}',
            "is no tokenizer that the tokenizers library can read (data",
        ),
    ],
)
def test_a_bad_tokenizer(text: str, message: str, tmp_path: Path) -> None:
    model = copied(TINY, tmp_path)
    assert not tokenizer_fault(model)
    (model / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"^[^\n]*$") as raised:
        check(CheckOptions(str(model), (Prompt(id="p", text="the"),), candidate="torch", out=tmp_path / "out"))
    assert message in str(raised.value) and "--tokens takes token ids" in str(raised.value)


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    model = copied(TINY, tmp_path)
    tensors = load_file(model / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5:7] = np.nan
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ParityError) as raised:
        check(CheckOptions(str(model), (Prompt(id="p", tokens=[1, 5]),), candidate="torch", out=tmp_path / "out"))
    assert f"{model}/model.safetensors: {name} holds NaN or infinity in 2 of 9216 numbers, first at [3, 5]" in str(
        raised.value
    )


@pytest.mark.parametrize("key", ["hidden_act", "rope_scaling"])
def test_a_setting_that_transformers_does_not_know_is_one_line(key: str, tmp_path: Path) -> None:
    model = copied(TINY, tmp_path)
    value = {"hidden_act": "none_such", "rope_scaling": {"type": "none_such", "factor": 2.0}}[key]
    told = {"hidden_act": "hidden_act", "rope_scaling": r"rope_scaling\.type"}[key]
    configured(model, lambda config: config.update({key: value}))
    options = CheckOptions(str(model), (Prompt(id="p", tokens=[1, 5]),), candidate="0.2.2", out=tmp_path / "out")
    with pytest.raises(ParityError, match=rf"^transformers cannot run[^\n]*it does not know the {told} 'none_such'$"):
        check(options, opened=TorchSource)


def test_a_tokenizer_that_refuses_a_text_or_gives_no_token_is_one_line(tmp_path: Path) -> None:
    model = copied(TINY, tmp_path)
    case = Case(id="t", model=LocalModel(source="local", path=str(model)), text="the")
    written = json.loads((model / "tokenizer.json").read_text())
    written["model"]["vocab"] = {}
    (model / "tokenizer.json").write_text(json.dumps(written))
    with pytest.raises(ModelError, match=r"^the tokenizer of \S+ refuses 'the': [^\n]*\[UNK\] token"):
        prepare(case, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    (model / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="there is no file of one"):
        prepare(case, tmp_path)


@pytest.mark.parametrize("settings", [{"truncation": 2}, {"truncation": 99}, {"padding": 40}])
def test_a_tokenizer_s_own_truncation_and_padding_are_named(settings: dict[str, int], tmp_path: Path) -> None:
    model = copied(TINY, tmp_path)
    own = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    own.enable_padding(length=40) if "padding" in settings else own.enable_truncation(settings["truncation"])
    own.save(str(model / "tokenizer.json"))
    subject = prepare(
        Case(id="t", model=LocalModel(source="local", path=str(model)), text="the river runs"), tmp_path
    )
    failure, notes = other_ids(subject, own.encode("the river runs").ids), truncation_notes(subject)
    shown = [
        f"tokenizer.json truncates to {length} tokens" for name, length in settings.items() if name == "truncation"
    ]
    assert len(notes) == len(shown) and all(text in note for text, note in zip(shown, notes, strict=True))
    if settings == {"truncation": 99}:
        assert failure is None
        return
    [name] = settings
    assert failure is not None and f"candle-mi obeys the {name} of tokenizer.json" in failure.detail
    other = other_ids(subject, [1, 2])
    assert other is not None and "obeys" not in other.detail


def test_a_whole_file_beside_shards_is_told_where_the_loader_does_not_show_it(tmp_path: Path) -> None:
    beside = model_directory(TINY.model_copy(update={"layout": [Layout.SHARDS_BESIDE]}), cache_root())
    told = [note for note in foretold(CheckOptions(str(beside))).notes if "ask with --loader pretrained" in note]
    assert len(told) == 1
    assert not foretold(CheckOptions(str(beside), loader="pretrained")).notes
    assert not foretold(CheckOptions(str(model_directory(TINY, cache_root())))).notes


@pytest.mark.parametrize(("family", "unknown"), [("rwkv6", []), ("rwkv7", ["hidden_act"])])
def test_keys_of_rwkv_that_a_case_changes_are_not_unknown(family: str, unknown: list[str], tmp_path: Path) -> None:
    model = TinyModel(source="tiny", config=f"models/{family}.json", dialect="hub")
    assert unknown_keys(model_directory(model, cache_root()), family, tmp_path) == unknown


def test_what_no_prompt_shows_is_told_once(tmp_path: Path) -> None:
    options = CheckOptions(
        str(model_directory(TINY, cache_root())), (Prompt(id="p", tokens=[1, 5]),), candidate="0.2.2", out=tmp_path
    )
    result = check(options, opened=TorchSource)
    told = "A prompt longer than max_position_embeddings is refused"
    assert sum(told in line for line in (*foretold_lines(result), *lines(result))) == 1
