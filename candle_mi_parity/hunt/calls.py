"""Hunt in direct calls: generate them, judge them against PyTorch, and shrink each new divergence."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis.errors import NoSuchExample
from hypothesis.strategies import SearchStrategy

from candle_mi_parity.compare.gate import UNIT
from candle_mi_parity.compare.hunt_result import Cause, Tally
from candle_mi_parity.compare.verdict import Status, TensorResult
from candle_mi_parity.coverage.calls import Answered, CallRow, CallTable, load_calls
from candle_mi_parity.coverage.calls_compare import Results, compare_call
from candle_mi_parity.coverage.calls_judge import PANICKED, KnownCall, KnownCalls, load_known_calls
from candle_mi_parity.coverage.calls_wrong import SAE_FORMULAS
from candle_mi_parity.coverage.formulas import Formula
from candle_mi_parity.hunt.call_caches import GENERATED
from candle_mi_parity.hunt.call_truth import OVERFLOW, Expected, Truths, expected
from candle_mi_parity.hunt.callees import Callee, TorchCallee, write_inputs
from candle_mi_parity.spec.explanations import baseline
from candle_mi_parity.trace.truth import TruthTensor

CALL = "call"
"""The first wrong result of a call that has none, or should have none."""
Signature = tuple[str, str, str]
"""What is called, the first wrong result, and in which way: of causes with one signature the first is reported."""
_WITHOUT_ENCODING = ("decode", "decoder_vector")


@dataclass(frozen=True)
class KnownOf:
    """What is known of one release.

    :ivar of: function → id → known cause.
    """

    of: dict[str, dict[str, KnownCall]] = field(default_factory=dict)

    @staticmethod
    def release(version: str, known: KnownCalls | None = None, table: CallTable | None = None) -> KnownOf:
        """The rows of the release that a version is held to, by the functions of the calls that they list.

        A wrong formula of an SAE's activation concerns every function that encodes.

        :param version: empty for a candidate of which nothing is known.
        """
        table = table or load_calls()
        functions = {row.id: row.fn for row in table.call}
        encoding = {row.fn for row in table.call if row.sae is not None} - set(_WITHOUT_ENCODING)
        found = KnownOf()
        if not version:
            return found
        matches = list((known or load_known_calls()).matches(table))
        release = baseline((row for row, _ in matches), version)
        for row, call in matches:
            if release not in row.releases:
                continue
            for fn in encoding if row.formula in SAE_FORMULAS else {functions[call]}:
                found.of.setdefault(fn, {})[row.id] = row
        return found

    def together(self, fn: str) -> Iterator[tuple[tuple[str, ...], list[Formula]]]:
        """Ids and their wrong formulas: one or several, fewest first."""
        rows = {row.id: row.formula for row in self.of.get(fn, {}).values() if row.formula is not None}
        for count in range(1, len(rows) + 1):
            for some in combinations(rows, count):
                yield some, [rows[id] for id in some]

    def refusal(self, fn: str, message: str) -> str | None:
        """The id of the row that has the message."""
        rows = self.of.get(fn, {}).values()
        return next((row.id for row in rows if row.refuses and re.fullmatch(row.refuses, message)), None)


@dataclass(frozen=True)
class Judged:
    """One call, judged.

    :ivar what: a field of :class:`Tally`, or ``cause``.
    :ivar why: the key in that field; of a cause the detail.
    """

    what: str
    why: str = ""
    first: str = ""
    reason: str = ""
    ids: tuple[str, ...] = ()


def judge(table: CallTable, answer: Answered, directory: Path, known: KnownOf) -> Judged:
    """Judge the answer to the table's only call.

    :param directory: where the inputs were written.
    """
    (row,) = table.call
    quick = expected(table, directory, noisy=False)
    if answer.outcome == "absent":  # an older release has fewer functions
        return Judged("refused", f"there is no {row.fn}")
    if answer.error is not None:
        return _refusal(row, answer.error, quick, known)
    got = {each.name: each.array() for each in answer.results}
    if quick.raises and class_of(table) in _NONFINITE and any(np.isnan(value).any() for value in got.values()):
        return Judged("agree")  # PyTorch's eigh refuses NaN, which may as well come out
    wanted = quick
    if not quick.raises:
        if not quick.unknown and _all_pass(compare(quick, got)):
            return Judged("agree")
        wanted = expected(table, directory)
        if wanted.unknown:
            return Judged("no_truth", without_numbers(wanted.unknown))
        results = compare(wanted, got)
        status = {each.status for each in results}
        if Status.FAIL not in status:
            return Judged("unmeasured" if Status.UNMEASURED in status else "agree")
    for ids, formulas in known.together(row.fn):
        if _under(table, directory, formulas, got):
            return Judged("known", ids=ids)
    if wanted.raises:
        shown = {name: value.tolist() for name, value in got.items()}
        return Judged("cause", f"gives {shown}, and PyTorch raises: {wanted.raises}", CALL, "not refused")
    first = next(each for each in results if each.status is Status.FAIL)
    return Judged("cause", _detail(first, got, wanted), first.name, first.reason)


def _all_pass(results: list[TensorResult]) -> bool:
    return all(each.status is Status.PASS for each in results)


def _under(table: CallTable, directory: Path, formulas: list[Formula], got: Results) -> bool:
    """Whether the answer is that of wrong formulas. A value that is unknown or lost in noise explains nothing.

    Beyond float32's range only the same numbers do, of the formulas in float32.
    """
    for noisy in (False, True):
        under = expected(table, directory, formulas, noisy)
        if under.unknown == OVERFLOW:
            answer = TorchCallee(formulas).answer(table, directory)
            return _same({each.name: each.array() for each in answer.results}, got)
        if under.raises or under.unknown:
            return False
        # A formula determines which of equal features are kept.
        strict = under.row.model_copy(update={"ties": False})
        if _all_pass(compare(replace(under, row=strict), got)):
            return True
    return False


def _same(one: Results, other: Results) -> bool:
    """Whether two answers are the same float32 numbers, but for a few roundings: kernels add in different orders."""
    pairs = [(one[name], other[name]) for name in one if name in other]
    return one.keys() == other.keys() and all(_alike(*pair) for pair in pairs)


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.allclose(one, other, rtol=8 * UNIT, atol=0.0, equal_nan=True)


def _refusal(row: CallRow, message: str, wanted: Expected, known: KnownOf) -> Judged:
    panicked = message.startswith(PANICKED)
    if (wanted.raises or wanted.unknown) and not panicked:
        return Judged("refused", without_numbers(message))
    if (id := known.refusal(row.fn, message)) is not None:
        return Judged("known", ids=(id,))
    if panicked:
        return Judged("cause", message, CALL, "panic")
    return Judged("cause", f"refuses: {message}", CALL, f"refused: {without_numbers(message)}")


def _detail(first: TensorResult, got: Results, wanted: Expected) -> str:
    if first.name not in got or first.name not in wanted.values:
        return first.detail
    shown, right = got[first.name].tolist(), wanted.values[first.name].value.tolist()
    return f"{first.name} is {shown}, PyTorch gives {right}"


def compare(wanted: Expected, got: Results) -> list[TensorResult]:
    """Every result of an answer; NaN and infinities of PyTorch have to be there, and nowhere else."""
    row, truth = wanted.row, wanted.values
    if row.fn == "pca_top_k" and wanted.free and set(got) == {"components", "eigenvalues", "explained"}:
        free = [
            TensorResult(name, Status.PASS if np.isfinite(got[name]).all() else Status.FAIL, "nonfinite")
            for name in wanted.free
        ]
        return [*compare(Expected(_plain(row), truth), {name: got[name] for name in truth}), *free]
    if row.fn == "encode_sparse":
        return _sparse(row, got, truth["features"])
    finite = all(np.isfinite(each.value).all() for each in truth.values())
    if row.fn == "top_changed_tokens" and not finite and "tokens" in got:
        return _any_order(row, got, truth)
    return compare_call(row, got, truth)


def _plain(row: CallRow) -> CallRow:
    """The row without its function's own rules."""
    return row.model_copy(update={"fn": "values"})


