"""Direct calls that run a model: the truth computed in other ways, and planted faults that fail."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from candle_mi_parity.candidate.build import build
from candle_mi_parity.candidate.process import EmitterProcess
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.compare.verdict import Status
from candle_mi_parity.coverage.calls import load_calls, read_calls
from candle_mi_parity.coverage.calls_compare import answer_of, compare_call
from candle_mi_parity.errors import CaseTableError
from candle_mi_parity.models.prepared_case import tokenizer
from candle_mi_parity.oracle.hooks import load_model
from candle_mi_parity.oracle.rounding import Float64
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.truth import TruthTensor
from tests.support.calls import ROWS, TABLE, Values, passes, truth, where


def directory(call: str) -> Path:
    return where(ROWS[call].model)


@functools.cache
def plain(where: Path) -> Any:
    """The model with transformers' own attention and no hooks."""
    return load_model(where, attention="eager")


def run(where: Path, ids: list[int]) -> Any:
    with Float64():  # type: ignore[no-untyped-call]
        return plain(where)(torch.tensor([ids]), output_hidden_states=True, use_cache=False)


def residual(call: str, text: str, place: int) -> np.ndarray:
    """Of the layer of a call's prompts; transformers gives the last layer's after the final norm."""
    ids = tokenizer(directory(call))(text)["input_ids"]
    layer: int = ROWS[call].args["prompts"]["layer"]  # type: ignore[index, call-overload, assignment]
    return np.asarray(run(directory(call), ids).hidden_states[layer + 1][0, place].numpy())


def means(call: str, place: int = -1) -> list[np.ndarray]:
    prompts: Any = ROWS[call].args["prompts"]
    sets = (prompts["positive"], prompts["negative"])
    return [np.mean([residual(call, text, place) for text in texts], axis=0) for texts in sets]


def unit(vector: np.ndarray) -> np.ndarray:
    return np.asarray(vector / np.linalg.norm(vector))


def newline(call: str) -> np.ndarray:
    """Each prompt has its first line break elsewhere."""
    prompts: Any = ROWS[call].args["prompts"]

    def mean(texts: list[str]) -> np.ndarray:
        spelt = [tokenizer(directory(call))(text)["input_ids"] for text in texts]
        alone = tokenizer(directory(call))("a\n")["input_ids"][-1]
        rows = [residual(call, text, ids.index(alone)) for text, ids in zip(texts, spelt, strict=True)]
        return np.asarray(np.mean(rows, axis=0))

    return np.asarray(mean(prompts["positive"]) - mean(prompts["negative"]))


LAST, UNIT, BOS = "contrastive/last", "contrastive/last-unit", "contrastive/first-layer"
FAINT = "contrastive/faint"
RIGHT: dict[str, Callable[[], tuple[str, np.ndarray]]] = {
    "last": lambda: (LAST, np.subtract(*means(LAST))),
    "unit": lambda: (UNIT, unit(np.subtract(*means(UNIT)))),
    "unit of a faint one": lambda: (FAINT, unit(np.subtract(*means(FAINT)))),
    "explicit": lambda: ("contrastive/explicit", unit(np.subtract(*means("contrastive/explicit", 2)))),
    "line break": lambda: ("contrastive/first-newline-bos", newline("contrastive/first-newline-bos")),
    "line break of Llama 2": lambda: (
        "contrastive/metaspace-first-newline",
        unit(newline("contrastive/metaspace-first-newline")),
    ),
}
PLANTED: dict[str, Callable[[], tuple[str, np.ndarray]]] = {
    "signs swapped": lambda: (LAST, -np.subtract(*means(LAST))),
    "a unit vector unasked": lambda: (LAST, unit(np.subtract(*means(LAST)))),
    "no unit vector": lambda: (UNIT, np.subtract(*means(UNIT))),
    "no unit vector of a faint one": lambda: (FAINT, np.subtract(*means(FAINT))),
    "sums for means": lambda: (LAST, means(LAST)[0] * 3 - means(LAST)[1] * 2),
    "at BOS": lambda: (BOS, np.zeros(32)),
    "one position off": lambda: (LAST, np.subtract(*means(LAST, -2))),
    "the positive prompts alone": lambda: (LAST, means(LAST)[0]),
    "NaN": lambda: (LAST, np.full(32, np.nan)),
}


