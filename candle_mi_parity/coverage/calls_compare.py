"""Compare the answer of one direct call with its truth: by the gate, or bitwise for exact results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import numpy as np

from candle_mi_parity.compare.align import INFINITE, SAME, Distance
from candle_mi_parity.compare.gate import ELEMENT_GATE, POSITION_GATE, RESOLUTION, TINY, UNIT, measure
from candle_mi_parity.compare.tensor_result import judged, nonfinite
from candle_mi_parity.compare.verdict import Status, TensorResult
from candle_mi_parity.coverage.calls import CallRow
from candle_mi_parity.trace.truth import TruthTensor

CallTruth = Mapping[str, TruthTensor]
"""Name of a result → value and noise. For ``top_changed_tokens`` of all tokens, for ``encode_sparse`` dense, for
``top_attended_positions`` all positions in order and the weights of all."""
Results = dict[str, np.ndarray]
TEXT = "text"
"""Name of a result that is a list of texts, each as its bytes and a 0."""
PLACES = frozenset({"ids", "token", "tokens", "start", "end", "first", "exact"})
"""Names of results that are token ids, indices or flags; -1 stands for none."""
SHOWN = 12
"""Entries of a list in a message."""


def compare_call(row: CallRow, got: Results, truth: CallTruth) -> list[TensorResult]:
    """Every result of an answer."""
    special = {"top_changed_tokens": ["tokens", *truth], "encode_sparse": ["indices", "values"]}
    special |= {"generate_recurrent": ["tokens"]}
    expected = special.get(row.fn, list(truth))
    if list(got) != expected:
        return [_mismatch("results", f"got {', '.join(got) or 'none'}, expected {', '.join(expected)}")]
    if row.fn == "top_changed_tokens":
        return _top_changed(row, got, truth)
    if row.fn == "top_attended_positions":
        return _top_attended(row, got, truth)
    if row.fn == "encode_sparse":
        return _sparse(row, got, truth)
    if row.fn == "generate_recurrent":
        return [_continued(row, got["tokens"], truth["logits"])]
    if row.fn == "pca_top_k" and got["components"].shape == truth["components"].shape:
        sign = np.sign((got["components"] * truth["components"].value).sum(-1, keepdims=True))
        got = got | {"components": got["components"] * sign}
    return [_compare_result(row, name, got[name], truth[name]) for name in truth]


def answer_of(row: CallRow, truth: CallTruth) -> Results:
    """The answer of a candidate that computes the truth and rounds it to float32."""
    values = {name: tensor.value.astype(np.float32).astype(np.float64) for name, tensor in truth.items()}
    if row.fn == "top_changed_tokens":
        at = _most_changed(row, truth)
        return {"tokens": at.astype(np.float64), **{name: value[at] for name, value in values.items()}}
    if row.fn == "top_attended_positions":
        at = _most_attended(row, truth)
        return {"positions": at.astype(np.float64), "weights": values["weights"][at]}
    if row.fn == "encode_sparse":
        features = values["features"]
        at = np.argsort(-features, kind="stable")[: np.count_nonzero(features > 0)]
        return {"indices": at.astype(np.float64), "values": features[at]}
    if row.fn == "generate_recurrent":
        made = [token for token in values["logits"].argmax(-1).tolist() if token not in _stops(row)]
        made = made[: cast(int, row.args["max_tokens"])]
        return {"tokens": np.array([*cast(list[int], row.args["tokens"]), *made], dtype=np.float64)}
    return values


def distance(row: CallRow, one: np.ndarray, other: np.ndarray, expected: TruthTensor | None) -> Distance:
    """Distance between two candidates' arrays of one result.

    :param expected: the truth, whose noise is the unit; without it the unit is a few ULP.
    """
    if one.shape == other.shape and one.tobytes() == other.tobytes():
        return SAME
    if one.shape != other.shape:
        return INFINITE
    noise = expected.noise if expected is not None and expected.shape == one.shape else np.zeros_like(one)
    found = _compare_result(row.model_copy(update={"exact": False}), "", other, TruthTensor(one, noise))
    return Distance(False, found.position_ratio, found.element_ratio)


def _mismatch(name: str, detail: str) -> TensorResult:
    """A failure without a ratio: other results, another shape, another decision."""
    return TensorResult(name, Status.FAIL, "values", float("inf"), float("inf"), compared=1, past=1, detail=detail)


def _compare_result(row: CallRow, name: str, got: np.ndarray, expected: TruthTensor) -> TensorResult:
    value, noise = expected.value, expected.noise
    if name == TEXT or name in PLACES:
        return _listed(name, got, value)
    if got.shape != value.shape:
        return _mismatch(name, f"got shape {list(got.shape)}, expected {list(value.shape)}")
    if value.size == 0:  # as of no tokens; its shape is all there is
        return TensorResult(name, Status.PASS)
    if row.exact:
        value = value.astype(np.float32).astype(np.float64)
    if row.ties:
        got, value = np.sort(got, -1), np.sort(value, -1)
    rows = (1, -1, value.shape[-1]) if value.ndim else (1, 1, 1)
    got, value, noise = got.reshape(rows), value.reshape(rows), noise.reshape(rows)
    nan = np.isnan(got) & np.isnan(value)  # right where PyTorch gives NaN
    got, value = np.where(nan, 0.0, got), np.where(nan, 0.0, value)
    # Infinities of a mask are right where both have them.
    same = got == value
    if (lost := ~np.isfinite(value) & ~same).any():
        at = np.argmax(lost)
        detail = f"{lost.sum()} elements are others than NaN or infinity: {got.flat[at]}, expected {value.flat[at]}"
        return replace(_mismatch(name, detail), reason="nonfinite")
    if (broken := nonfinite(name, np.where(same, 0.0, got), value, None)) is not None:
        return _at(broken, expected.shape)
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0.0, got - value)
    found = measure(error, np.where(np.isfinite(value), value, 0.0), noise)
    found = replace(found, unresolved=found.unresolved & ~_known_to_be_zero(value, noise))
    return _at(judged(name, found, got, value, None, None, exact=row.exact), expected.shape)


def _listed(name: str, got: np.ndarray, value: np.ndarray) -> TensorResult:
    """Compare texts with texts, or indices with indices, which are equal or not."""
    if got.shape == value.shape and (got == value).all():
        return TensorResult(name, Status.PASS, compared=value.size, exact=True)
    ours, theirs = (_entries(name, array) for array in (got, value))
    pairs = list(zip(ours, theirs, strict=False))
    different = [place for place, (one, other) in enumerate(pairs) if one != other]
    if len(ours) != len(theirs):
        detail = f"got {len(ours)} entries, expected {len(theirs)}: {_shown(ours)}, expected {_shown(theirs)}"
    elif len(pairs) == 1:
        detail = f"got {ours[0]}, expected {theirs[0]}"
    else:
        first = different[0]
        detail = f"entry {first} is {ours[first]}, expected {theirs[first]}; {len(different)} of {len(pairs)} differ"
        detail += f": got {_shown(ours)}, expected {_shown(theirs)}"
    past = len(different) + abs(len(ours) - len(theirs))
    return replace(_mismatch(name, detail), compared=max(len(theirs), 1), past=past, exact=True)


def _entries(name: str, array: np.ndarray) -> list[str]:
    """Each text in quotes, or each index; a number that is neither a byte nor an index as it is."""
    numbers = array.reshape(-1)
    if name == TEXT and np.isin(numbers, np.arange(256)).all():
        each = bytes(numbers.astype(np.uint8).tolist()).split(b"\0")
        return [repr(text.decode("utf-8", "backslashreplace")) for text in each[:-1] + [each[-1]] * bool(each[-1])]
    return ["none" if number == -1 else f"{number:.17g}" for number in numbers.tolist()]


def _shown(entries: list[str]) -> str:
    return f"[{', '.join(entries[:SHOWN])}{', …' if len(entries) > SHOWN else ''}]"


def _known_to_be_zero(value: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """[1, rows]: rows of which float64 gives 0 but for its own rounding, with a noise that is small in the tensor.

    As the gradient of a query that has one key: a candidate's must be 0 within the noise, which can be judged.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        size, rounding = np.sqrt(np.square(value).mean(-1)), np.sqrt(np.square(noise).mean(-1))
        whole = np.sqrt(np.square(value).mean())
        return np.asarray((size <= 1e-6 * rounding) & (POSITION_GATE * rounding <= RESOLUTION * whole))


