"""A hunt's input made smaller, and the conditions that it proposes."""

from typing import Any

import pytest

from candle_mi_parity.hunt.bench import Answer
from candle_mi_parity.hunt.genes import Genes, conditions_of
from candle_mi_parity.hunt.shrink import MOST, smallest
from candle_mi_parity.spec.conditions import Condition
from candle_mi_parity.spec.counterfactual import Counterfactual
from candle_mi_parity.spec.explanations import load_explanations, proposed


@pytest.mark.parametrize("needed", [1, 2, 6, 7, 513, 1000, 1023, 1100])
def test_the_length_of_a_prompt_is_bisected(needed: int) -> None:
    asked: list[int] = []

    def judge(genes: Genes) -> Answer:
        asked.append(genes["tokens"]["random"])
        return Answer("new" if asked[-1] >= needed and "config.a" in genes else "agree", first="logits")

    start: Genes = {"tokens": {"random": 1100}, "config.a": ["set", 1]}
    found, answer = smallest(judge, start, judge(start))
    assert found["tokens"] == {"random": needed} and answer.kind == "new"
    assert len(asked) < MOST


def test_the_genes_of_the_smallest_input_are_the_conditions_of_the_row() -> None:
    block: dict[str, Any] = {"rope_type": "linear", "factor": 2.0, "short_factor": [1.0, 2.0]}
    genes: Genes = {
        "config.rope_scaling": ["set", block],
        "config.rms_norm_eps": ["set", 1e-5],
        "config.head_dim": ["absent"],
        "config.sliding_window": ["null"],
        "config.use_bias": ["set", False],
        "sae.cfg.normalize_activations": ["set", "none"],
        "dtype": "bfloat16",
        "tokens": {"random": 9},
        "weights.norm-zero": True,
    }
    wanted = [
        "config.head_dim absent",
        "config.rms_norm_eps = 1e-05",
        'config.rope_scaling.rope_type = "linear"',
        "config.rope_scaling.factor = 2.0",
        "config.rope_scaling.short_factor present",
        "config.sliding_window null",
        "config.use_bias = false",
        'dtype = "bfloat16"',
        'sae.normalize_activations = "none"',
        "tokens > 8",
    ]
    assert conditions_of(genes) == wanted
    for text in wanted:
        Condition.parse(text)
    row = proposed(Counterfactual(config_drop=["head_dim"]), "llama", "0.2.2", load_explanations(), wanted)
    assert '"config.head_dim absent"' in row and '"tokens > 8"' in row
    assert conditions_of({"tokens": {"random": 6}}) == []
