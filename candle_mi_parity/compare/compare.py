"""Compare a trace with the truth: header → presence → shape → dtype → finite → values.

This module knows neither models nor candidates, only tensors.
"""

from __future__ import annotations

import math

import numpy as np

from candle_mi_parity.compare.compare_sae import attribute_sae_failures, judge_sae, judge_sae_scalars
from candle_mi_parity.compare.compare_weights import judge_weight
from candle_mi_parity.compare.diagnose import diagnose
from candle_mi_parity.compare.gate import ELEMENT_GATE, UNITS, measure
from candle_mi_parity.compare.row_sums import RowSums
from candle_mi_parity.compare.tensor_result import concluded, malformed, nonfinite, selected, tally
from candle_mi_parity.compare.unmeasurable import excuse_unmeasurable
from candle_mi_parity.compare.verdict import Diagnosis, Status, TensorResult, Worst
from candle_mi_parity.errors import TraceError
from candle_mi_parity.files.chunks import blocks
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.spec.hook_points import FORCED, WEIGHTS, format_of, inputs_of, is_lens, weight_feeds
from candle_mi_parity.trace.trace import Emitted, Selection, Trace, chunks
from candle_mi_parity.trace.truth import Expected, Truth


def check_header(truth: Truth, trace: Trace, inputs_digest: str | None, model_digest: str | None = None) -> None:
    """Refuse a trace of something else before any number is compared.

    :param inputs_digest: SHA-256 of the inputs file for the candidate; None if there is none.
    :param model_digest: of the model directory that the candidate was given; None for that of the truth.
    :raises TraceError: the trace is of something else; says what was found and expected.
    """
    header = trace.header
    checks = [
        ("case digest", header.case.digest, truth.meta["case"]),
        ("model digest", header.model_digest, model_digest or truth.meta["model"]),
        ("SAE digest", header.sae_digest, truth.meta.get("sae")),
        ("dtype", header.dtype, truth.meta["dtype"]),
        ("inputs digest", header.inputs_digest, inputs_digest),
    ]
    for name, found, expected in checks:
        if found != expected:
            raise TraceError(f"{trace.path}: {name} is {found}, expected {expected}: this trace is of something else")
    if trace.document.tokens != truth.tokens:
        raise TraceError(f"{trace.path}: {_token_difference(truth.tokens, trace.document.tokens)}")


def _token_difference(expected: list[list[int]], found: list[list[int]]) -> str:
    first, other = (rows[0] if rows else [] for rows in (expected, found))
    hint = "token ids differ"
    if first[1:] == other:
        hint += ": the reference has BOS at 0, the candidate does not"
    elif other[1:] == first:
        hint += ": the candidate's BOS is doubled"
    return f"{hint}; expected {one_line(str(expected))}, found {one_line(str(found))}"


def compare(
    truth: Truth, trace: Emitted, decoder: np.ndarray | None, selection: set[str] | None
) -> list[TensorResult]:
    """Compare all tensors of a case in execution order, then its decisions and scalars.

    :param decoder: ``W_dec`` [d_sae, d_in], to adjust the expected reconstruction by the excused features.
    :param selection: the tensors that a trace stored in part must hold; None for all.
    :raises TraceError: the bytes of a tensor are not those that the trace declares.
    """
    results: list[TensorResult] = []
    passed: dict[str, bool] = {}
    for name, expected in truth.tensors.items():
        if selection is not None and name not in selection:
            continue
        feeders = [feeder for feeder in _feeders_of(name, truth) if feeder in passed]
        agreed = all(passed[feeder] for feeder in feeders) if feeders else None
        if name not in trace.entries:
            result = TensorResult(name, Status.FAIL, "missing", detail=_available(trace))
        elif name.startswith(WEIGHTS):
            result = judge_weight(name, expected, trace)
        elif name.startswith("sae"):
            result = judge_sae(name, truth, trace, decoder, agreed)
        else:
            result = _judge(name, expected, trace, agreed)
        results.append(result)
        passed[name] = result.status is Status.PASS
    results += [
        TensorResult(name, Status.FAIL, "unexpected", detail="the truth has no tensor of this name")
        for name in trace.entries
        if name not in truth.tensors
    ]
    chains = [name for name in truth.sae if selection is None or f"{name}.features" in selection]
    results = attribute_sae_failures(results)
    scalars = judge_sae_scalars(truth, trace, decoder, chains)
    results += _judge_tokens(truth, trace) + scalars + _surplus(trace, {scalar.name for scalar in scalars})
    return excuse_unmeasurable(results, truth, trace.dtype, lambda name: _feeders_of(name, truth))


