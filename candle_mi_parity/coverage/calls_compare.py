"""Judging direct calls: each answered once, each result inside the gate, what diverges listed and no more."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from candle_mi_parity.compare.gate import POSITION_GATE, TINY, UNIT, measure
from candle_mi_parity.coverage.calls import Answered, CallRow, Calls, CallTable
from candle_mi_parity.coverage.calls_truth import CallTruth
from candle_mi_parity.errors import ExplanationError, TraceError
from candle_mi_parity.spec.cases import Row, read_toml
from candle_mi_parity.spec.paths import FIXTURES

Status = Literal["PASS", "FAIL", "KNOWN", "STALE", "ABSENT"]


class KnownCall(Row):
    """A divergence of one call in the listed releases, and why.

    :ivar fault: what :func:`fault` says of it; its numbers may differ in the fourth digit, as on another processor.
    """

    call: str
    versions: list[str]
    kind: Literal["wrong number", "silent no-op", "refusal", "different definition"]
    fault: str
    why: str


class KnownCalls(Row):
    """:ivar absent: function → the releases that lack it."""

    absent: dict[str, list[str]] = Field(default_factory=dict)
    known: list[KnownCall] = Field(default_factory=list)


@dataclass(frozen=True)
class CallVerdict:
    """:ivar why: the first fault, empty where there is none."""

    id: str
    status: Status
    why: str


def load_known_calls(path: Path = FIXTURES / "known_calls.toml") -> KnownCalls:
    """:raises ExplanationError: malformed, or a call twice for one version."""
    known = read_toml(path, KnownCalls, ExplanationError)
    pairs = [(entry.call, version) for entry in known.known for version in entry.versions]
    if len(set(pairs)) != len(pairs):
        raise ExplanationError(f"{path}: a call is listed twice for one version")
    return known


def judge_calls(
    table: CallTable, calls: Calls, truth: Callable[[CallRow], CallTruth], known: KnownCalls
) -> list[CallVerdict]:
    """One verdict per row of the table.

    :raises TraceError: another table, other inputs, a call missing, unknown or answered twice.
    :raises ExplanationError: a known call that the table lacks.
    """
    if calls.case.digest != table.digest():
        raise TraceError("the calls are of another table; emit them again")
    if calls.inputs_digest != table.inputs_digest():
        raise TraceError("the calls were answered on other inputs than the table's; emit them again")
    counts = Counter(answer.id for answer in calls.calls)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise TraceError(f"calls answered twice: {', '.join(twice)}")
    rows = {row.id for row in table.call}
    if wrong := sorted(rows ^ set(counts)):
        raise TraceError(f"calls missing or unknown: {', '.join(wrong)}")
    if unknown := sorted({entry.call for entry in known.known} - rows):
        raise ExplanationError(f"known calls that the table lacks: {', '.join(unknown)}")
    version = calls.candle_mi.version
    listed = {entry.call: entry for entry in known.known if version in entry.versions}
    lacking = {fn for fn, versions in known.absent.items() if version in versions}
    answers = {answer.id: answer for answer in calls.calls}
    verdicts = []
    for row in table.call:
        answer = answers[row.id]
        if (answer.outcome == "absent") != (row.fn in lacking):
            verdicts.append(
                CallVerdict(row.id, "FAIL", f"{row.fn} is {answer.outcome}, against the list of absent ones")
            )
        elif answer.outcome == "absent":
            verdicts.append(CallVerdict(row.id, "ABSENT", f"{version} has no {row.fn}"))
        else:
            verdicts.append(_verdict(row, answer, truth(row), listed.get(row.id)))
    return verdicts


def _verdict(row: CallRow, answer: Answered, truth: CallTruth, known: KnownCall | None) -> CallVerdict:
    why = fault(row, answer, truth)
    if known is None:
        return CallVerdict(row.id, "FAIL" if why else "PASS", why)
    if not why:
        return CallVerdict(row.id, "STALE", "listed as known, but it passes")
    if (known.kind == "refusal") != (answer.outcome == "error"):
        return CallVerdict(row.id, "FAIL", f"not the {known.kind} that is known: {why}")
    if not _alike(why, known.fault):
        return CallVerdict(row.id, "FAIL", f"{why}; known is another fault: {known.fault}")
    return CallVerdict(row.id, "KNOWN", f"{known.kind}: {known.why}")


_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def _alike(one: str, other: str) -> bool:
    """The same words, and numbers that agree in three digits."""
    (mine, theirs) = (np.array(_NUMBER.findall(text), dtype=np.float64) for text in (one, other))
    same_words = _NUMBER.sub("#", one) == _NUMBER.sub("#", other)
    return same_words and bool(np.allclose(mine, theirs, rtol=1e-3, atol=0))


def fault(row: CallRow, answer: Answered, truth: CallTruth) -> str:
    """What is wrong with one answer, in one line; empty where nothing is."""
    if answer.outcome == "error":
        return f"refused: {answer.error}"
    names = [result.name for result in answer.results]
    expected = {"top_changed_tokens": ["tokens", *truth.values], "encode_sparse": ["indices", "values"]}
    if names != expected.get(row.fn, list(truth.values)):
        return f"results are {names or 'none'}"
    got = {result.name: result.array() for result in answer.results}
    if row.fn == "top_changed_tokens":
        return _top_changed(row, got, truth)
    if row.fn == "encode_sparse":
        return _sparse(got, truth)
    if row.fn == "pca_top_k" and got["components"].shape == truth.values["components"].shape:
        sign = np.sign((got["components"] * truth.values["components"]).sum(-1, keepdims=True))
        got["components"] = got["components"] * sign
    for name, value in got.items():
        if why := _tensor(row, name, value, truth.values[name], truth.noise[name]):
            return why
    return ""


def _tensor(row: CallRow, name: str, got: np.ndarray, truth: np.ndarray, noise: np.ndarray) -> str:
    if got.shape != truth.shape:
        return f"{name} has shape {list(got.shape)}, expected {list(truth.shape)}"
    if row.exact:
        narrow = truth.astype(np.float32).astype(np.float64)
        if row.ties:
            got, narrow = np.sort(got, -1), np.sort(narrow, -1)
        # NaN equals nothing, itself included.
        wrong = np.argwhere(~np.atleast_1d(got == narrow))
        if len(wrong) == 0:
            return ""
        at = tuple(wrong[0])
        return f"{name}{list(map(int, at))} is {np.atleast_1d(got)[at]:.9g}, expected {np.atleast_1d(narrow)[at]:.9g}"
    shape = (1, -1, truth.shape[-1]) if truth.ndim else (1, 1, 1)
    found = measure((got - truth).reshape(shape), truth.reshape(shape), noise.reshape(shape))
    if found.unresolved.any():
        return f"{name} cannot be judged: its noise is too large"
    if found.passes():
        return ""
    at = np.unravel_index(np.nanargmax(np.nan_to_num(found.element.ravel(), nan=np.inf)), shape_of(truth))
    pair = np.reshape(got, shape_of(truth))[at], np.reshape(truth, shape_of(truth))[at]
    return f"{name}{list(map(int, at))} is {pair[0]:.9g}, expected {pair[1]:.9g}"


def shape_of(array: np.ndarray) -> tuple[int, ...]:
    """A scalar counts as a list of one."""
    return array.shape or (1,)


def _top_changed(row: CallRow, got: dict[str, np.ndarray], truth: CallTruth) -> str:
    """Any order that the truth's margins allow; the values at the tokens that were named."""
    tokens, change = got["tokens"], truth.values["change"]
    k = row.args["k"]
    assert isinstance(k, int)
    if tokens.shape != (min(k, change.size),):
        return f"{tokens.size} tokens, expected {min(k, change.size)}"
    if len(set(tokens)) != tokens.size or not np.isin(tokens, np.arange(change.size)).all():
        return f"tokens are {tokens.tolist()}, expected distinct ones below {change.size}"
    at = tokens.astype(int)
    best = np.argsort(-change, kind="stable")[: tokens.size]
    slack = POSITION_GATE * (truth.noise["change"][at] + truth.noise["change"][best] + UNIT * change[best]) + TINY
    if not (np.abs(change[at] - change[best]) <= slack).all():
        return f"tokens are {at.tolist()}, expected {best.tolist()}"
    for name in truth.values:
        if why := _tensor(row, name, got[name], truth.values[name][at], truth.noise[name][at]):
            return why
    return ""


def _sparse(got: dict[str, np.ndarray], truth: CallTruth) -> str:
    """Exact: the positive features, largest first; equal ones in any order."""
    features = truth.values["features"].astype(np.float32).astype(np.float64)
    indices, values = got["indices"], got["values"]
    if indices.shape != values.shape or indices.ndim != 1:
        return f"{indices.shape} indices for {values.shape} values"
    if sorted(indices) != np.flatnonzero(features > 0).tolist():
        return f"indices are {indices.astype(int).tolist()}, expected {np.flatnonzero(features > 0).tolist()}"
    if not np.array_equal(values, features[indices.astype(int)]):
        return f"values are {values.tolist()}, expected {features[indices.astype(int)].tolist()}"
    return "" if (np.diff(values) <= 0).all() else f"values are not in descending order: {values.tolist()}"
