"""The table of explanations: its rows, their conditions, and the configs that counterfactuals change."""

from typing import Any

import pytest

from candle_mi_parity.candidate.plan import known_releases
from candle_mi_parity.errors import ExplanationError
from candle_mi_parity.judge.known import facts_of
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.spec.cases import load_cases, select
from candle_mi_parity.spec.conditions import Condition, Facts, all_hold
from candle_mi_parity.spec.counterfactual import Counterfactual
from candle_mi_parity.spec.explanations import Explanations, combined, load_explanations
from candle_mi_parity.spec.paths import OUTPUTS, cache_root
from candle_mi_parity.trace.release import StoredRelease
from tests.support.planting import explanation

TABLE = load_explanations()
ALTERNATING = ["sliding_attention", "full_attention"]
SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"when": ["tokens > 1"]}, "exactly one of"),
        ({"when": ["tokens > 1"], "change": {}}, "changes nothing"),
        ({"change": {"config_drop": ["x"]}}, "apply to every case"),
        ({"when": ["tokens >"], "change": {"config_drop": ["x"]}}, "is not a condition"),
        ({"when": ["tokens in 3"], "change": {"config_drop": ["x"]}}, "expected a list"),
        ({"when": ["tokens > x"], "change": {"config_drop": ["x"]}}, "neither JSON nor a subject"),
        ({"when": ["tokens > 1"], "refuses": {"stage": "model", "message": "x"}}, "does not go with"),
        ({"when": ["tokens > 1"], "change": {"variants": ["no-such-variant"]}}, "variants"),
    ],
)
def test_a_row_that_is_incomplete_or_contradictory_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, ExplanationError), match=message):
        explanation(**fields)


def test_rows_that_contradict_each_other_are_refused() -> None:
    one, other = (explanation(when=["tokens > 1"], change={"config_set": {"rope_theta": x}}) for x in (1.0, 2.0))
    with pytest.raises(ExplanationError, match=r"config\.rope_theta in two ways"):
        combined([one, other])
    with pytest.raises(ValueError, match="id given twice: CMI900"):
        Explanations(format=1, explanation=[one, one])
    held = {"when": ["tokens > 1"], "stored": "no config says it"}
    rows = [explanation(id=f"CMI90{i}", name=f"held-{i}", **held) for i in range(4)]
    with pytest.raises(ValueError, match="at most 3"):
        Explanations(format=1, explanation=rows)


def test_conditions() -> None:
    config = {"sliding_window": 8, "rope_parameters": {"rope_theta": 5e5}, "flag": True, "none": None}
    edits = [{"kind": "steer", "how": "scale"}, {"kind": "zero", "how": "set_value"}]
    facts = Facts(config={**config, "layer_types": ALTERNATING}, tokens=9, edits=edits)

    def holds(*texts: str) -> bool:
        return all_hold([Condition.parse(text) for text in texts], facts)

    assert holds("tokens > config.sliding_window", "config.flag = true", 'dtype = "float32"')
    assert holds("config.missing absent", "config.rope_parameters.rope_theta != 10000", "rope.rope_theta = 500000")
    assert not holds("config.none absent") and not holds("config.none present"), "null is a value of its own"
    assert holds("config.none null", "config.none no number", "config.missing no number", "config.flag no number")
    assert holds("config.sliding_window number") and not holds("config.none number")
    assert holds("config.none in [1, null]") and not holds("config.missing in [1, null]", "config.none in [1]")
    assert not holds("config.missing null") and not holds("config.sliding_window no number")
    assert holds("block.rope_theta = 500000", "block.factor absent"), "of the block that transformers reads"
    assert holds("config.missing other than 1", "config.flag other than 1e6") and holds("alternating = true")
    assert not holds("config.sliding_window other than 8") and not holds("alternating = false")
    assert not holds("config.missing != 10000"), "a comparison with an absent value is false"
    assert not holds("tokens > config.missing") and not holds("config.flag > 0")
    assert holds('loader = "hf"', "features = []", "files = 1", "pickled = false", "prefixed = true")
    assert not holds("files > 1") and not holds("stored_head = true")
    assert holds('edit.kind = "steer"') and holds('edit.how = "set_value"')
    assert not holds('edit.kind = "steer"', 'edit.how = "set_value"'), "of one and the same edit"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "qwen2", "rope_parameters": {"rope_theta": 3e4}}, {"CMI002"}),
        ({"model_type": "qwen3"}, {"CMI002"}),
        ({"model_type": "qwen2", "rope_parameters": {"rope_theta": 1e6}}, set()),
        ({"model_type": "phi3", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, {"CMI004"}),
        ({"model_type": "phi3", "partial_rotary_factor": 0.5, "rope_theta": 1e4}, {"CMI004"}),
        ({"model_type": "gemma2", "rope_theta": 1e4, **dict.fromkeys(SOFTCAPS)}, set()),
        ({"model_type": "gemma2", "rope_theta": 1e4}, {"CMI010", "CMI011"}),
        ({"model_type": "gemma2", "sliding_window": 8, "layer_types": ALTERNATING, **SOFTCAPS}, {"CMI006"}),
    ],
)
def test_an_explanation_applies_in_every_spelling_and_to_no_other_config(
    config: dict[str, Any], expected: set[str]
) -> None:
    facts = Facts(config={"rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh", **config}, tokens=24)
    assert {row.id for row in TABLE.applicable(facts, "0.2.2") if row.change} == expected


def test_a_nested_config_key_is_changed_where_it_is() -> None:
    rope = {"rope_type": "default", "rope_theta": 2.0}
    change = Counterfactual(config_set={"rope_theta": 1e4}, config_add={"sliding_window": 1})
    nested = change.changed_config({"rope_parameters": rope, "sliding_window": 8})
    assert nested == {"rope_parameters": rope | {"rope_theta": 1e4}, "sliding_window": 9}
    assert change.changed_config({"sliding_window": 8}) == {"rope_theta": 1e4, "sliding_window": 9}
    dropped = Counterfactual(config_drop=["rope_scaling"])
    assert dropped.changed_config({"rope_scaling": {"type": "linear"}, "rope_theta": 2.0}) == {"rope_theta": 2.0}
    yarn = rope | {"rope_type": "yarn", "factor": 4}
    assert dropped.changed_config({"rope_parameters": yarn}) == {"rope_parameters": rope}
    copied = Counterfactual(config_copy={"block.rope_theta": "rope_theta", "x": "rope.x"})
    both = {"rope_theta": 3.0, "x": 1, "rope_scaling": None, "rope_parameters": rope}
    assert copied.changed_config(both) == both | {"rope_parameters": rope | {"rope_theta": 3.0}}
    assert "rope_theta" not in copied.changed_config({"rope_parameters": rope})["rope_parameters"]
    assert copied.changed_config({"rope_scaling": {"x": 2}})["x"] == 2
    with pytest.raises(ExplanationError, match="cannot add 1 to sliding_window, which is None"):
        Counterfactual(config_add={"sliding_window": 1}).changed_config({"sliding_window": None})


@pytest.mark.thorough
def test_no_refusal_is_excused_of_a_case_that_the_release_runs() -> None:
    """Its condition says exactly when a model is refused: a fault that refuses another case is new."""
    subjects = {case.id: prepare(case, cache_root()) for case in select(load_cases(), [])}
    excused = {
        (version, id, row.id)
        for version in known_releases()
        for id, stored in StoredRelease(OUTPUTS / f"{version}.json").release.cases.items()
        if isinstance(stored.free, str) and id in subjects
        for row in TABLE.applicable(facts_of(subjects[id]), version)
        if row.refuses is not None
    }
    assert excused == set()