def _surplus(trace: Emitted, judged: set[str]) -> list[TensorResult]:
    """Fail scalars that the truth does not have, like tensors that it does not have."""
    given = set(trace.scalars) | ({"sae.top_features_last_pos"} if trace.top_features else set())
    detail = "the truth has no scalar of this name"
    return [TensorResult(name, Status.FAIL, "unexpected", detail=detail) for name in sorted(given - judged)]


def first_diagnosis(truth: Truth, trace: Emitted, results: list[TensorResult]) -> Diagnosis | None:
    """The shape of the error of the first diverging tensor; None if there are no two tensors to compare."""
    first = next((result for result in results if result.status is Status.FAIL), None)
    if first is None or first.reason not in ("values", "masked", "nonfinite", "flips"):
        return None
    entry, expected = trace.entries.get(first.name), truth.tensors.get(first.name)
    if entry is None or expected is None:
        return None
    got = trace.tensor(first.name).astype(np.float64)
    value, noise, mask = _expected(expected, entry.part, slice(None), got)
    return diagnose(first.name, got, value, noise, mask)


def _feeders_of(name: str, truth: Truth) -> list[str]:
    """The tensors of the truth that a tensor is computed from, without those that were given to the candidate."""
    feeders = _feeders(name, truth)
    if truth.meta["mode"] == "forced":  # the input of each half-layer is given, and agrees by construction
        feeders = [feeder for feeder in feeders if not feeder.endswith(FORCED)]
    return feeders


def _feeders(name: str, truth: Truth) -> list[str]:
    if name == "hook_final_norm":
        return [other for other in truth.tensors if is_lens(other)][-1:]
    weights = [other for other in truth.tensors if other.startswith(WEIGHTS) and weight_feeds(other, name)]
    return [truth.meta["sae_hook"]] if name == "sae.features" else inputs_of(name) + weights


def _available(trace: Emitted) -> str:
    names = list(trace.entries)
    return f"the trace holds {len(names)} tensors" + (f": {', '.join(names[:4])}, …" if names else "")


def _judge(name: str, expected: Expected, trace: Emitted, agreed: bool | None) -> TensorResult:
    entry = trace.entries[name]
    if broken := malformed(entry, expected.shape, format_of(name, trace.dtype), agreed):
        return broken
    parts = chunks(entry)
    result = _judge_chunks(name, expected, trace, agreed, parts)
    # Leaked entries are counted over the whole tensor.
    again = result.reason == "masked" and len(parts) > 1
    return _judge_chunks(name, expected, trace, agreed, [slice(None)]) if again else result


def _judge_chunks(
    name: str, expected: Expected, trace: Emitted, agreed: bool | None, chunks: list[slice]
) -> TensorResult:
    tallies, exact, sums = [], True, RowSums(trace.dtype)
    unit = UNITS[format_of(name, trace.dtype)]
    for rows in chunks:
        got = trace.rows(name, rows)
        value, noise, mask = _expected(expected, trace.entries[name].part, rows, got)
        if broken := nonfinite(name, got, value, agreed):
            return broken
        if mask is not None and name.endswith("hook_pattern") and (leaked := np.argwhere((got != 0) & ~mask)).size:
            return _leak(name, leaked, got, mask, agreed)
        if name.endswith("hook_pattern") and got.shape[-1] == expected.shape[-1]:
            sums.add(got, value, rows.start or 0)
        exact = exact and not noise.any() and (mask is None or bool(mask.all())) and _is_float32(value)
        for block in blocks(got.shape):
            part = np.index_exp[..., block, :]
            got_part, value_part = got[part].astype(np.float64), value[part]
            mask_part = None if mask is None else mask[part]
            measured = measure(got_part - value_part, value_part, noise[part], mask_part, unit=unit)
            tallies.append(tally(measured, got_part, value_part, mask_part, (rows.start or 0) + block.start))
    return sums.judge(concluded(name, tallies, agreed, "exact by construction" if exact else "", exact))


def _is_float32(value: np.ndarray) -> bool:
    """Whether float32 holds each number: below its normal range a noise of 0 is one that was too small to keep."""
    return bool((value == value.astype(np.float32)).all())


