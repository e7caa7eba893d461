"""The record of the proof: what the report shows, and what README and docs say, is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from candle_mi_parity.errors import ProofError
from candle_mi_parity.report import proof_record
from candle_mi_parity.report.page import render
from candle_mi_parity.report.proof_record import RECORD, ProofRecord, Table, load_proof
from proof import record
from tests.support.results import everything


@pytest.fixture(scope="module")
def proof() -> ProofRecord:
    return load_proof()


@pytest.mark.parametrize("page", record.PAGES, ids=lambda page: page.name)
def test_the_pages_say_what_was_measured(page: Path, proof: ProofRecord) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<!-- proof: " in text
    assert record.filled(text, proof) == text, "python -m proof.record fills it"


def test_a_number_written_by_hand_is_found(proof: ProofRecord) -> None:
    text = record.PAGES[0].read_text(encoding="utf-8")
    false = text.replace("planted mistakes", "planted and caught mistakes")
    assert false != text and record.filled(false, proof) == text


def test_a_marker_with_nothing_between_is_filled(proof: ProofRecord) -> None:
    filled = record.filled("<!-- proof: faults -->\n<!-- /proof -->\n", proof)
    assert "| in candle-mi's own source | 15/15 |" in filled and record.filled(filled, proof) == filled


def test_a_marker_that_names_nothing_is_refused(proof: ProofRecord) -> None:
    with pytest.raises(ProofError, match="no table or claim invented"):
        record.filled("<!-- proof: invented -->\n1000 of 1000\n<!-- /proof -->", proof)


@pytest.mark.parametrize(
    ("states", "said"), [(["a", "a"], "a"), (["a", "b"], "several"), (["a", None], "several"), ([None], "unknown")]
)
def test_what_was_measured_under_other_rules_is_not_of_these(states: list[str | None], said: str) -> None:
    assert record.measured_by([{"measured_by": state} if state else {} for state in states]) == said


def test_a_command_that_was_not_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProofError, match="run make faults"):
        record.read("faults", tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"format": "other"}, {"extra": 1}, {"rules": None}, {"tables": [{"name": "a"}]}],
    ids=lambda change: next(iter(change)),
)
def test_a_record_of_another_kind_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "proof.json"
    path.write_text(json.dumps(json.loads(RECORD.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(ProofError, match=r"python -m proof\.record"):
        load_proof(path)


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="not rectangular"):
        Table(name="a", title="", note="", columns=["x", "y"], rows=[["1"]])


def test_the_report_shows_each_table_and_whether_it_is_of_these_rules(
    proof: ProofRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = render(everything())
    assert all(table.title in page for table in proof.tables if table.rows)
    monkeypatch.setattr(proof_record, "rules_digest", lambda: proof.rules)
    assert "on the very rules of this run" in render(everything())
    monkeypatch.setattr(proof_record, "rules_digest", lambda: "others")
    assert "before the last edit of the rules" in render(everything())
