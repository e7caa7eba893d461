"""The other forwards of a case: each kind fails on a fault that only it can see."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.candidate.sources import LiveSource, Made, StoredSource, open_source
from candle_mi_parity.candidate.spelling import parse_candidate
from candle_mi_parity.candidate.torch_source import TorchSource
from candle_mi_parity.compare.run_result import Section, Verdict
from candle_mi_parity.compare.verdict import Failure, Outcome, Status
from candle_mi_parity.coverage import forwards
from candle_mi_parity.coverage.forwards import Forward, judge_forwards, plan, through_pretrained
from candle_mi_parity.judge.case import Progress
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.report import page, report_model, tables, views_ci
from candle_mi_parity.run.options import RunOptions
from candle_mi_parity.run.run import run_cases
from candle_mi_parity.spec.cases import load_cases
from candle_mi_parity.spec.edits import Zero
from candle_mi_parity.spec.paths import OUTPUTS, cache_root
from tests.support.planting import RELEASE
from tests.support.results import case as judged_case
from tests.support.results import run_of
from tests.support.toy import HOOKS, IDS, LLAMA, Call, Fault, Toy, judged, live, made

ZERO = (Zero(kind="zero", hook="hook_embed"),)
OTHER_IDS = [[4, 8, 2]]


def plain_and_edited(tmp_path: Path) -> tuple[Made, Made]:
    return made(tmp_path), made(tmp_path, "toy/edit", ZERO)


def test_the_honest_toy_passes(tmp_path: Path) -> None:
    found = judged(Toy(), tmp_path, *plain_and_edited(tmp_path))
    assert [case.status for case in found.results] == [Status.PASS, Status.PASS] and not found.new
    size = (8 + len(HOOKS) - 2) + (5 - 1) + 2 * (forwards.REQUESTS - 2)
    assert found.line() == f"{size} of {size} other forwards agree"


PLAIN_FAULTS: dict[str, Fault] = {
    "with all captures": lambda call: call.starts == 2,
    "without captures": lambda call: not call.captures,
    "capturing blocks.0.attn.hook_q alone": lambda call: call.captures == ["blocks.0.attn.hook_q"],
    "after other ids": lambda call: call.ids == IDS and any(past.ids == OTHER_IDS for past in call.past),
    "of another length, model loaded anew": lambda call: call.loads == 2,
    "after another length": lambda call: len(call.ids[0]) > len((call.past or [call])[0].ids[0]),
    "of other ids again": lambda call: call.ids == OTHER_IDS and call.loads == 2,
    "at the end": lambda call: call.requests >= forwards.REQUESTS,
    "at the end without captures": lambda call: call.requests >= forwards.REQUESTS and not call.captures,
}
EDIT_FAULTS: dict[str, Fault] = {
    "without capturing the edited point": lambda call: call.edited and "hook_embed" not in call.captures,
    "without captures": lambda call: call.edited and not call.captures,
    "without its edits again": lambda call: not call.edited and any(past.edited for past in call.past),
}


@pytest.mark.parametrize("name", PLAIN_FAULTS)
def test_a_fault_that_one_forward_sees_is_told_with_its_name(name: str, tmp_path: Path) -> None:
    found = judged(Toy(PLAIN_FAULTS[name]), tmp_path, made(tmp_path))
    assert_tells(found, f"toy/plain {name}: logits differ from those of the ")


@pytest.mark.parametrize("name", PLAIN_FAULTS)
def test_a_fault_that_needs_other_requests_is_told_as_one_of_state(name: str, tmp_path: Path) -> None:
    (case,) = judged(Toy(PLAIN_FAULTS[name]), tmp_path, made(tmp_path)).new
    needs_others = name == ALL or name.startswith("at the end")
    assert any("only after other requests in one process" in note for note in case.notes) is needs_others
    assert case.reproduce.endswith("--only traces") is needs_others


@pytest.mark.parametrize("name", EDIT_FAULTS)
def test_a_fault_of_an_edit_that_is_not_captured_is_told_with_its_name(name: str, tmp_path: Path) -> None:
    found = judged(Toy(EDIT_FAULTS[name]), tmp_path, made(tmp_path, "toy/edit", ZERO))
    assert_tells(found, f"toy/edit {name}: logits differ from those of the ")


def assert_tells(found: Section, start: str) -> None:
    (case,) = found.new
    assert (case.status, case.outcome) == (Status.FAIL, Outcome.DIVERGES)
    assert case.error.startswith(start)
    assert case.compared < case.expected
    assert f"and new: {case.id}" in found.line()


def test_the_first_difference_of_logits_is_told_with_its_place_and_values(tmp_path: Path) -> None:
    found = judged(Toy(PLAIN_FAULTS["without captures"]), tmp_path, made(tmp_path))
    right = Toy().tensors(Call(IDS, [], False, 1, 1, 1), [])["logits"][0, 2, 2]
    place = f"(first at batch 0, position 2, token 2: {right + 1:.9g} against {right:.9g}; 1 of 18)"
    assert found.new[0].error.endswith(place)


def test_a_capture_is_compared_and_not_its_logits_alone(tmp_path: Path) -> None:
    hook = "blocks.0.attn.hook_q"
    for fault, name in ((PLAIN_FAULTS[f"capturing {hook} alone"], f"capturing {hook} alone"), (everywhere, ALL)):
        found = judged(Toy(fault, hook), tmp_path, made(tmp_path))
        assert_tells(found, f"toy/plain {name}: {hook} differs from that of the captured forward")


ALL = "with all captures"


def everywhere(call: Call) -> bool:
    return True


@pytest.mark.parametrize("key", [len, lambda row: (len(row), row[-1]), lambda row: (len(row), row[0])])
def test_logits_that_depend_on_a_part_of_the_ids_are_told(tmp_path: Path, key: Callable[[list[int]], object]) -> None:
    class ByKey(Toy):
        def tensors(self, call: Call, hooks: list[str]) -> dict[str, np.ndarray]:
            return super().tensors(replace(call, ids=IDS if key(call.ids[0]) == key(IDS[0]) else call.ids), hooks)

    found = judged(ByKey(), tmp_path, made(tmp_path))
    assert_tells(found, "toy/plain of other ids: the logits are those of the case's own ids")


# --- refusals and answers that must not pass ------------------------------------------------------


def refuse(document: dict[str, Any]) -> None:
    document["forwards"][1] |= {"logits": None, "captures": {}, "error": "panic: out of cheese"}


def test_a_forward_that_is_refused_fails(tmp_path: Path) -> None:
    toy = Toy()
    toy.spoil = refuse
    assert_tells(judged(toy, tmp_path, made(tmp_path)), "toy/plain without captures: panic: out of cheese")
    toy.spoil = lambda document: document["forwards"][0].update(logits=None, captures={}, error="panic: no cheese")
    (case,) = judged(toy, tmp_path, made(tmp_path, "toy/edit", ZERO)).new
    lost = "nothing can be compared, because the forward without its edits failed"
    assert [tensor.detail for tensor in case.tensors if lost in tensor.detail]


@pytest.mark.parametrize(("kind", "failure"), [("crash", Failure.CRASH), ("model", Failure.MODEL)])
def test_a_process_that_refuses_or_crashes_fails(kind: str, failure: Failure, tmp_path: Path) -> None:
    class Crashing(Toy):
        def emit(self, request: Mapping[str, Any], timeout: float) -> Path:
            raise EmitterError(kind, "no cheese")

    (case,) = judged(Crashing(), tmp_path, made(tmp_path)).new
    assert (case.status, case.failure, case.compared) == (Status.FAIL, failure, 0)
    assert case.error == f"toy/plain in a new process: {kind}: no cheese"


SPOILT: dict[str, Callable[[dict[str, Any]], object]] = {
    "candle_mi is": lambda d: d["header"].update(candle_mi=RELEASE.model_dump() | {"version": "0.2.1"}),
    "case is": lambda d: d["header"].update(case={"id": "toy/other", "digest": "c" * 64}),
    "model_digest is": lambda d: d["header"].update(model_digest="e" * 64),
    "device is": lambda d: d["header"].update(device="cuda:0"),
    "forwards are not those": lambda d: d["forwards"].pop(),
    "forwards are not": lambda d: d["forwards"].append(d["forwards"][0]),
    "are not those": lambda d: d["forwards"].reverse(),
    "captures of the forward": lambda d: d["forwards"][0]["captures"].pop("hook_embed"),
    "of the forward without captures": lambda d: d["forwards"][1]["captures"].update(hook_embed="f" * 64),
    "format": lambda d: d.update(format="candle-mi-parity/trace/1"),
    "Extra inputs": lambda d: d.update(colour=1),
    "exactly one": lambda d: d["forwards"][0].update(error="x"),
}


@pytest.mark.parametrize("told", SPOILT)
def test_an_answer_to_something_else_is_an_error(told: str, tmp_path: Path) -> None:
    toy = Toy()
    toy.spoil = SPOILT[told]
    (case,) = judged(toy, tmp_path, made(tmp_path)).new
    assert case.status is Status.ERROR and told in case.error and not case.compared


def test_a_difference_fails_even_if_its_values_are_lost(tmp_path: Path) -> None:
    toy = Toy(PLAIN_FAULTS["without captures"])
    toy.spoil = lambda document: document.update(tensors=[])
    (case,) = judged(toy, tmp_path, made(tmp_path)).new
    assert case.status is Status.FAIL and "the values cannot be shown" in case.error


# --- what is asked --------------------------------------------------------------------------------


def test_a_plain_case_stands_for_its_model_dtype_and_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, same, batch = made(tmp_path), made(tmp_path, "toy/same"), made(tmp_path, "toy/batch", ids=IDS * 2)
    long = made(tmp_path, "toy/long", ids=[[7] * forwards.LONG])
    edits = made(tmp_path, "toy/edit", ZERO)

    def asked(*traces: Made) -> list[tuple[str, int]]:
        return [(each.subject.case.id, len(forwards)) for each, forwards in plan(traces)]

    order = [("toy/edit", 5), ("toy/long", 3), ("toy/batch", 7), ("toy/plain", 8 + len(HOOKS))]
    again = [("toy/plain", 2), ("toy/batch", 2), ("toy/long", 2)]  # each shape
    assert asked(first, same, batch, long, edits) == [*order, *again * 2]
    assert asked(edits) == [("toy/edit", 5), *[("toy/edit", 2)] * 9]
    monkeypatch.setattr(forwards, "LARGE", 0)
    assert asked(first, same, batch) == [("toy/plain", 3)]


def test_the_largest_case_of_an_architecture_is_loaded_through_from_pretrained(tmp_path: Path) -> None:
    """From one file, and in a whole run with mmap too; a wrong number there is told with its name."""
    (tmp_path / "model.safetensors").touch()
    first, same = made(tmp_path), made(tmp_path, "toy/same")
    assert [each.subject.case.id for each, _ in through_pretrained([first, same], ())] == ["toy/plain"]
    (tmp_path / "larger").mkdir()
    larger = made(tmp_path / "larger", "toy/larger")
    (tmp_path / "larger" / "model.safetensors").write_bytes(b"weights")
    assert [each.subject.case.id for each, _ in through_pretrained([first, larger, same], ())] == ["toy/larger"]
    half = first.subject.case.model_copy(update={"dtype": "float16"})
    assert not through_pretrained([replace(first, subject=replace(first.subject, case=half))], ())
    toy, mapped = Toy(), Toy()
    mapped.spoil = lambda document: document["header"].update(features=["mmap", "transformer"])
    source = live(toy, first, patched=["hf-fetch-model"])
    source._lanes[("mmap",)] = mapped  # type: ignore[assignment]
    for whole, more in ((False, 1), (True, 2)):
        found = judge_forwards(source, [first.subject.case], "0.2.2", tmp_path / "out", whole)
        names = [tensor.name for tensor in found.results[0].tensors if "from_pretrained" in tensor.name]
        assert names == ["through from_pretrained", "through from_pretrained with mmap"][:more]
    source._lanes[("mmap",)] = EmitterError("not-built", "with mmap: it does not compile")
    found = judge_forwards(source, [first.subject.case], "0.2.2", tmp_path / "out", True)
    assert not found.new and "not asked through from_pretrained with mmap" in found.results[0].notes[0]
    toy.fault = lambda call: call.captures == HOOKS and call.requests > forwards.REQUESTS
    assert_tells(
        judge_forwards(source, [first.subject.case], "0.2.2", tmp_path / "out", False),
        "toy/plain through from_pretrained: logits differ from those of the captured forward",
    )


def test_one_token_has_another_length_and_other_ids(tmp_path: Path) -> None:
    for ids in ([[0]], [[1]], [[0, 1]]):
        found = judged(Toy(), tmp_path, made(tmp_path, ids=ids))
        assert not found.new
        rows = {forward.name: forward for forward in plan([made(tmp_path, ids=ids)])[0][1]}
        other, length = rows["of other ids"].tokens, rows["of another length"].tokens
        assert other and all(a != b for a, b in zip(other[0], ids[0], strict=True))
        assert length and len(length[0]) != len(ids[0])


def test_no_trace_is_an_error_of_a_whole_run_and_is_said_of_a_part(tmp_path: Path) -> None:
    whole, part = (judge_forwards(live(Toy()), [LLAMA], "0.2.2", tmp_path, whole) for whole in (True, False))
    assert [case.status for case in whole.new] == [Status.ERROR] and "no case left a trace" in whole.new[0].error
    assert not part.results and part.line() == "no other forward was judged: no case left a trace"


def test_what_cannot_be_asked_is_said(tmp_path: Path) -> None:
    stored = judge_forwards(StoredSource(OUTPUTS / "0.2.2.json"), [LLAMA], "stored:0.2.2", tmp_path, True)
    torch = judge_forwards(TorchSource(), [LLAMA], "torch", tmp_path, True)
    card = judge_forwards(live(Toy(), made(tmp_path), device="cuda:0"), [LLAMA], "0.2.2", tmp_path, True)
    assert "a candle-mi that is built" in stored.skipped == torch.skipped and "on the CPU" in card.skipped


# --- the run ---------------------------------------------------------------------------------------


def test_a_forward_fails_the_run_and_every_view_names_it(tmp_path: Path) -> None:
    result = run_of(judged_case("llama/hub"))
    result.sections["forwards"] = judged(Toy(), tmp_path, made(tmp_path))
    assert (result.verdict, result.is_new()) == (Verdict.PASS, "Nothing new.")
    result.sections["forwards"] = judged(Toy(PLAIN_FAULTS["without captures"]), tmp_path, made(tmp_path))
    assert result.verdict is Verdict.FAIL
    assert "1 other forward fails" in result.is_new() and "1 new other forward" in result.is_right()
    console = Console(record=True, file=io.StringIO(), width=300)
    tables.run_tables(result, console)
    views = [views_ci.junit(result), views_ci.summary(result), page.render(result), console.export_text()]
    views += ["".join(views_ci.workflow_commands(result)), json.dumps(report_model.document(result))]
    assert all("without captures" in view and "forwards/toy/plain" in view for view in views)


def test_forwards_alone_compare_nothing_with_pytorch(tmp_path: Path) -> None:
    result = run_of()
    result.sections["forwards"] = judged(Toy(), tmp_path, made(tmp_path))
    assert result.verdict is Verdict.INCONCLUSIVE


@pytest.mark.rust
@pytest.mark.thorough
def test_the_emitter_makes_every_kind_of_forward(tmp_path: Path) -> None:
    wanted = (
        *(f"llama/{name}" for name in ("hub", "batch", "one-token", "edit-batch", "edit-inject-v6")),
        "gemma2/bf16",
    )
    cases = [case for case in load_cases() if case.id in wanted]
    result = run_cases(RunOptions("0.2.2", wanted, tmp_path), cases, {}, Progress())
    forwards = result.sections["forwards"]
    assert forwards.results and not forwards.new and not forwards.skipped
    assert {case.id for case in forwards.results} == {f"forwards/{id}" for id in wanted}
    assert all(case.compared == case.expected > 0 for case in forwards.results)


@pytest.mark.rust
def test_the_emitter_answers_each_forward_by_itself(tmp_path: Path) -> None:
    """One forward that is refused costs no other; a trace that is not of these ids is told with the first place."""
    subject = prepare(LLAMA, cache_root())
    oracle = Oracle(subject, cache_root())
    asked = [Forward("a"), Forward("b", ["blocks.99.hook_embed"]), Forward("c", [], [[1 << 20]], False)]
    asked.append(Forward("d", ["hook_embed"], anew=True))
    with open_source(parse_candidate("0.2.2"), cache_root(), tmp_path, print) as source:
        assert isinstance(source, LiveSource)
        source.trace(subject, "free", oracle.truth(), oracle.inputs("free"))
        honest = source.made["llama/hub"]
        other = replace(honest, subject=replace(subject, tokens=[subject.tokens[0][::-1]]))
        right, wrong = (
            forwards.judge(each, asked, forwards.ask(source.emitter, each, asked, tmp_path / "out"))
            for each in (honest, other)
        )
    assert [tensor.status.value for tensor in right] == ["PASS", "FAIL", "FAIL", "PASS"]
    assert "never reached" in right[1].detail and "token 1048576" in right[2].detail
    assert {tensor.status for tensor in wrong} == {Status.FAIL}
    assert "first at batch 0, position 0, token 0: " in wrong[0].detail
