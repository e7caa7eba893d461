"""A hunt of a candidate that has a version: what is known of it, and what another cause of the hunt explains."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.compare.suspects import in_any_layer
from candle_mi_parity.hunt.bench import Answer, Bench, Found
from candle_mi_parity.hunt.genes import Genes, case_of
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.oracle.torch_state import TORCH
from candle_mi_parity.spec.counterfactual import Counterfactual
from candle_mi_parity.spec.explanations import NOTHING_KNOWN, Explanations
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.trace.trace import InMemory
from candle_mi_parity.trace.truth import Truth
from tests.support.planting import RELEASE

pytestmark = pytest.mark.usefixtures("one_thread")

ACTIVATION, EPSILON = "config.hidden_act", "config.rms_norm_eps"
GENES: Genes = {ACTIVATION: ["set", "relu"], EPSILON: ["set", 0.5]}
PLAIN = Counterfactual(config_set={"rms_norm_eps": 1e-5})
"""What a candidate computes that does not read the epsilon."""


class Ignoring(TorchSource):
    """PyTorch in float32 that passes for candle-mi 0.2.2, and does not read some genes."""

    identity = RELEASE  # type: ignore[assignment]

    def __init__(self, genes: Genes, ignored: Sequence[str], directory: Path) -> None:
        super().__init__()
        self._case = case_of("mistral", {slot: value for slot, value in genes.items() if slot not in ignored})
        self._bench = Bench(TorchSource(), NOTHING_KNOWN, directory)

    def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> InMemory:
        with self._bench.cleared(), TORCH:
            oracle = self._bench.oracle(self._case)
            made = self._bench.source.trace(oracle.subject, mode, truth, inputs)
        assert isinstance(made, InMemory)
        return made


def known(*activations: str) -> Explanations:
    """One row for each activation that is computed in place of the config's."""
    rows: list[dict[str, Any]] = [
        {
            "id": f"CMI0{place}1",
            "name": f"activation-{place}",
            "says": "hidden_act is not read.",
            "kind": "no effect",
            "families": ["mistral"],
            "when": ['config.hidden_act != "silu"'],
            "change": {"config_set": {"hidden_act": activation}},
            "releases": ["0.2.2"],
        }
        for place, activation in enumerate(activations)
    ]
    return Explanations.model_validate({"format": 1, "explanation": rows})


@pytest.fixture
def judge(tmp_path: Path) -> Any:
    def judged(table: Explanations, genes: Genes, *ignored: str, found: Sequence[Found] = ()) -> Answer:
        source = Ignoring(genes, ignored, tmp_path / "candidate")
        return Bench(source, table, tmp_path / "scratch").judge("mistral", genes, found)

    return judged


def test_what_is_known_of_the_release_is_known(judge: Any) -> None:
    assert judge(known("silu"), GENES).kind == "agree"
    answer = judge(known("silu"), GENES, ACTIVATION)
    assert (answer.kind, answer.key) == ("known", "CMI001")
    assert judge(known("gelu"), GENES, ACTIVATION).kind == "new"
    assert judge(NOTHING_KNOWN, GENES, ACTIVATION).kind == "new"


def test_explanations_that_contradict_each_other_are_new(judge: Any) -> None:
    answer = judge(known("silu", "gelu"), GENES, ACTIVATION)
    assert (answer.kind, answer.reason) == ("new", "overlap") and "hidden_act in two ways" in answer.detail


@pytest.mark.parametrize("genes", [GENES, {EPSILON: GENES[EPSILON]}], ids=["on top of what is known", "alone"])
def test_another_cause_of_the_hunt_explains_a_divergence(judge: Any, genes: Genes) -> None:
    new = judge(known("silu"), genes, ACTIVATION, EPSILON)
    assert (new.kind, new.key) == ("new", "")
    point = in_any_layer(new.first)
    others = [
        Found(3, Counterfactual(config_set={"rms_norm_eps": 1e-2}), point),
        Found(4, Counterfactual(config_set={"hidden_act": "gelu"}), point),  # contradicts what is known
        Found(5, PLAIN, "logits"),
    ]
    assert judge(known("silu"), genes, ACTIVATION, EPSILON, found=others).key == ""
    answer = judge(known("silu"), genes, ACTIVATION, EPSILON, found=[*others, Found(6, PLAIN, point)])
    assert (answer.kind, answer.key, answer.first) == ("new", "6", new.first)