@pytest.mark.every(4)
@pytest.mark.parametrize("name", [*RIGHT, *PLANTED])
def test_a_direction_as_transformers_gives_it_passes_and_a_planted_fault_fails(name: str) -> None:
    call, vector = (RIGHT | PLANTED)[name]()
    assert passes(call, {"value": vector}) == (name in RIGHT)


def test_text_gives_the_ids_and_numbers_of_transformers() -> None:
    call = "text/metaspace"
    args = ROWS[call].args
    ids = tokenizer(directory(call))(args["text"])["input_ids"]
    out = run(directory(call), ids)
    right: Values = {
        "ids": np.array(ids, float),
        "resid": out.hidden_states[1].numpy(),
        "logits": out.logits[0, -1].numpy(),
    }
    assert passes(call, right)
    assert not passes(call, right | {"ids": np.array([*ids[:-1], ids[-1] + 1], float)})
    assert not passes(call, right | {"resid": out.hidden_states[0].numpy()})
    assert not passes(call, right | {"logits": out.logits[0, 0].numpy()})


@pytest.mark.thorough
def test_a_steered_prompt_depends_on_the_strength() -> None:
    right = answer_of(ROWS["steered/unit"], truth("steered/unit"))
    assert passes("steered/unit", right)
    assert not passes("steered/unit", right | {"value": right["value"] * 2})
    assert not passes("steered/unit", right | {"logits": right["logits"] + 1e-3})


PROMPT = [1, 30, 77, 12, 205]


@functools.cache
def continued() -> list[int]:
    """Six tokens by transformers' own loop."""
    ids = list(PROMPT)
    for _ in range(6):
        ids.append(int(run(directory("generate/plain"), ids).logits[0, -1].argmax()))
    return ids


@pytest.mark.thorough
def test_one_pass_continues_as_transformers_does() -> None:
    assert answer_of(ROWS["generate/plain"], truth("generate/plain"))["tokens"].tolist() == continued()


@pytest.mark.thorough
def test_a_stop_token_ends_a_continuation_and_is_left_out() -> None:
    stopping = ROWS["generate/stop"]
    stop: Any = stopping.args["stop"]
    made = answer_of(stopping, truth("generate/stop"))["tokens"].tolist()
    assert made == continued()[: len(made)] and continued()[len(made)] in stop and len(PROMPT) < len(made) < 11


def changed(call: str, change: Callable[[list[int]], list[int]]) -> bool:
    tokens = [int(token) for token in answer_of(ROWS[call], truth(call))["tokens"]]
    return passes(call, {"tokens": np.array(change(tokens), float)})


WRONG_TOKENS: dict[str, tuple[str, Callable[[list[int]], list[int]]]] = {
    "the last token another": ("generate/feedback", lambda ids: [*ids[:-1], ids[-1] - 1]),
    "one token short": ("generate/feedback", lambda ids: ids[:-1]),
    "one token more": ("generate/feedback", lambda ids: [*ids, 5]),
    "without the prompt": ("generate/feedback", lambda ids: ids[len(PROMPT) :]),
    "beyond the vocabulary": ("generate/feedback", lambda ids: [*ids[:-1], 320]),
    "on past the second stop token": ("generate/second-stop", lambda ids: [*ids, continued()[len(ids)]]),
    "the stop token kept": ("generate/stop", lambda ids: [*ids, continued()[len(ids)]]),
    "on past the stop token": ("generate/stop", lambda ids: [*ids, 5]),
    "ended too soon": ("generate/stop", lambda ids: ids[:-1]),
    "a token where none is asked": ("generate/no-steps", lambda ids: [*ids, 5]),
}


@pytest.mark.every(4)
@pytest.mark.parametrize("call", ["generate/feedback", "generate/stop", "generate/no-steps", "generate/one-token"])
def test_the_tokens_of_the_truth_pass(call: str) -> None:
    assert changed(call, lambda ids: ids)


