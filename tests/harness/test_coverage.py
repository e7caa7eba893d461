"""Every fixture and stored file is used, and what nothing compares is listed here. The sets must be equal."""

import json
import re
import tomllib

import pytest

from candle_mi_parity.candidate.spelling import stored_releases
from candle_mi_parity.models.tokenizers import FILES
from candle_mi_parity.spec.cases import FixtureModel, SaeFile, TinyModel, load_cases, select
from candle_mi_parity.spec.explanations import load_explanations
from candle_mi_parity.spec.families import MAPPED, RECURRENT
from candle_mi_parity.spec.hook_points import LAYER_POINTS, RECURRENT_POINTS
from candle_mi_parity.spec.paths import FIXTURES, OUTPUTS, ROOT
from candle_mi_parity.trace.release import StoredRelease, short_digest
from tests.support.goldens import has_golden
from validation.source_faults import released_crate

CASES = load_cases()
DEFAULT = select(CASES, [])
VERSIONS = stored_releases(OUTPUTS)

NOT_READ = {"a2d-llama"}
"""Model types with a hook map that candle-mi 0.2.2 does not have."""

NO_MODEL = {"Custom"}
"""Hook points of candle-mi 0.2.2 that no model here fires: names that a user gives."""


def candle_mi_source(name: str) -> str:
    """A source file of candle-mi 0.2.2, which cargo unpacks where no build has done so yet."""
    return (released_crate() / "src" / name).read_text(encoding="utf-8")


def test_every_fixture_file_belongs_to_something() -> None:
    tiny = {case.model.config for case in CASES if isinstance(case.model, TinyModel)}
    saes = {case.sae.path for case in CASES if isinstance(case.sae, SaeFile) and case.sae.repo is None}
    goldens = {case.id.replace("/", "-") for case in DEFAULT if has_golden(case)}
    quantized = {
        f"{case.model.path}/{name}"
        for case in CASES
        if isinstance(case.model, FixtureModel)
        for name in ("config.json", "model.safetensors", "dequantized.json")
    }
    used = tiny | saes | quantized | {f"goldens/{name}{suffix}" for name in goldens for suffix in (".npz", ".json")}
    tables = {"cases.toml", "explanations.toml", "config_fields.toml", "census.toml", "texts.json"}
    tables |= {"calls.toml", "known_calls.toml", "tokenizers.toml", "hunt.toml", "transformer_lens.toml"}
    makers = {
        "vocabularies/rwkv_vocab_v20230424.txt.xz",
        "saes/README.md",
        "saes/make_tiny.py",
        "quantized/make.py",
    } | {f"tokenizer/{name}" for name in FILES}
    there = {
        str(path.relative_to(FIXTURES)) for path in FIXTURES.rglob("*") if path.is_file() and path.suffix != ".pyc"
    }
    assert there == used | tables | makers


@pytest.mark.parametrize("version", VERSIONS)
def test_every_case_is_stored_and_every_stored_outcome_is_of_a_case(version: str) -> None:
    stored = StoredRelease(OUTPUTS / f"{version}.json").release
    assert set(stored.cases) == {case.id for case in DEFAULT}
    assert all(case.free is not None for case in stored.cases.values()) and stored.calls and stored.tokens


def test_every_stored_file_is_in_an_index_and_has_its_digest() -> None:
    traces = OUTPUTS / "traces"
    there = {path for path in traces.rglob("*") if path.is_file()}
    named = {
        traces / name for version in VERSIONS for name in StoredRelease(OUTPUTS / f"{version}.json").release.files()
    }
    tensors = {path.with_name(e["file"]) for path in named for e in json.loads(path.read_text()).get("tensors", [])}
    assert there == named | tensors and set(load_explanations().releases) == set(VERSIONS)
    assert [path for path in there if path.suffixes[-2] != f".{short_digest(path.read_bytes())}"] == []


@pytest.mark.rust
def test_every_model_type_of_candle_mi_has_a_family() -> None:
    for file, constant, known in (
        ("config.rs", "SUPPORTED_MODEL_TYPES", set(MAPPED) - NOT_READ),
        ("rwkv/config.rs", "SUPPORTED_RWKV_MODEL_TYPES", set(RECURRENT)),
    ):
        block = re.search(rf"{constant}: &\[&str\] = &\[(.*?)\];", candle_mi_source(file), re.DOTALL)
        assert block
        assert set(re.findall(r'"([^"]+)"', block.group(1))) == known
    assert {case.family for case in DEFAULT} >= {*MAPPED, *RECURRENT}


@pytest.mark.rust
def test_every_hook_point_of_candle_mi_is_compared_or_has_a_reason() -> None:
    source = candle_mi_source("hooks.rs")
    block = re.search(r"pub enum HookPoint \{(.*?)\n\}", source, re.DOTALL)
    assert block
    variants = set(re.findall(r"^    ([A-Z]\w+)(?:\(\w+\))?,", block.group(1), re.MULTILINE))
    camel = {
        "".join(word.title() for word in re.split(r"[._]", point.replace("hook_", "")))
        for point in (*LAYER_POINTS, *RECURRENT_POINTS)
    }
    assert variants == camel | {"Embed", "FinalNorm"} | NO_MODEL


def test_every_comparison_in_the_list_of_public_functions_exists() -> None:
    text = (ROOT / "docs" / "public-functions.md").read_text(encoding="utf-8")
    calls = {row["fn"] for row in tomllib.loads((FIXTURES / "calls.toml").read_text(encoding="utf-8"))["call"]}
    assert set(re.findall(r"call:(\w+)", text)) == calls
    edits = {edit.kind for case in DEFAULT for edit in case.edits}
    assert set(re.findall(r"edit:([a-z_]+)", text)) == edits
    assert set(re.findall(r"loader:([a-z_]+)", text)) == {case.loader for case in DEFAULT} - {"hf"}
