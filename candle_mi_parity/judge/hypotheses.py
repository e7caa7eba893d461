"""The single counterfactuals that a search for an explanation tries."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from candle_mi_parity.errors import ExplanationError
from candle_mi_parity.files.tensor_file import TensorFile
from candle_mi_parity.files.untrusted import read_json
from candle_mi_parity.judge.known import Evidence
from candle_mi_parity.models.checkpoint import read_config, weight_files
from candle_mi_parity.models.saelens import CONFIG
from candle_mi_parity.oracle.fields_read import cached_fields_read
from candle_mi_parity.spec.counterfactual import ROTARY, Counterfactual, Dequantization, Variant, places, rotary_block
from candle_mi_parity.spec.edits import CltInject, Edit, Inject, PatchAt
from candle_mi_parity.spec.explanations import Explanation, Explanations
from candle_mi_parity.spec.families import family_of
from candle_mi_parity.spec.hook_points import WEIGHTS
from candle_mi_parity.spec.recurrent import Recurrent

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
DEFAULTS: dict[str, list[Any]] = {
    "rope_theta": [10_000.0, 1_000_000.0, 500_000.0],
    "rms_norm_eps": [1e-5, 1e-6, 2e-5, 1e-8],
    "norm_epsilon": [1e-5, 1e-6, 2e-5, 1e-8],
    "sliding_window": [None],
    "attn_logit_softcapping": [None, 50.0],
    "final_logit_softcapping": [None, 30.0],
    "partial_rotary_factor": [1.0],
    "tie_word_embeddings": [True, False],
    "hidden_act": list(ACTIVATIONS),
    "hidden_activation": list(ACTIVATIONS),
}
"""Config key → defaults of either library, and values that are a likely mistake."""

POINTS = {
    WEIGHTS: ("dequantize",),
    "hook_embed": (),
    "attn.hook_q": ("norm", "eps", "bias", "heads"),
    "attn.hook_k": ("norm", "eps", "bias", "heads"),
    "attn.hook_v": ("norm", "eps", "bias", "heads"),
    "attn.hook_scores": ("rope", "rotary", "scalar", "heads", "tiled"),
    "attn.hook_pattern": ("window", "layer_types", "softcap", "mask"),
    "hook_attn_out": ("bias", "norm", "steering"),
    "mlp.hook_pre": ("norm", "eps"),
    "mlp.hook_post": ("hidden_act", "bias"),
    "hook_final_norm": ("norm", "eps"),
    "logits": ("final", "tie", "bias"),
    "sae": ("sae", "topk", "threshold"),
}
"""First diverging hook point → words in the counterfactuals to try first."""


@dataclass(frozen=True)
class Hypothesis:
    """One counterfactual to try; ``rows`` is the listed explanation, or empty."""

    change: Counterfactual
    rows: list[Explanation] = field(default_factory=list)


def hypotheses(evidence: Evidence, table: Explanations, first: str, cache: Path) -> list[Hypothesis]:
    """Every applicable counterfactual once: listed ones, then those related to the first diverging tensor.

    :param first: name of that tensor.
    """
    listed: list[Hypothesis] = []
    generated: list[Hypothesis] = []
    for row in table.explanation:
        if row.change is None or (row.families and evidence.facts.family not in row.families):
            continue
        if evidence.release in ("", *row.releases):
            listed.append(Hypothesis(row.change, [row]))
        else:  # what another release did is worth a trial, but its words and its remedy do not hold here
            generated.append(Hypothesis(row.change))
    generated += [Hypothesis(change) for change in _generated(evidence, cache)]
    words = next((words for point, words in POINTS.items() if point in first), ())
    generated.sort(key=lambda one: not any(word in one.change.key() for word in words))
    listed.sort(key=lambda one: not one.rows[0].applies(evidence.facts))
    found: dict[str, Hypothesis] = {}
    for one in [*listed, *generated]:
        found.setdefault(one.change.key(), one)
    return list(found.values())


def _generated(evidence: Evidence, cache: Path) -> Iterator[Counterfactual]:
    subject = evidence.subject
    config = read_config(subject.model_dir)
    yield from _of_edits(subject.case.edits, len(subject.tokens[0]))
    if subject.sae_file is not None and subject.sae_file.is_dir():
        yield from _of_sae(read_json(subject.sae_file / CONFIG, ExplanationError))
    yield from _of_recurrent(subject.case.recurrent)
    if subject.quantized_dir is not None:
        yield from (Counterfactual(dequantize=[reading]) for reading in Dequantization)
    for variant in Variant:
        if subject.case.recurrent is not None or not variant.of_recurrence:
            yield Counterfactual(variants=[variant])
    yield from _of_config(config, sorted(cached_fields_read(subject.model_dir, subject.model_type, cache)))
    yield from _of_weights(subject.model_dir, family_of(subject.model_type).norm_offset)


def _of_config(config: dict[str, Any], fields: list[str]) -> Iterator[Counterfactual]:
    """Each field that transformers reads: absent, at another default, or off by one."""
    for name in fields:
        key = name.removeprefix(f"{ROTARY}.")
        found = _value(config, name)
        if places(config, name):  # null too
            yield Counterfactual(config_drop=[key])
        for value in DEFAULTS.get(key, []):
            if value is None:
                yield Counterfactual(config_null=[key])
            elif value != found:
                yield Counterfactual(config_set={key: value})
        if isinstance(found, bool):
            yield Counterfactual(config_set={key: not found})
        elif isinstance(found, int) and key in config:
            yield from (Counterfactual(config_add={key: step}) for step in (1, -1, 2))
    for key in sorted(rotary_block(config)[1].keys() & config.keys()):
        yield Counterfactual(config_copy={f"block.{key}": key})
        yield Counterfactual(config_copy={key: f"block.{key}"})
    for block in ("rope_scaling", "layer_types"):
        if config.get(block) is not None:
            yield Counterfactual(config_drop=[block])
    if config.get("use_sliding_window"):
        yield Counterfactual(config_set={"use_sliding_window": False}, config_drop=["layer_types"])


def _value(config: dict[str, Any], name: str) -> Any:
    """The value of a field in a config, or None."""
    for path in places(config, name):
        return config[path[0]][path[1]] if len(path) == 2 else config[path[0]]
    return None


def _of_weights(directory: Path, norm_offset: int) -> Iterator[Counterfactual]:
    """Each kind of bias and norm weight left out, and all biases of a kind of module."""
    names = sorted({name for file in weight_files(directory) for name in TensorFile(file).keys()})  # noqa: SIM118
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    biases = [kind for kind in kinds if kind.endswith(".bias")]
    for module in ("self_attn", "mlp", "norm"):
        if sum(module in kind for kind in biases) > 1:
            yield Counterfactual(weights_zero=[kind for kind in biases if module in kind])
    yield from (Counterfactual(weights_zero=[kind]) for kind in biases)
    for kind in kinds:
        if kind.endswith("norm.weight"):
            left_out = {"weights_zero" if norm_offset else "weights_one": [kind]}
            yield Counterfactual.model_validate(left_out)


def _of_sae(config: dict[str, Any]) -> Iterator[Counterfactual]:
    """Each key of ``cfg.json`` left out, each flag negated, and other defaults."""
    for key, value in config.items():
        if key in ("d_in", "d_sae", "metadata"):
            continue
        yield Counterfactual(sae_drop=[key])
        if isinstance(value, bool):
            yield Counterfactual(sae_set={key: not value})
    for key, value in (("apply_b_dec_to_input", False), ("normalize_activations", "none"), ("dtype", "float32")):
        if config.get(key) != value:
            yield Counterfactual(sae_set={key: value})


def _of_edits(edits: list[Edit], tokens: int) -> Iterator[Counterfactual]:
    """Each edit left out, one position off, one layer off."""
    for index, edit in enumerate(edits):
        yield Counterfactual(edits={index: None})
        if isinstance(edit, PatchAt | Inject | CltInject):
            for position in (edit.position - 1, edit.position + 1, 0, tokens - 1):
                if 0 <= position < tokens and position != edit.position:
                    yield Counterfactual(edits={index: edit.model_copy(update={"position": position})})
        if found := re.match(r"blocks\.(\d+)\.(.*)", edit.hook):
            for layer in (int(found[1]) - 1, int(found[1]) + 1):
                hook = f"blocks.{layer}.{found[2]}"
                yield Counterfactual(edits={index: edit.model_copy(update={"hook": hook})})


def _of_recurrent(recurrent: Recurrent | None) -> Iterator[Counterfactual]:
    """One pass more or less, another range of layers, each feedback left out or one position off."""
    if recurrent is None:
        return
    plain, (first, last) = recurrent.model_dump(), recurrent.layers
    changes: list[dict[str, Any]] = [{"depth": recurrent.depth + step} for step in (-1, 1)]
    changes += [{"layers": [first + a, last + b]} for a, b in ((1, 0), (-1, 0), (0, 1), (0, -1))]
    for index, row in enumerate(rows := plain["feedback"]):
        moved = [row | {"position": row["position"] + step} for step in (-1, 1)]
        changes += [{"feedback": rows[:index] + other + rows[index + 1 :]} for other in ([], *([at] for at in moved))]
    for change in changes:
        with suppress(ValidationError):  # no pass, or no such layer or position
            yield Counterfactual(recurrent=Recurrent.model_validate(plain | change))