def _at(result: TensorResult, shape: tuple[int, ...]) -> TensorResult:
    """Convert the index of the worst element from rows to the result's own shape."""
    assert result.worst is not None
    _, row, column = result.worst.index
    place = np.unravel_index(row * (shape[-1] if shape else 1) + column, shape or (1,))
    return replace(result, worst=replace(result.worst, index=[int(i) for i in place] if shape else []))


def _most_changed(row: CallRow, truth: CallTruth) -> np.ndarray:
    return np.argsort(-truth["change"].value, kind="stable")[: cast(int, row.args["k"])]


def _top_changed(row: CallRow, got: Results, truth: CallTruth) -> list[TensorResult]:
    """Accept any order that the truth's margins allow, and compare the values of the named tokens."""
    ranked = _ranked("tokens", got["tokens"], _most_changed(row, truth), truth["change"])
    if ranked.status is not Status.PASS:
        return [ranked]
    at = got["tokens"].astype(int)
    return [ranked, *(_at_places(row, name, got, tensor, at) for name, tensor in truth.items())]


def _ranked(name: str, places: np.ndarray, best: np.ndarray, by: TruthTensor, exact: bool = False) -> TensorResult:
    """The places of the largest values, in any order that their noise allows.

    Of exact values, or of some that are NaN, the order is that of ``torch.sort``, which is stable.

    No value, at its lowest, may be above one that stands before it, at its highest. So a value that
    is all noise may leave the first k, and the one behind them takes the last place.
    """
    value = by.value
    if places.shape != best.shape:
        return _mismatch(name, f"got {places.size} {name}, expected {best.size}")
    if len(set(places)) != places.size or not np.isin(places, np.arange(value.size)).all():
        return _mismatch(name, f"got {places.tolist()}, expected distinct ones below {value.size}")
    at = places.astype(int)
    if exact or np.isnan(value).any():
        right = np.array_equal(at, best)
    else:
        with np.errstate(invalid="ignore"):
            slack = POSITION_GATE * (by.noise + UNIT / 2 * np.abs(value)) + TINY
        slack = np.where(np.isfinite(value), slack, 0.0)
        order = np.concatenate([at, np.setdiff1d(np.arange(value.size), at)])
        lowest_behind = np.maximum.accumulate((value - slack)[order][::-1])[::-1]
        before = at[: value.size - 1]  # nothing stands behind the last of all
        right = bool(((value + slack)[before] >= lowest_behind[1 : 1 + before.size]).all())
    if not right:
        return _mismatch(name, f"got {at.tolist()}, expected {best.tolist()}")
    return TensorResult(name, Status.PASS, compared=places.size)


