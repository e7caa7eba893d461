"""candle-mi's public functions, called directly, give what float64 gives: each release and each call."""

import functools
from pathlib import Path

import pytest

from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.coverage.calls import CallRow, emit_calls, load_calls, read_calls
from candle_mi_parity.coverage.calls_compare import CallVerdict, judge_calls, load_known_calls
from candle_mi_parity.coverage.calls_truth import CallTruth, truth_of
from candle_mi_parity.spec.paths import ROOT, cache_root

TABLE = load_calls()
ROWS = {row.id: row for row in TABLE.call}
STORED = sorted((ROOT / "rust_outputs").glob("*/calls.json"))


@functools.cache
def truth(call: str) -> CallTruth:
    return truth_of(ROWS[call], TABLE, cache_root())


def judge(path: Path) -> dict[str, CallVerdict]:
    def of_row(row: CallRow) -> CallTruth:
        return truth(row.id)

    return {verdict.id: verdict for verdict in judge_calls(TABLE, read_calls(path), of_row, load_known_calls())}


judge_stored = functools.cache(judge)


def test_every_release_is_stored() -> None:
    assert [path.parent.name for path in STORED] == ["0.1.10", "0.1.24", "0.1.6", "0.2.2"]


@pytest.mark.parametrize("call", ROWS)
@pytest.mark.parametrize("path", STORED, ids=lambda path: path.parent.name)
def test_stored_calls(path: Path, call: str) -> None:
    verdict = judge_stored(path)[call]
    if verdict.status == "KNOWN":
        pytest.xfail(verdict.why)
    assert verdict.status in ("PASS", "ABSENT"), verdict.why


@pytest.mark.rust
def test_live_calls(tmp_path: Path) -> None:
    verdicts = judge(emit_calls(parse_candidate("0.2.2"), cache_root(), tmp_path / "calls.json", print))
    assert [verdict for verdict in verdicts.values() if verdict.status in ("FAIL", "STALE")] == []
