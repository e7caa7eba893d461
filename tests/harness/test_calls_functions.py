"""Direct calls of offsets, caches, masks, calibrations and lists of tensors: the truth in other ways, and faults."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.candidate.sources import open_source
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.compare.verdict import Status
from candle_mi_parity.coverage.calls import CallRow, CallTable, WeightsRow, answers, load_calls
from candle_mi_parity.coverage.calls_caches import CACHES
from candle_mi_parity.coverage.calls_compare import compare_call
from candle_mi_parity.coverage.calls_offsets import OFFSETS
from candle_mi_parity.coverage.calls_truth import computation, truth_of, with_noise
from candle_mi_parity.coverage.formulas import Formula
from candle_mi_parity.errors import CaseTableError
from candle_mi_parity.models.prepared_case import tokenizer
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.truth import TruthTensor
from tests.support.calls import ARRAYS, ROWS, TABLE, Values, changed, passes, right, truth

OURS = [row for row in TABLE.call if row.fn in OFFSETS | CACHES | {"embedding_vector": ()}]


def where(call: str) -> Path:
    return TABLE.lay_out(cache_root()) / str(ROWS[call].model or ROWS[call].weights)


@functools.cache
def encoded(call: str, special: bool = True) -> Any:
    return tokenizer(where(call))(ROWS[call].args["text"], add_special_tokens=special, return_offsets_mapping=True)


def asked(call: str, key: str) -> Any:
    return ROWS[call].args[key]


def text(call: str, name: str = "text") -> list[str]:
    return bytes(right(call)[name].astype(int).tolist()).decode().split("\0")[:-1]


def of(fn: str) -> list[str]:
    return [row.id for row in OURS if row.fn == fn and not row.raises]


# --- the truth --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", of("char_to_token"))
def test_a_character_is_found_where_transformers_char_to_token_finds_it(call: str) -> None:
    found = [encoded(call).char_to_token(at) for at in asked(call, "positions")]
    assert right(call)["token"].tolist() == [-1 if token is None else token for token in found]


@pytest.mark.parametrize("call", of("encode_with_offsets"))
def test_offsets_are_those_of_transformers(call: str) -> None:
    spans = np.reshape(encoded(call)["offset_mapping"], (-1, 2))
    assert np.array_equal(right(call)["start"], spans[:, 0]) and np.array_equal(right(call)["end"], spans[:, 1])
    assert text(call) == tokenizer(where(call)).convert_ids_to_tokens(right(call)["ids"].astype(int).tolist())


@pytest.mark.parametrize("call", of("char_range_to_tokens"))
def test_a_range_has_the_tokens_of_its_characters(call: str) -> None:
    characters = range(asked(call, "start"), min(asked(call, "end"), len(asked(call, "text"))))
    spans = encoded(call)["offset_mapping"]
    assert right(call)["tokens"].tolist() == [
        token for token, (start, end) in enumerate(spans) if any(start <= at < end for at in characters)
    ]


def test_labels_and_nearest_tokens_in_characters() -> None:
    subject = ["other", "subject", "subject", "subject_final"]
    assert text("labels/bos") == [*subject, "relation", "relation_final", "other", "other"]
    assert right("char-fuzzy/words")["token"].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert right("char-start/words")["token"].tolist() == [0, 1, 1, 2, 2, 2, -1, -1]


def test_the_mean_over_heads_is_of_the_first_row_of_the_batch() -> None:
    attention = ARRAYS["attention2"][0].mean(0)
    np.testing.assert_allclose(right("from/last")["value"], attention[3], rtol=1e-6)
    np.testing.assert_allclose(right("to/last")["value"], attention[:, 3], rtol=1e-6)
    order = np.argsort(-ARRAYS["attention"][0].mean(0)[3])
    assert right("top_attended/2")["positions"].tolist() == order[:2].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_a_half_pattern_is_not_half(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    call = f"from/{name}"
    heads = torch.from_numpy(ARRAYS[asked(call, "patterns")[asked(call, "layer")]]).to(dtype)[
        0, :, asked(call, "position")
    ]
    value = heads.double().mean(0).numpy()
    np.testing.assert_allclose(right(call)["value"], value, rtol=1e-6)
    assert passes(call, {"value": value}) and not passes(call, {"value": heads.mean(0).double().numpy()})


def test_a_draw_that_is_random_is_no_call() -> None:
    assert right("sample/cold")["token"] == ARRAYS["many_logits"].argmax()
    warmer = ROWS["sample/cold"].model_copy(update={"args": {"logits": "many_logits", "temperature": 0.1}})
    with pytest.raises(CaseTableError, match=r"at temperature 0.1 more than one token may be drawn"):
        truth_of(warmer, TABLE, cache_root())


@pytest.mark.parametrize("call", of("create_generation_mask"))
def test_a_query_sees_the_keys_up_to_its_own_position(call: str) -> None:
    new, total, start = (asked(call, name) for name in ("new_seq_len", "total_seq_len", "start_pos"))
    seen = np.tri(new, total, start, dtype=bool)
    assert np.array_equal(right(call)["value"][0, 0], np.where(seen, 0.0, -np.inf))


def test_scales_are_interpolated_as_numpy_does() -> None:
    for call in ("dose/between", "dose/measured", "dose/ends"):
        scales, levels = np.transpose(np.float32(asked(call, "points")).astype(np.float64))
        assert right(call)["value"] == pytest.approx(np.interp(np.float32(asked(call, "target")), levels, scales))
    assert right("dose/falling")["value"] == pytest.approx(1.75)
    assert right("dose/unsorted")["value"] == pytest.approx(0.5 + (0.1 - 0.01) / (0.2 - 0.01) * 3.5)


def test_names_are_those_of_safetensors_and_of_the_index() -> None:
    with safe_open(where("names/metadata") / "model.safetensors", "np") as file:
        assert text("names/metadata") == sorted(file.keys()) == ["a", "b"]
    index = json.loads((where("names/index") / "model.safetensors.index.json").read_text())
    assert text("names/index") == sorted(index["weight_map"])


def test_an_embedding_is_a_row_of_the_file() -> None:
    with safe_open(where("embedding/gemma2") / "model.safetensors", "pt") as file:
        row = file.get_tensor("model.embed_tokens.weight")[5].to(torch.float64)
    assert np.array_equal(right("embedding/gemma2")["value"], row.numpy())


# --- faults -----------------------------------------------------------------------------------------

IN_BYTES = "char/characters"
TIES = "top_attended/ties"
CHUNK = "generation/chunk"


PLANTED: dict[str, Callable[[], tuple[str, Values]]] = {
    "bytes for characters": lambda: (IN_BYTES, right(IN_BYTES, Formula.BYTE_OFFSETS)),
    "one token off": lambda: changed("char/bytes", lambda token: token + 1, "token"),
    "the added token not counted": lambda: changed("char/bos", lambda token: token - 1, "token"),
    "a token's end its last character": lambda: changed("offsets/bytes-ascii", lambda end: end - 1, "end"),
    "another token string": lambda: changed("offsets/bytes-ascii", lambda letters: np.roll(letters, 1), "text"),
    "no special tokens": lambda: (
        "offsets/bos-ascii",
        {name: value[1:] for name, value in right("offsets/bos-ascii").items()},
    ),
    "an exact match that is none": lambda: changed("convert/words", np.ones_like, "exact"),
    "a range with its end": lambda: changed("range/bytes", lambda tokens: [*tokens, tokens[-1] + 1], "tokens"),
    "a label of the last span": lambda: changed("labels/overlapping", lambda letters: np.roll(letters, 2), "text"),
    "ties the other way": lambda: changed(TIES, lambda _: [4, 3, 1], "positions"),
    "a lower weight first": lambda: changed("top_attended/2", lambda order: order[::-1], "positions"),
    "a position twice": lambda: changed("top_attended/2", lambda order: order[[0, 0]], "positions"),
    "a weight of another position": lambda: changed("top_attended/2", lambda weights: weights[::-1], "weights"),
    "a position short": lambda: ("top_attended/2", {name: v[:1] for name, v in right("top_attended/2").items()}),
    "a column for a row": lambda: ("from/first", {"value": ARRAYS["attention"][0, :, :, 0].mean(0)}),
    "the mean over the batch too": lambda: ("from/first", {"value": ARRAYS["attention"][:, :, 0].mean((0, 1))}),
    "one head": lambda: ("from/first", {"value": ARRAYS["attention"][0, 0, 0]}),
    "the next layer": lambda: ("from/last", {"value": ARRAYS["attention"][0].mean(0)[3]}),
    "the next position": lambda: ("get_position/first", {"value": ARRAYS["x2"][1]}),
    "layers in another order": lambda: changed("vectors/layers", lambda value: value[::-1]),
    "half not rounded": lambda: ("vectors/half", {"value": np.append(ARRAYS["x1"], ARRAYS["huge"])}),
    "a causal mask": lambda: ("bidirectional/5", {"value": np.where(np.tri(5), 0.0, -np.inf)[None, None]}),
    "a mask one off": lambda: (CHUNK, {"value": np.where(np.tri(3, 7, 5), 0.0, -np.inf)[None, None]}),
    "a mask without its offset": lambda: (CHUNK, {"value": np.where(np.tri(3, 7), 0.0, -np.inf)[None, None]}),
    "a ratio upside down": lambda: changed("ratio/usual", lambda ratio: 1 / ratio),
    "a factor upside down": lambda: changed("calibration/usual", lambda factor: 1 / factor, "for_target"),
    "levels of the source": lambda: changed("calibration/usual", lambda levels: levels * 3.6, "levels"),
    "the nearest measured scale": lambda: changed("dose/between", lambda _: [1.0]),
    "a scale outside the range": lambda: ("dose/outside", {"value": np.array([4.0])}),
    "a scale short": lambda: ("dose/between", {"value": np.zeros(0)}),
    "metadata among the names": lambda: changed("names/metadata", lambda t: [*b"__metadata__\0", *t], "text"),
    "a name short": lambda: changed("names/index", lambda letters: letters[:-9], "text"),
    "an embedding scaled": lambda: changed("embedding/gemma2", lambda row: row * math.sqrt(32)),
    "the next token's embedding": lambda: changed("embedding/llama", lambda row: np.roll(row, 1)),
    "NaN": lambda: changed("ratio/usual", lambda _: [math.nan]),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_fails(name: str) -> None:
    call, values = PLANTED[name]()
    assert passes(call, right(call)) and not passes(call, values)


def told(call: str, **changes: np.ndarray) -> str:
    """The message of the first result that fails."""
    results = compare_call(ROWS[call], right(call) | changes, truth(call))
    failed = next(result for result in results if result.status is Status.FAIL)
    return failed.message()


def test_texts_are_told_as_texts_and_indices_as_indices() -> None:
    labels = np.frombuffer("thé\0 rose\0".encode(), np.uint8).astype(np.float64)
    assert text("offsets/ends") == ["the", " rose"] or len(text("offsets/ends")) > 2
    message = told("offsets/ends", text=labels)
    assert "got 2 entries, expected" in message and "['thé', ' rose'], expected [" in message and "ULP" not in message
    token = right("char/bytes")["token"].copy()
    token[1] = -1
    message = told("char/bytes", token=token)
    assert f"entry 1 is none, expected {int(right('char/bytes')['token'][1])}; 1 of 9 differ: got [" in message
    assert "ULP" not in message
    [one] = [call for call in of("decode_token") if len(text(call)) == 1][:1]
    broken = np.array([0xE2, 0x98, 0.0])
    assert f"got '\\\\xe2\\\\x98', expected {text(one)[0]!r}" in told(one, text=broken)


def test_near_ties_may_be_exchanged_where_their_weights_are_rounded() -> None:
    row = ROWS["top_attended/2"]
    weights, noise = np.array([0.5, 0.25, 0.5 + 1e-9, 0.1]), np.full(4, 1e-8)
    near = {"positions": TruthTensor(np.array([2.0, 0, 1, 3]), np.zeros(4)), "weights": TruthTensor(weights, noise)}
    swapped = {"positions": np.array([0.0, 2.0]), "weights": weights[[0, 2]]}
    assert all(result.status is Status.PASS for result in compare_call(row, swapped, near))
    exact = row.model_copy(update={"exact": True})
    assert compare_call(exact, swapped, near)[0].status is Status.FAIL


@pytest.mark.parametrize(("chosen", "right"), [([0, 2], True), ([2, 0], True), ([0, 1], False), ([1, 3], False)])
def test_infinite_weights_are_the_largest_and_equal(chosen: list[int], right: bool) -> None:
    weights, noise = np.array([np.inf, 0.5, np.inf, 0.1]), np.array([0.0, 1e-8, 0.0, 1e-8])
    order = {"positions": TruthTensor(np.array([0.0, 2, 1, 3]), np.zeros(4)), "weights": TruthTensor(weights, noise)}
    answer = {"positions": np.array(chosen, dtype=np.float64), "weights": weights[chosen]}
    results = compare_call(ROWS["top_attended/2"], answer, order)
    assert all(result.status is Status.PASS for result in results) is right


@pytest.mark.parametrize(("chosen", "right"), [([1, 2], True), ([0, 1], True), ([1, 0], True), ([2, 1], False)])
def test_a_value_that_is_all_noise_may_leave_the_first(chosen: list[int], right: bool) -> None:
    """A hunt of PyTorch found it in ``top_changed_tokens``: a probability near 1 changes by less than it rounds."""
    change, noise = np.array([3e-13, 2e-13, 1e-20, 0.0]), np.array([8e-8, 3e-19, 3e-27, 0.0])
    truth = {name: TruthTensor(change, noise) for name in ("baseline", "ablated", "change")}
    row = CallRow(id="a", fn="top_changed_tokens", args={"k": 2})
    answer = {"tokens": np.array(chosen, dtype=np.float64)} | dict.fromkeys(truth, change[chosen])
    assert (compare_call(row, answer, truth)[0].status is Status.PASS) is right


def test_the_noise_does_not_choose_the_branch_of_a_formula() -> None:
    """Of two levels that are exactly float32's 1e-10 apart, which a hunt of 0.2.2 drew."""
    points: list[list[int | float | str]] = [[0.0, 9.999999960041972e-13], [1.0, 1.000000013351432e-10], [0.0, 0.0]]
    row = CallRow(id="a", fn="scale_for_target", args={"points": points, "target": 9.999999960041972e-13})
    formulas = (Formula.SEGMENTS_APART,)
    value = with_noise(row, computation(row, {}, Path(), formulas), True, formulas)[0]["value"]
    assert value.value == pytest.approx(0.01) and 0 < value.noise < 1e-6


