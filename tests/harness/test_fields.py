"""The config-field ledger holds, and each kind of wrong row is detected."""

from pathlib import Path

import pytest
import transformers
from transformers import LlamaConfig, modeling_rope_utils
from transformers.models.llama.modeling_llama import LlamaMLP

from candle_mi_parity.coverage.field_check import COVERING, NO_EFFECT, check
from candle_mi_parity.coverage.fields import CoveredField, FieldError, FieldLedger, FieldRow, WaivedField, load_fields
from candle_mi_parity.coverage.sensitivity import effect
from candle_mi_parity.errors import LibraryError
from candle_mi_parity.models.resolve import model_directory
from candle_mi_parity.oracle.fields_read import fields_read
from candle_mi_parity.spec.cases import Case, Setting
from candle_mi_parity.spec.families import FAMILIES
from candle_mi_parity.spec.paths import cache_root
from tests.support.planting import CASES

TABLE = list(CASES.values())


def faults(ledger: FieldLedger, family: str = "llama", cases: list[Case] = TABLE) -> dict[str, str]:
    """Field → fault of the rows that do not hold; they are of a transformers that can run every case."""
    try:
        found = check(ledger, cases, cache_root(), [family])
    except LibraryError as error:
        pytest.skip(str(error))
    return {row.field: row.fault for row in found if row.fault}


def planted(field: str, row: FieldRow | None, family: str = "llama") -> FieldLedger:
    """The real ledger with one row of a family replaced, or taken away from the family and the common table."""
    ledger = load_fields()
    common, own = dict(ledger.common), dict(ledger.family.get(family, {}))
    if row is None:
        common.pop(field, None)
        own.pop(field, None)
    else:
        own[field] = row
    return ledger.model_copy(update={"common": common, "family": {**ledger.family, family: own}})


def no_effect(other: Setting) -> WaivedField:
    return WaivedField(kind="no_effect", other=other, reason="planted")


@pytest.mark.thorough
def test_every_field_that_transformers_reads_is_covered_as_the_ledger_says() -> None:
    found = check(load_fields(), TABLE, cache_root())
    assert not [finding for finding in found if finding.fault]
    assert {finding.family for finding in found} == set(FAMILIES)
    covered = [finding for finding in found if "/" in finding.cover and ":" not in finding.cover]
    assert len(covered) > 200 and all(finding.ratio and finding.ratio > COVERING for finding in covered)


@pytest.mark.thorough
def test_a_common_row_that_no_family_uses_fails() -> None:
    ledger = load_fields()
    ledger = ledger.model_copy(update={"common": {**ledger.common, "nonsense": no_effect(1.0)}})
    found = {finding.field: finding for finding in check(ledger, TABLE, cache_root()) if finding.fault}
    assert set(found) == {"nonsense"} and "stale" in found["nonsense"].fault


STRUCTURAL = WaivedField(kind="structural", other=True, reason="planted")
REFUSED = WaivedField(kind="refused", other=True, reason="planted")
WRONG: dict[str, tuple[str, FieldRow | None, str]] = {
    "unlisted": ("rms_norm_eps", None, "unlisted"),
    "unlisted rotary key": ("rope_parameters.low_freq_factor", None, "unlisted"),
    "read by nobody": ("attn_logit_softcapping", no_effect(1.0), "stale"),
    "part of a name": ("intermediate", no_effect(1.0), "stale"),
    "at the default": ("hidden_act", CoveredField(covered_by="llama/hub"), "changes the truth by only 0"),
    "too near": (
        "rms_norm_eps",
        CoveredField(covered_by="llama/norm-eps", against=0.001000001),
        "changes the truth by only",
    ),
    "not set": ("rope_parameters.low_freq_factor", CoveredField(covered_by="llama/hub"), "does not set it"),
    "no such case": ("rms_norm_eps", CoveredField(covered_by="llama/nowhere"), "no such generated case"),
    "another family's": ("rms_norm_eps", CoveredField(covered_by="qwen2/norm-eps"), "no such generated case"),
    "needed": ("rope_parameters.factor", CoveredField(covered_by="llama/rope-linear"), "no ratio: refused"),
    "structural": ("head_dim", CoveredField(covered_by="llama/hub"), "no ratio: structural"),
    "no effect, but it changes numbers": ("rms_norm_eps", no_effect(0.001), "not no_effect"),
    "no effect, but it changes shapes": ("head_dim", no_effect(32), "not no_effect"),
    "no effect, but it is refused": ("return_dict", no_effect(False), "not no_effect"),
    "structural, but it changes numbers": ("attention_bias", STRUCTURAL, "not structural"),
    "refused, but it is accepted": ("mlp_bias", REFUSED, "not refused"),
}