def _at_places(row: CallRow, name: str, got: Results, tensor: TruthTensor, at: np.ndarray) -> TensorResult:
    return _compare_result(row, name, got[name], TruthTensor(tensor.value[at], tensor.noise[at]))


def _most_attended(row: CallRow, truth: CallTruth) -> np.ndarray:
    return truth["positions"].value[: cast(int, row.args["k"])].astype(int)


def _top_attended(row: CallRow, got: Results, truth: CallTruth) -> list[TensorResult]:
    weights = truth["weights"]
    ranked = _ranked("positions", got["positions"], _most_attended(row, truth), weights, row.exact)
    if ranked.status is not Status.PASS:
        return [ranked]
    return [ranked, _at_places(row, "weights", got, weights, got["positions"].astype(int))]


def _sparse(row: CallRow, got: Results, truth: CallTruth) -> list[TensorResult]:
    """Positive features, largest first; equal ones in any order."""
    expected = answer_of(row, truth)
    pairs, wanted = (list(zip(*(each[name].tolist() for name in expected), strict=False)) for each in (got, expected))
    shaped = all(got[name].shape == array.shape for name, array in expected.items())
    if not shaped or sorted(pairs) != sorted(wanted) or not np.array_equal(got["values"], expected["values"]):
        return [_mismatch("indices", f"got {pairs}, expected {wanted}, largest first")]
    return [TensorResult(name, Status.PASS, compared=array.size, exact=True) for name, array in got.items()]


def _stops(row: CallRow) -> list[int]:
    return cast(list[int], row.args["stop"])


def _continued(row: CallRow, tokens: np.ndarray, logits: TruthTensor) -> TensorResult:
    """A greedy continuation, token by token up to the first that differs.

    That one, or the end in its place, must tie with PyTorch's inside the gate; what follows has another prompt.

    :param logits: [steps, V] along PyTorch's continuation.
    """
    prompt, stops = cast(list[int], row.args["tokens"]), _stops(row)
    got = tokens.astype(int).tolist()
    if tokens.ndim != 1 or got[: len(prompt)] != prompt:
        return _mismatch("tokens", f"got {got}, expected the prompt {prompt} first")
    made = got[len(prompt) :]
    if wrong := [token for token in made if token in stops or not 0 <= token < logits.value.shape[-1]]:
        return _mismatch("tokens", f"token {wrong[0]} ends a continuation, or is not in the vocabulary")
    sigma = measure(np.zeros_like(logits.value)[None], logits.value[None], logits.noise[None]).sigma[0]
    steps = min(len(logits.value), cast(int, row.args["max_tokens"]))
    for step in range(steps):
        best, taken = int(logits.value[step].argmax()), made[step : step + 1]  # no token where it ended
        if taken == ([] if best in stops else [best]):
            continue
        margin = {token: float(logits.value[step, best] - logits.value[step, token]) for token in taken or stops}
        if any(margin[token] < ELEMENT_GATE * (sigma[step, best] + sigma[step, token]) for token in margin):
            return TensorResult("tokens", Status.PASS, compared=step + 1, detail=f"a tie at step {step + 1}")
        chosen, expected = (
            f"token {token[0]}" if token else "the end" for token in (taken, [best] * (best not in stops))
        )
        return _mismatch("tokens", f"step {step + 1} gives {chosen}, expected {expected}")
    if len(made) > steps:
        return _mismatch("tokens", f"{len(made)} tokens were made, expected {steps}")
    return TensorResult("tokens", Status.PASS, compared=steps)