def test_checkpoints_that_are_not_in_the_table_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "calls.toml"
    path.write_text('call = [{ id = "a", fn = "tensor_names_from_index", weights = "none" }]\n[tensors]\n')
    with pytest.raises(CaseTableError, match="unknown weights in a"):
        load_calls(path)


class LfsPointer(WeightsRow):
    """A checkpoint that was cloned without Git LFS."""

    def write(self, directory: Path) -> None:
        directory.mkdir()
        (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.rust
def test_the_call_that_ends_the_process_is_named(tmp_path: Path) -> None:
    rows = [row for row in OURS if row.fn == "create_generation_mask"]
    names = CallRow(id="names/lfs", fn="tensor_names_from_safetensors", weights="pointer")
    table = CallTable(tensors=TABLE.tensors, call=[*rows[:3], names, *rows[3:]])
    table = table.model_copy(update={"weights": {"pointer": LfsPointer()}})
    with (
        open_source(parse_candidate("0.2.2"), cache_root(), tmp_path, print) as source,
        pytest.raises(EmitterError, match=r"^crash: names/lfs ends the process, and no call is answered: .*memory"),
    ):
        answers(source, table, tmp_path, tmp_path / "calls.json")


def test_a_row_that_is_wrong_on_whether_pytorch_raises_is_an_error() -> None:
    raising = next(row for row in OURS if row.raises)
    assert truth(raising.id) == {}
    for row, message in ((raising, "PyTorch raises"), (ROWS["ratio/usual"], "PyTorch does not raise")):
        with pytest.raises(CaseTableError, match=f"{row.id}: {message}"):
            truth_of(row.model_copy(update={"raises": not row.raises}), TABLE, cache_root())