def _expected(
    expected: Expected, part: Selection | None, rows: slice, got: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Value, noise and mask for the part and rows of a tensor that a trace holds."""
    chunk = expected if rows == slice(None) else expected.rows(rows)
    mask = chunk.allowed
    if mask is not None:
        mask = np.broadcast_to(selected(mask, part), got.shape)
    return selected(chunk.value, part), selected(chunk.noise, part), mask


def _leak(name: str, leaked: np.ndarray, got: np.ndarray, mask: np.ndarray, agreed: bool | None) -> TensorResult:
    index = tuple(int(i) for i in leaked[0])
    worst = Worst.of(list(index), float(got[index]), 0.0, 0.0, math.inf)
    detail = f"{len(leaked)} entries that the mask forbids are not 0"
    return TensorResult(
        name, Status.FAIL, "masked", math.inf, math.inf, math.inf, int(mask.sum()),
        int((~mask).sum()), len(leaked), float(np.abs(np.where(mask, 0.0, got)).sum()), inputs_agreed=agreed,
        worst=worst, detail=detail,
    )  # fmt: skip


def _judge_tokens(truth: Truth, trace: Emitted) -> list[TensorResult]:
    """The greedy next token at every position, and the ten most likely ones at the last.

    Tokens may be exchanged only where the truth's margin between them is inside the gate; such a tie is counted and
    does not fail.
    """
    entry, expected = trace.entries.get("logits"), truth.tensors.get("logits")
    if entry is None or expected is None or entry.part is not None or tuple(entry.shape) != expected.shape:
        return []
    decisions = flipped = wrong = 0
    for rows in chunks(entry):
        got = trace.rows("logits", rows).astype(np.float64)
        value, noise, _ = _expected(expected, None, rows, got)
        if not np.isfinite(got).all():
            return []
        ours, theirs = value.argmax(-1), got.argmax(-1)
        flips = ours != theirs
        decisions += flips.size
        # σ is needed only where the two sides differ, and at the last position.
        needed = np.flatnonzero(flips.any(0) | (np.arange(flips.shape[-1]) == flips.shape[-1] - 1))
        value, got, noise = value[:, needed], got[:, needed], noise[:, needed]
        ours, theirs, flips = ours[:, needed], theirs[:, needed], flips[:, needed]
        sigma = measure(np.zeros_like(value), value, noise, unit=UNITS[trace.dtype]).sigma
        margin = _at(value, ours) - _at(value, theirs)
        allowed = ELEMENT_GATE * (_at(sigma, ours) + _at(sigma, theirs))
        flipped, wrong = flipped + int(flips.sum()), wrong + int((flips & ~(margin < allowed)).sum())
    first = _discrete("logits.next_token", decisions, flipped, wrong)
    return [first, _top_tokens(value[:, -1], got[:, -1], sigma[:, -1])]


def _at(array: np.ndarray, index: np.ndarray) -> np.ndarray:
    """[B, T, V] at one entry of each position, [B, T]."""
    return np.take_along_axis(array, index[..., None], -1)[..., 0]


TOP_TOKENS = 10


def _top_tokens(value: np.ndarray, got: np.ndarray, sigma: np.ndarray) -> TensorResult:
    """Of one position of each row, [B, V]: a token in the top ten of one side only must tie with the tenth."""
    exchanged = wrong = 0
    for row, ours, theirs in zip(range(len(value)), _top(value), _top(got), strict=True):
        tenth, others = ours[-1], set(ours) ^ set(theirs)
        margins = [(abs(value[row, t] - value[row, tenth]), sigma[row, t] + sigma[row, tenth]) for t in others]
        exchanged += len(others) // 2
        wrong += (sum(1 for margin, noise in margins if not margin < ELEMENT_GATE * noise) + 1) // 2
    return _discrete("logits.top10_last_pos", len(value) * TOP_TOKENS, exchanged, wrong)


def _top(logits: np.ndarray) -> list[list[int]]:
    """The largest entries of each row, in order."""
    return [[int(token) for token in row] for row in np.argsort(-logits, kind="stable")[:, :TOP_TOKENS]]


def _discrete(name: str, decisions: int, flipped: int, wrong: int) -> TensorResult:
    status, reason = (Status.FAIL, "values") if wrong else (Status.PASS, "")
    detail = f"{flipped} of {decisions} differ, {flipped - wrong} of them ties inside the gate"
    return TensorResult(name, status, reason, compared=decisions, past=wrong, detail=detail)