@pytest.mark.every(4)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_fails_and_no_other_row_does(name: str) -> None:
    field, row, fault = WRONG[name]
    found = faults(planted(field, row))
    assert set(found) == {field} and fault in found[field]


def test_a_rope_type_without_a_case_fails_and_one_listed_as_refused_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    known = modeling_rope_utils.ROPE_INIT_FUNCTIONS
    monkeypatch.setattr(modeling_rope_utils, "ROPE_INIT_FUNCTIONS", {**known, "spiral": known["linear"]})
    assert faults(load_fields()) == {"rope_parameters = spiral": "no case has this rope type"}
    monkeypatch.undo()
    ledger = load_fields()
    without = [case for case in TABLE if case.id != "mistral/rope-llama3"]
    assert "rope_parameters = llama3" in faults(ledger, "mistral", without)
    ledger = ledger.model_copy(update={"refused_ropes": {**ledger.refused_ropes, "mistral": ["llama3"]}})
    assert faults(ledger, "mistral", without)["rope_parameters = llama3"] == "not refused: moved"


def test_fields_are_recorded_from_what_the_code_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = model_directory(CASES["llama/rope-llama3"].model, cache_root())
    before = fields_read(directory)
    assert {"rms_norm_eps", "rope_scaling", "rope_parameters.high_freq_factor", "pad_token_id"} <= before
    assert not {"model_type", "to_dict", "base_model_tp_plan", "eos_token_id", "_attn_implementation"} & before

    honest = LlamaMLP.__init__

    def newer(self: LlamaMLP, config: LlamaConfig) -> None:
        honest(self, config)  # type: ignore[no-untyped-call]
        getattr(config, "brand_new_field", None)

    monkeypatch.setattr(LlamaMLP, "__init__", newer)
    library = Path(str(transformers.__file__)).parent  # a read counts only when transformers' own code makes it
    assert "brand_new_field" not in fields_read(directory)
    newer.__code__ = newer.__code__.replace(co_filename=str(library / "newer.py"))
    assert fields_read(directory) - before == {"brand_new_field"}
    assert "__getattribute__" not in vars(LlamaConfig), "the class is left as it was"


def test_effect_is_in_units_of_noise() -> None:
    case = CASES["llama/norm-eps"]
    assert effect(case, {"rms_norm_eps": 0.001}, cache_root()).ratio <= NO_EFFECT
    small = effect(case, {"rms_norm_eps": 0.001 * (1 + 1e-4)}, cache_root())
    large = effect(case, {"rms_norm_eps": 0.001 * (1 + 1e-3)}, cache_root())
    assert small.outcome == large.outcome == "moved"
    assert large.ratio / small.ratio == pytest.approx(10, rel=0.05), "the effect is linear where it is small"
    assert large.detail.startswith("blocks.0.")


BAD = {
    "neither": "a = { }",
    "unknown kind": 'a = { kind = "boring", other = 1, reason = "x" }',
    "no other value": 'a = { kind = "no_effect", reason = "x" }',
    "both": 'a = { covered_by = "a/b", kind = "no_effect", other = 1, reason = "x" }',
    "twice": 'a = { covered_by = "a/b" }\na = { covered_by = "a/b" }',
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_row_is_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "config_fields.toml"
    path.write_text(f"format = 1\n[refused_ropes]\n[family]\n[common]\n{BAD[name]}\n")
    with pytest.raises(FieldError) as caught:
        load_fields(path)
    assert "\n" not in str(caught.value)