def _sparse(row: CallRow, got: Results, features: TruthTensor) -> list[TensorResult]:
    """NaN have no order: they are compared apart, and the others as if those features did not fire."""
    if list(got) != ["indices", "values"] or got["indices"].shape != got["values"].shape:
        return compare_call(row, got, {"features": features})
    lost, nan = np.isnan(features.value), np.isnan(got["values"])
    if not np.array_equal(np.sort(got["indices"][nan]), np.flatnonzero(lost)):
        detail = f"NaN at features {got['indices'][nan].tolist()}, expected at {np.flatnonzero(lost).tolist()}"
        return [TensorResult("values", Status.FAIL, "nonfinite", detail=detail)]
    others = {"features": TruthTensor(np.where(lost, 0.0, features.value), features.noise)}
    return compare_call(row, {name: array[~nan] for name, array in got.items()}, others)


def _any_order(row: CallRow, got: Results, truth: Truths) -> list[TensorResult]:
    """Changes that are NaN have no order: the named tokens' values are compared."""
    tokens, size = got["tokens"], truth["change"].value.size
    k = min(int(str(row.args["k"])), size)
    if tokens.size != k or len(set(tokens)) != k or not np.isin(tokens, np.arange(size)).all():
        return [TensorResult("tokens", Status.FAIL, "values", detail=f"got tokens {tokens.tolist()} of {size}")]
    at = tokens.astype(int)
    chosen = {name: TruthTensor(each.value[at], each.noise[at]) for name, each in truth.items()}
    return compare_call(_plain(row), {name: got[name] for name in truth}, chosen)