@pytest.mark.every(4)
@pytest.mark.parametrize("name", WRONG_TOKENS)
def test_other_tokens_fail(name: str) -> None:
    assert not changed(*WRONG_TOKENS[name])


def test_tokens_that_tie_inside_the_gate_may_be_exchanged_and_what_follows_is_not_judged() -> None:
    row = ROWS["generate/feedback"]
    logits = truth(row.id)["logits"]
    value = logits.value.copy()
    best = int(value[2].argmax())
    other = (best + 1) % value.shape[-1]
    value[2, other] = value[2, best] - 1e-7
    tie = {"logits": TruthTensor(value, logits.noise)}
    made = [int(token) for token in answer_of(row, tie)["tokens"]]
    made[len(PROMPT) + 2 :] = [other, 7]
    assert compare_call(row, {"tokens": np.array(made, float)}, tie)[0].status is Status.PASS
    value[2, other] = value[2, best] - 1e-3
    assert compare_call(row, {"tokens": np.array(made, float)}, tie)[0].status is Status.FAIL


def test_feedback_at_the_last_position_changes_the_continuation() -> None:
    """Otherwise the row of sustained feedback would measure what the row without it does."""
    rows = [
        answer_of(ROWS[f"generate/{name}"], truth(f"generate/{name}"))["tokens"] for name in ("feedback", "sustained")
    ]
    assert rows[0].tolist() != rows[1].tolist()


@pytest.mark.parametrize(
    ("call", "change"),
    [
        ("lens/first", {"first": np.array(0.0)}),
        ("lens/part-of-a-token", {"first": np.array(-1.0)}),
        ("lens/never", {"top": np.array([0.05, 0.05, 0.05, 0.05])}),
        ("lens/first", {"text": np.array([98.0, 0.0])}),
    ],
)
def test_another_layer_token_or_probability_fails(call: str, change: Values) -> None:
    right = answer_of(ROWS[call], truth(call))
    assert passes(call, right) and not passes(call, right | change)


def test_each_tokenizer_spells_a_line_break_as_it_is_meant_to() -> None:
    """In transformers too, whose classes could change what the file says."""
    calls = {"bytes": LAST, "bos": BOS, "metaspace": "contrastive/metaspace-last", "words": "contrastive/words-last"}
    alone = {
        name: tokenizer(directory(call)).tokenize("\n", add_special_tokens=False) for name, call in calls.items()
    }
    assert alone == {"bytes": ["Ċ"], "bos": ["Ċ"], "metaspace": ["▁", "<0x0A>"], "words": []}
    assert tokenizer(directory(BOS))("the").input_ids[0] == 1 != tokenizer(directory(LAST))("the").input_ids[0]
    assert tokenizer(directory("offsets/ends"))("the").input_ids[1:] == [2, 1]


def test_a_model_that_is_not_in_the_table_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "calls.toml"
    path.write_text('call = [{ id = "a", fn = "forward_text", model = "none" }]\n[tensors]\n')
    with pytest.raises(CaseTableError, match="unknown model in a"):
        load_calls(path)


@pytest.mark.rust
def test_a_model_that_does_not_load_costs_its_own_call(tmp_path: Path) -> None:
    rows = [ROWS["text/bos"].model_copy(update={"model": "nowhere"}), ROWS["causal/4"], ROWS["text/bos"]]
    rows[0] = rows[0].model_copy(update={"id": "text/nowhere"})
    table = TABLE.model_copy(update={"call": rows})
    with EmitterProcess(build(parse_candidate("0.2.2"), cache_root(), print).path) as emitter:
        asked = table.request(TABLE.lay_out(cache_root()), tmp_path / "calls.json")
        found = {each.id: each for each in read_calls(emitter.emit(asked, 60.0)).calls}
    assert "model directory" in str(found["text/nowhere"].error)
    assert {found[name].outcome for name in ("causal/4", "text/bos")} == {"results"}
