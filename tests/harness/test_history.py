"""History: when a divergence came and when it went, read off the stored releases."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from candle_mi_parity.compare.run_result import RunResult
from candle_mi_parity.compare.verdict import CaseResult, Failure, Outcome, Status, TensorResult
from candle_mi_parity.files.json_out import write_json
from candle_mi_parity.judge.case import Progress
from candle_mi_parity.report import history
from candle_mi_parity.report.history import History, make_history
from candle_mi_parity.run.run import RunOptions, run_cases
from candle_mi_parity.spec.cases import load_cases

RELEASES = ("0.1.6", "0.1.10", "0.1.24", "0.2.2")
CHOSEN = ("llama/hub", "llama/v5", "llama/rope-linear", "llama/rope-yarn", "qwen3/window")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> History:
    """Five cases of every stored release."""
    out, cases = tmp_path_factory.mktemp("out"), [case for case in load_cases() if case.id in CHOSEN]
    return make_history(
        {
            release: run_cases(RunOptions(f"stored:{release}", CHOSEN, out), cases, {}, Progress())
            for release in RELEASES
        }
    )


def steps(told: History, case: str) -> list[str]:
    return next(line for line in told.lines if line.case == case).steps()


def test_a_divergence_that_went_has_its_arrow_where_it_went(stored: History) -> None:
    assert steps(stored, "llama/rope-linear") == ["", "·", "↑", "·"]
    assert steps(stored, "llama/rope-yarn") == ["", "·", "↑", "·"], "a refusal is better than a wrong number"
    assert steps(stored, "qwen3/window") == ["", "·", "↓", "·"], "a wrong number is worse than a refusal"
    assert steps(stored, "llama/v5") == steps(stored, "llama/hub") == ["", "·", "·", "·"]


def test_a_cell_names_the_first_tensor_and_its_size(stored: History) -> None:
    line = next(line for line in stored.lines if line.case == "llama/v5")
    for cell in line.cells:
        assert cell is not None and cell.outcome is Outcome.DIVERGES
        assert cell.first == "blocks.0.attn.hook_scores" and cell.ratio is not None and 1e6 < cell.ratio < 3e6
        assert cell.note.startswith("CMI001: ") and "rope_parameters" in cell.note, "what is known of it"


def test_a_family_is_counted_and_told_what_came_and_went(stored: History) -> None:
    llama = stored.summary("llama", 2)
    assert llama.counts[Outcome.AGREES] == 2 and llama.counts[Outcome.DIVERGES] == 1
    assert [name.split(":")[0] for name in llama.went] == ["llama/rope-linear", "llama/rope-yarn"]
    assert stored.summary("qwen3", 2).came == ["qwen3/window: refused → diverges"]


def test_the_page_and_the_json_hold_all_of_it(stored: History, tmp_path: Path) -> None:
    page = history.page(stored)
    assert all(release in page for release in RELEASES)
    assert "↑ agrees" in page and "↑ refused" in page and "↓ diverges" in page
    for reference in ("http:", "https:", "src=", "url(", "@import", "<link", "<script"):
        assert reference not in page
    write_json(history.document(stored), tmp_path / "history.json")
    told = json.loads((tmp_path / "history.json").read_text())
    assert [case["id"] for case in told["cases"]] == list(CHOSEN)
    assert told["cases"][2]["releases"]["0.2.2"]["outcome"] == "agrees"
    stream = io.StringIO()
    history.terminal(stored, Console(file=stream, width=140, color_system=None))
    assert "0.1.10 → 0.1.24: 2 cases better, 1 worse" in stream.getvalue()


def test_a_case_that_a_release_lacks_has_no_arrow() -> None:
    case = CaseResult("llama/hub", "llama", "", Status.PASS, "")
    versions = {"transformers": "5"}
    told = make_history({"1": RunResult("1", {}, versions, [case], {}), "2": RunResult("2", {}, versions, [], {})})
    assert told.lines[0].steps() == ["", "·"] and told.lines[0].cells[1] is None


def test_no_release_is_an_error() -> None:
    with pytest.raises(ValueError, match="no stored release"):
        make_history({})


def test_an_outcome_is_decided_by_status_and_failure_and_by_no_message() -> None:
    found: dict[Failure | None, Outcome] = {}
    for status, failure in [(Status.PASS, None), *((Status.ERROR, failure) for failure in Failure)]:
        found[failure] = CaseResult("a/b", "a", "", status, "", error="model: no refusal", failure=failure).outcome
    refused, lost = {Failure.MODEL, Failure.SAE, Failure.FORWARD}, {Failure.INPUT, Failure.INTERNAL}
    assert {outcome: {failure for failure in found if found[failure] is outcome} for outcome in found.values()} == {
        Outcome.AGREES: {None},
        Outcome.REFUSED: refused,
        Outcome.ABSENT: {Failure.ABSENT},
        Outcome.ERROR: lost,
        Outcome.CRASHED: {*Failure} - refused - lost - {Failure.ABSENT},
    }


@pytest.mark.parametrize("status", [Status.FAIL, Status.KNOWN, Status.UNMEASURED])
def test_a_case_with_numbers_was_judged(status: Status) -> None:
    numbers = [TensorResult("logits", Status.UNMEASURED if status is Status.UNMEASURED else Status.FAIL)]
    outcome = Outcome.UNMEASURED if status is Status.UNMEASURED else Outcome.DIVERGES
    assert CaseResult("llama/hub", "llama", "", status, "", numbers).outcome is outcome
    assert CaseResult("llama/hub", "llama", "", Status.UNMEASURED, "", failure=Failure.INPUT).outcome is Outcome.ERROR