_NONFINITE = ("NaN in an input", "an infinite input")


def class_of(table: CallTable) -> str:
    """What is special about the inputs, for the signature of a cause."""
    arrays = list(table.arrays().values())
    if any(np.isnan(array).any() for array in arrays):
        return _NONFINITE[0]
    if any(np.isinf(array).any() for array in arrays):
        return _NONFINITE[1]
    return "an empty input" if any(array.size == 0 for array in arrays) else ""


def without_numbers(message: str) -> str:
    """A message as a key: the same for all shapes."""
    return re.sub(r"\d+", "N", message)


class _Hunt:
    def __init__(self, callee: Callee, known: KnownOf, scratch: Path, already: Collection[Cause]) -> None:
        self._callee, self._known, self._scratch = callee, known, scratch
        self.tally = Tally()
        self.causes: list[Cause] = []
        self._counted: dict[Signature, Cause] = {(each.what, each.first, each.reason): each for each in already}

    def judge(self, table: CallTable) -> Judged:
        directory = write_inputs(table, self._scratch)
        return judge(table, self._callee.answer(table, directory), directory, self._known)

    def search(self, what: str, strategy: SearchStrategy[CallTable], examples: int, random: Random) -> None:
        """Try a number of calls of a kind; after a cause is found and shrunk, the others."""
        end = self.tally.tried + examples
        while self.tally.tried < end:
            before = self.tally.tried
            wanted: list[Signature] = []
            verdicts: dict[str, Judged] = {}  # a candidate that draws random numbers may answer otherwise next time

            def diverges(
                table: CallTable, wanted: list[Signature] = wanted, verdicts: dict[str, Judged] = verdicts
            ) -> bool:
                if not wanted and self.tally.tried >= end:
                    return False
                if (found := verdicts.get(key := table.model_dump_json())) is None:
                    found = verdicts[key] = self.judge(table)
                if wanted:  # shrinking
                    return found.what == "cause" and self._signature(what, table, found) == wanted[0]
                if (new := self._count(what, table, found)) is None:
                    return False
                wanted.append(new)
                return True

            try:
                smallest = find(
                    strategy, diverges, random=random,
                    settings=settings(
                        max_examples=end - before, database=None, deadline=None,
                        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
                    ),
                )  # fmt: skip
            except NoSuchExample:
                return
            self._report(wanted[0], smallest, verdicts[smallest.model_dump_json()])

    def _signature(self, what: str, table: CallTable, found: Judged) -> Signature:
        # Whether a call is refused rarely depends on its numbers.
        special = class_of(table) if found.first != CALL else ""
        return what, found.first, ", ".join(part for part in (found.reason, special) if part)

    def _count(self, what: str, table: CallTable, found: Judged) -> Signature | None:
        """Count a call; the signature of a new cause."""
        self.tally.tried += 1
        if found.what == "cause":
            signature = self._signature(what, table, found)
            if (cause := self._counted.get(signature)) is None:
                return signature
            cause.count += 1
        elif found.what in ("agree", "unmeasured"):
            setattr(self.tally, found.what, getattr(self.tally, found.what) + 1)
        else:
            for key in found.ids or (found.why,):
                group: dict[str, int] = getattr(self.tally, found.what)
                group[key] = group.get(key, 0) + 1
        return None

    def _report(self, signature: Signature, smallest: CallTable, found: Judged) -> None:
        row = smallest.model_dump(mode="json", exclude_defaults=True)
        self.causes.append(Cause("call", *signature, found.why, row))
        self._counted[signature] = self.causes[-1]


def hunt_calls(
    callee: Callee,
    version: str,
    seed: int,
    examples: int,
    scratch: Path,
    already: Collection[Cause] = (),
    known: KnownOf | None = None,
    functions: str = "*",
) -> tuple[Tally, list[Cause]]:
    """Generate calls of every function, and shrink each new divergence.

    :param version: the release whose known causes are subtracted; empty for none.
    :param examples: number of calls, without those that shrinking tries.
    :param scratch: a directory for inputs and answers.
    :param already: causes that were found earlier, whose ``count`` grows.
    :param known: what is known, in place of the release's rows.
    :param functions: a glob over the keys of :data:`call_inputs.GENERATED`.
    """
    hunt = _Hunt(callee, known or KnownOf.release(version), scratch, already)
    random = Random(seed)
    chosen = fnmatch.filter(GENERATED, functions)
    for place, what in enumerate(chosen):
        share = examples * (place + 1) // len(chosen) - examples * place // len(chosen)
        hunt.search(what, GENERATED[what], share, random)
    return hunt.tally, hunt.causes
