"""Compare a trace with the truth: header → presence → shape → dtype → finite → values.

Knows no model and no candidate: numbers in, results out.
"""

from __future__ import annotations

import math

import numpy as np

from candle_mi_parity.compare_sae import judge_sae, judge_sae_scalars, say_whose_fault
from candle_mi_parity.diagnose import Diagnosis, diagnose
from candle_mi_parity.errors import TraceError
from candle_mi_parity.families import inputs_of
from candle_mi_parity.gate import ELEMENT_GATE, UNITS, measure
from candle_mi_parity.judge import judged, malformed, nonfinite, selected
from candle_mi_parity.trace import Emitted, Trace
from candle_mi_parity.truth import Truth, TruthTensor
from candle_mi_parity.verdict import Status, TensorResult, Worst


def check_header(truth: Truth, trace: Trace, inputs_digest: str | None) -> None:
    """Refuse a trace of something else before any number is compared.

    :param inputs_digest: sha256 of the inputs file that the candidate was to be fed; None for none.
    :raises TraceError: what was found, what was expected.
    """
    header = trace.header
    checks = [
        ("case digest", header.case.digest, truth.meta["case"]),
        ("model digest", header.model_digest, truth.meta["model"]),
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
        hint += ": the reference has BOS at 0, the candidate has not"
    elif other[1:] == first:
        hint += ": the candidate's BOS is doubled"
    return f"{hint}; expected {expected}, found {found}"


def compare(
    truth: Truth, trace: Emitted, decoder: np.ndarray | None, selection: set[str] | None
) -> list[TensorResult]:
    """All tensors of a case, in execution order, then the SAE's scalars.

    :param decoder: ``W_dec`` [d_sae, d_in], to give the reconstruction the features that were excused.
    :param selection: the tensors that a trace stored in part is to hold; None for all.
    :raises TraceError: a tensor whose bytes are not what the trace declares.
    """
    results: list[TensorResult] = []
    passed: dict[str, bool] = {}
    forced = truth.meta["mode"] == "forced"
    for name, expected in truth.tensors.items():
        if selection is not None and name not in selection:
            continue
        feeders = [feeder for feeder in _feeders(name, truth) if feeder in passed]
        if forced:  # what a half-layer starts from is given, and agrees by construction
            feeders = [feeder for feeder in feeders if not feeder.endswith(("resid_pre", "resid_mid"))]
        agreed = all(passed[feeder] for feeder in feeders) if feeders else None
        if name not in trace.entries:
            result = TensorResult(name, Status.FAIL, "missing", detail=_there(trace))
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
    results = say_whose_fault(results)
    return results + _judge_tokens(truth, trace) + judge_sae_scalars(truth, trace, decoder, chains)


def look(truth: Truth, trace: Emitted, results: list[TensorResult]) -> Diagnosis | None:
    """What the error of the first diverging tensor looks like; None where there are no two tensors to look at."""
    first = next((result for result in results if result.status is Status.FAIL), None)
    if first is None or first.reason not in ("values", "masked", "nonfinite", "flips"):
        return None
    entry, expected = trace.entries.get(first.name), truth.tensors.get(first.name)
    if entry is None or expected is None:
        return None
    got = trace.tensor(first.name).astype(np.float64)
    value, noise = selected(expected.value, entry.part), selected(expected.noise, entry.part)
    mask = None
    if expected.allowed is not None:
        mask = np.broadcast_to(selected(expected.allowed, entry.part), got.shape)
    return diagnose(first.name, got, value, noise, mask)


def _feeders(name: str, truth: Truth) -> list[str]:
    if name == "hook_final_norm":
        return [other for other in truth.tensors if other.endswith("hook_resid_post")][-1:]
    return [truth.meta["sae_hook"]] if name == "sae.features" else inputs_of(name)


def _there(trace: Emitted) -> str:
    names = list(trace.entries)
    return f"the trace holds {len(names)} tensors" + (f": {', '.join(names[:4])}, …" if names else "")


def _judge(name: str, expected: TruthTensor, trace: Emitted, agreed: bool | None) -> TensorResult:
    entry = trace.entries[name]
    if broken := malformed(entry, expected.value.shape, trace.dtype, agreed):
        return broken
    got = trace.tensor(name).astype(np.float64)
    value, noise = selected(expected.value, entry.part), selected(expected.noise, entry.part)
    if broken := nonfinite(name, got, value, agreed):
        return broken
    mask = None
    if expected.allowed is not None:
        mask = np.broadcast_to(selected(expected.allowed, entry.part), got.shape)
        if name.endswith("hook_pattern") and (leaked := np.argwhere((got != 0) & ~mask)).size:
            return _leak(name, leaked, got, mask, agreed)
    error = got - value
    measured = measure(error, value, noise, mask, unit=UNITS[trace.dtype])
    if not noise.any() and (mask is None or mask.all()):
        return judged(name, measured, got, value, mask, agreed, "exact by construction", exact=True)
    return judged(name, measured, got, value, mask, agreed)


def _leak(name: str, leaked: np.ndarray, got: np.ndarray, mask: np.ndarray, agreed: bool | None) -> TensorResult:
    index = tuple(int(i) for i in leaked[0])
    worst = Worst.of(list(index), float(got[index]), 0.0, 0.0, math.inf)
    detail = f"{len(leaked)} entries that the mask forbids are not 0"
    return TensorResult(
        name, Status.FAIL, "masked", math.inf, math.inf, math.inf, int(mask.sum()),
        int((~mask).sum()), len(leaked), inputs_agreed=agreed, worst=worst, detail=detail,
    )  # fmt: skip


def _judge_tokens(truth: Truth, trace: Emitted) -> list[TensorResult]:
    """The greedy next token at every position, and the ten likeliest at the last.

    A token may take another's place only where the truth's own margin between the two is inside the gate; such
    a tie is counted, not failed.
    """
    entry, expected = trace.entries.get("logits"), truth.tensors.get("logits")
    if entry is None or expected is None or entry.part is not None or tuple(entry.shape) != expected.value.shape:
        return []
    got, value = trace.tensor("logits").astype(np.float64), expected.value
    if not np.isfinite(got).all():
        return []
    sigma = measure(np.zeros_like(value), value, expected.noise, unit=UNITS[trace.dtype]).sigma
    ours, theirs = value.argmax(-1)[..., None], got.argmax(-1)[..., None]
    margin = (np.take_along_axis(value, ours, -1) - np.take_along_axis(value, theirs, -1))[..., 0]
    allowed = ELEMENT_GATE * sum(np.take_along_axis(sigma, index, -1)[..., 0] for index in (ours, theirs))
    flips = ours[..., 0] != theirs[..., 0]
    first = _discrete("logits.next_token", flips.size, int(flips.sum()), int((flips & ~(margin < allowed)).sum()))
    return [first, _top_tokens(value[0, -1], got[0, -1], sigma[0, -1])]


TOP_TOKENS = 10


def _top_tokens(value: np.ndarray, got: np.ndarray, sigma: np.ndarray) -> TensorResult:
    """Of one position [V]: a token of one side's top ten that the other has not must tie with its tenth."""
    ours, theirs = (set(np.argsort(-logits, kind="stable")[:TOP_TOKENS].tolist()) for logits in (value, got))
    tenth = min(ours, key=lambda token: value[token])
    odd = ours ^ theirs
    wrong = [t for t in odd if not abs(value[t] - value[tenth]) < ELEMENT_GATE * (sigma[t] + sigma[tenth])]
    return _discrete("logits.top10_last_pos", TOP_TOKENS, len(odd) // 2, (len(wrong) + 1) // 2)


def _discrete(name: str, decisions: int, flipped: int, wrong: int) -> TensorResult:
    status, reason = (Status.FAIL, "values") if wrong else (Status.PASS, "")
    detail = f"{flipped} of {decisions} differ, {flipped - wrong} of them ties inside the gate"
    return TensorResult(name, status, reason, compared=decisions, past=wrong, detail=detail)
