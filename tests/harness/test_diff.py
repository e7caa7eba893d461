"""Two candidates compared: what was planted in one is what moved, and it is worse only if the gate says so."""

from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.candidate.sources import NotStoredError
from candle_mi_parity.compare.align import INFINITE, SAME, common, tensor_distance
from candle_mi_parity.compare.diff import CaseDiff, Diff, Direction, Kind, Side, TensorDiff, diff_call
from candle_mi_parity.compare.run_result import Verdict
from candle_mi_parity.compare.verdict import CaseResult, Explained, Outcome, Status
from candle_mi_parity.errors import ParityError, TraceError
from candle_mi_parity.judge.case import Progress
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.report import diff_views
from candle_mi_parity.report.diff_views import Cost, costs
from candle_mi_parity.run.diff import Pair, diff_one
from candle_mi_parity.spec.explanations import NOTHING_KNOWN
from candle_mi_parity.spec.paths import cache_root
from candle_mi_parity.trace.trace import Emitted, InMemory, Run, Selection
from tests.support.command import command, one_line
from tests.support.planting import CASES, Arrays, Giving, Real, real
from tests.support.results import case, shown
from validation.array_changes import changed
from validation.catalogue import load_faults

POST, PATTERN = "blocks.1.mlp.hook_post", "blocks.1.attn.hook_pattern"
LLAMA = "llama/hub"
Change = Callable[[Arrays], object]


def held(traces: Mapping[str, Emitted | ParityError]) -> Giving:
    """A source of given traces and errors, by case."""

    def give(subject: PreparedCase, mode: str, *_: object) -> Emitted:
        found = traces.get(subject.case.id) if mode == "free" else None
        if isinstance(found, ParityError) or found is None:
            raise found or NotStoredError(f"nothing is stored for {subject.case.id} ({mode})")
        return found

    return Giving(give)


def emitted(there: Real, change: Change | None = None) -> InMemory:
    """The honest trace of a case, or a copy with something planted in it."""
    arrays = there.arrays
    if change is not None:
        change(arrays)
    return of_arrays(there, arrays)


def of_arrays(there: Real, arrays: Arrays, parts: dict[str, Selection] | None = None) -> InMemory:
    honest = there.emitted
    found = {name: (array, (parts or {}).get(name)) for name, array in arrays.items()}
    return InMemory(found, honest.dtype, honest.scalars, honest.top_features)


def scale(name: str, factor: float) -> Change:
    return lambda arrays: arrays.update({name: arrays[name] * np.float32(factor)})


def compared(a: Giving, b: Giving, case_ids: tuple[str, ...] = (LLAMA,)) -> Diff:
    pair = Pair(a, b)
    cases = [diff_one(CASES[name], pair, ("A", "B"), cache_root(), NOTHING_KNOWN, Progress(), 0) for name in case_ids]
    return Diff("A", "B", {}, {}, {"transformers": "5", "device": "cpu"}, cases)


def between(a: Change | None, b: Change | None) -> Diff:
    """Two candidates on one case, something planted in either."""
    there = real(LLAMA)
    return compared(held({LLAMA: emitted(there, a)}), held({LLAMA: emitted(there, b)}))


def only(diff: Diff) -> CaseDiff:
    (case,) = diff.cases
    return case


def row(case: CaseDiff, name: str) -> TensorDiff:
    return next(row for row in case.rows if row.name == name)


FAULTS = {
    fault.id: fault for fault in load_faults() if fault.tensor is not None and fault.case == LLAMA and fault.fast
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_b_is_worse_and_named_and_a_fault_in_a_is_better(name: str) -> None:
    change, where = FAULTS[name].tensor, FAULTS[name].first
    assert change is not None

    def plant(arrays: Arrays) -> None:
        new = changed(arrays, change)
        arrays.clear()
        arrays.update(new)

    worse, better = between(None, plant), between(plant, None)
    assert worse.verdict.exit_code == 1 and where in "; ".join(only(worse).worse)
    assert where in [row.name for row in only(worse).moved() if row.worse]
    assert better.verdict.exit_code == 0 and only(better).better and not only(better).worse


def test_direction_and_size_are_those_of_what_was_planted() -> None:
    case = only(between(None, scale(POST, 1.001)))
    away, towards = row(case, POST), row(only(between(scale(POST, 1.001), None)), POST)
    assert [row.name for row in case.moved()] == [POST], "nothing else moved"
    assert away.direction is Direction.AWAY and towards.direction is Direction.TOWARDS
    assert away.distance and away.b and away.distance.ratio == pytest.approx(away.b.ratio, rel=0.05)
    sideways = between(scale(POST, 1.001), scale(POST, 0.999))
    assert row(only(sideways), POST).direction is Direction.SIDEWAYS and sideways.verdict is Verdict.PASS


def test_a_change_that_rounding_can_explain_is_only_counted() -> None:
    same = between(None, None)
    assert {row.kind for row in only(same).rows} == {Kind.IDENTICAL} and same.verdict is Verdict.PASS
    diff = between(None, lambda arrays: arrays.update({POST: np.nextafter(arrays[POST], np.float32(np.inf))}))
    assert only(diff).count(Kind.ROUNDING) == 1 and not only(diff).moved()
    assert diff.verdict is Verdict.PASS and not only(diff).worse and not only(diff).better


@pytest.mark.parametrize("factor, worse", [(1.02, True), (1.0010002, False)])
def test_a_divergence_is_worse_when_it_grew_by_more_than_rounding(factor: float, worse: bool) -> None:
    diff = between(scale(POST, 1.001), scale(POST, factor))
    assert (row(only(diff), POST).direction is Direction.AWAY) == worse
    assert (diff.verdict is Verdict.FAIL) == worse
    back = between(scale(POST, factor), scale(POST, 1.001))
    assert back.verdict is Verdict.PASS and bool(only(back).better) == worse


def test_a_hook_that_vanished_is_worse_and_one_that_appeared_is_better() -> None:
    lost, found = between(None, lambda a: a.pop(POST)), between(lambda a: a.pop(POST), None)
    assert row(only(lost), POST).kind is Kind.VANISHED and lost.verdict.exit_code == 1
    assert row(only(found), POST).kind is Kind.APPEARED and found.verdict.exit_code == 0
    neither = between(lambda a: a.pop(POST), lambda a: a.pop(POST))
    assert POST not in [row.name for row in only(neither).rows] and neither.verdict.exit_code == 0


@pytest.mark.parametrize("count, value, worse", [(1, 0.1, False), (2, 0.1, True), (1, 0.2, True)])
def test_a_leak_is_worse_when_more_entries_or_more_weight_leak(count: int, value: float, worse: bool) -> None:
    def leak(count: int, value: float) -> Change:
        return lambda arrays: arrays[PATTERN].__setitem__((0, 2, 4, slice(5, 5 + count)), value)

    diff = between(leak(1, 0.1), leak(count, value))
    assert bool(only(diff).worse) == worse and between(leak(count, value), leak(1, 0.1)).verdict is Verdict.PASS


def test_another_explanation_is_noted_and_a_lost_one_is_worse() -> None:
    known, other, lost = (case("a/b", Status.KNOWN) for _ in range(3))
    other.explained, lost.explained = Explained(["CMI006"], "One key too many.", "sliding_window + 1"), None
    assert diff_call(known, other, {}).note == "A: rope_theta = 10000.0; B: sliding_window + 1"
    assert "now it is not explained" in "; ".join(diff_call(known, lost, {}).worse)
    assert diff_call(lost, known, {}).better and not diff_call(lost, known, {}).worse


REFUSED, CRASHED = EmitterError("model", "no such rope"), EmitterError("crash", "emitter was ended by SIGKILL")
ABSENT, CORRUPT = NotStoredError("nothing is stored for llama/hub (free)"), TraceError("x.json: wrong sha256")


@pytest.mark.parametrize(
    "a, b, code",
    [
        ("honest", REFUSED, 1),
        (REFUSED, "honest", 0),
        ("honest", CRASHED, 1),
        (REFUSED, CRASHED, 1),
        (CRASHED, REFUSED, 0),
        (REFUSED, REFUSED, 3),
        ("honest", ABSENT, 3),
        (ABSENT, "honest", 3),
        ("honest", CORRUPT, 2),
        ("wrong", REFUSED, 0),
        (REFUSED, "wrong", 1),
    ],
)
def test_the_outcomes_of_a_case_decide_the_exit_code(a: str | ParityError, b: str | ParityError, code: int) -> None:
    traces = {"honest": emitted(real(LLAMA)), "wrong": emitted(real(LLAMA), scale(POST, 1.001))}
    one, other = (held({LLAMA: traces[side] if isinstance(side, str) else side}) for side in (a, b))
    diff = compared(one, other)
    assert diff.verdict.exit_code == code, diff.line()


def test_a_case_of_one_side_alone_does_not_hide_the_others() -> None:
    there, other = real(LLAMA), real("gemma2/hub")
    both = {LLAMA: emitted(there), "gemma2/hub": emitted(other)}
    fewer = held({LLAMA: emitted(there)})
    diff = compared(held(both), fewer, (LLAMA, "gemma2/hub"))
    assert diff.verdict.exit_code == 0
    assert [(case.id, case.b.outcome) for case in diff.cases if not case.judged] == [("gemma2/hub", Outcome.ABSENT)]
    broken = held({LLAMA: emitted(there, scale(POST, 1.001))})
    assert compared(held(both), broken, (LLAMA, "gemma2/hub")).verdict.exit_code == 1


# --- parts ----------------------------------------------------------------------------------------


def last_row(there: Real, arrays: Arrays) -> InMemory:
    """As a case of a large model is stored: the last position, and some logits of it."""
    kept, parts = {}, {}
    for name, array in arrays.items():
        if name.startswith(("blocks.1", "lens.blocks.1")):
            continue
        row, columns = array.shape[-2] - 1, None
        if name == "logits":
            columns = [3, 5, 200]
        part = Selection(shape=list(array.shape), rows=[row], columns=columns)
        array = array[..., [row], :]
        kept[name], parts[name] = (array if columns is None else array[..., columns]), part
    return of_arrays(there, kept, parts)


def whole_against_part(change: Change, monkeypatch: pytest.MonkeyPatch) -> Diff:
    monkeypatch.setattr("candle_mi_parity.run.diff.stored_selection", _without_layer_1)
    monkeypatch.setattr("candle_mi_parity.judge.case.stored_selection", _without_layer_1)
    there = real(LLAMA)
    return compared(held({LLAMA: last_row(there, there.arrays)}), held({LLAMA: emitted(there, change)}))


def _without_layer_1(names: list[str]) -> set[str]:
    return {name for name in names if not name.startswith(("blocks.1", "lens.blocks.1"))}


def test_a_whole_trace_is_cut_to_what_the_other_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = whole_against_part(lambda arrays: None, monkeypatch)
    assert honest.verdict.exit_code == 0 and only(honest).partial
    assert {row.kind for row in only(honest).rows} == {Kind.IDENTICAL}
    assert row(only(honest), "logits").a == row(only(honest), "logits").b

    def put(name: str, index: tuple[int, ...]) -> Diff:
        return whole_against_part(lambda arrays: arrays[name].__setitem__(index, 9.0), monkeypatch)

    assert put("blocks.2.mlp.hook_post", (0, 23, 1)).verdict.exit_code == 1
    assert put("logits", (0, 23, 5)).verdict.exit_code == 1
    assert put("logits", (0, 23, 4)).verdict.exit_code == 0, "a logit that was not kept is not compared"


def test_parts_that_share_nothing_are_said_to_share_nothing() -> None:
    there = real(LLAMA)
    part = Selection(shape=[1, 24, 256], rows=[23], columns=[0, 1])
    other = part.model_copy(update={"columns": [1, 2]})
    logits = there.arrays["logits"]
    a = of_arrays(there, {"logits": logits[:, [23]][..., [0, 1]]}, {"logits": part})
    b = of_arrays(there, {"logits": logits[:, [23]][..., [1, 2]]}, {"logits": other})
    shared = common(a.entries["logits"], b.entries["logits"])
    assert shared and shared.columns == [1]
    assert tensor_distance("logits", there.truth, a, b) == SAME
    apart = of_arrays(there, {"logits": b.tensor("logits")}, {"logits": part.model_copy(update={"columns": [7, 8]})})
    assert tensor_distance("logits", there.truth, a, apart) is None


# --- distances ------------------------------------------------------------------------------------


def test_keys_that_the_mask_forbids_are_far_apart_only_when_one_reads_them() -> None:
    there = real(LLAMA)

    def leak(value: float) -> InMemory:
        return emitted(there, lambda arrays: arrays[PATTERN].__setitem__((0, 2, 4, 5), value))

    assert tensor_distance(PATTERN, there.truth, emitted(there), leak(1e-30)) == INFINITE
    alike = tensor_distance(
        PATTERN, there.truth, leak(0.1), leak(float(np.nextafter(np.float32(0.1), np.float32(1))))
    )
    assert alike is not None and not alike.same and alike.inside
    apart = tensor_distance(PATTERN, there.truth, leak(0.1), leak(0.101))
    assert apart is not None and not apart.inside


def test_decisions_and_scalars_that_differ_are_counted() -> None:
    there = real("gemma2/hub")
    honest = emitted(there)
    logits = there.arrays["logits"]
    logits[0, 3] = logits[0, 3, ::-1]
    flipped = of_arrays(there, there.arrays | {"logits": logits})
    scalars = honest.scalars | {"sae.n_active_last_pos": 1.0}
    fewer = InMemory(flipped.arrays, honest.dtype, scalars, honest.top_features[1:])
    diff = compared(held({"gemma2/hub": honest}), held({"gemma2/hub": fewer}), ("gemma2/hub",))
    distances = {row.name: row.distance for row in only(diff).rows}
    different = ("logits.next_token", "sae.n_active_last_pos", "sae.top_features_last_pos")
    assert all(distance and distance.decisions for name, distance in distances.items() if name in different)
    assert distances["logits.top10_last_pos"] == distances["sae.reconstruction_mse"] == SAME


def test_a_feature_that_fires_on_one_side_only_is_a_decision() -> None:
    there = real("gemma2/hub")

    def put_out(arrays: Arrays) -> None:
        features = arrays["sae.features"]
        features[tuple(np.argwhere(features)[0])] = 0

    one, other = emitted(there), emitted(there, put_out)
    found = tensor_distance("sae.features", there.truth, one, other)
    assert found is not None and found.decisions == 1 and found.inside
    diff = compared(held({"gemma2/hub": one}), held({"gemma2/hub": other}), ("gemma2/hub",))
    assert row(only(diff), "sae.features").worse and diff.verdict.exit_code == 1


# --- terminal, page and command -------------------------------------------------------------------


def terminal(diff: Diff) -> str:
    return shown(partial(diff_views.terminal, diff), 140)


def test_the_terminal_names_the_tensor_and_the_verdict_and_stays_short() -> None:
    text = terminal(between(None, scale(POST, 1.001)))
    assert POST in text and "agrees → diverges" in text and "away" in text
    assert text.rstrip().splitlines()[-1].startswith("verdict: WORSE: 1 of 1 cases")
    assert terminal(between(None, None)).rstrip().splitlines()[-1].startswith("verdict: NOTHING WORSE")
    diff = between(None, scale(POST, 1.001))
    diff.cases = diff.cases * 150
    assert len(terminal(diff).splitlines()) < 80
    assert "and 130 more in diff.html" in terminal(diff)


def test_the_page_shows_what_moved_and_when_it_began() -> None:
    def spoil(arrays: Arrays) -> None:
        arrays[POST][0, 5, 7] = float("nan")

    honest, spoilt = between(None, None), between(None, spoil)
    assert POST in diff_views.page(spoilt) and "∞" in diff_views.page(spoilt)
    assert POST not in diff_views.page(honest) and honest.started in diff_views.page(honest)
    assert datetime.fromisoformat(honest.started).tzinfo


def ran(forward: float | None, peak: int | None) -> CaseDiff:
    """A case whose two sides took a forward of ``forward`` and of 0.2 seconds."""
    result = CaseResult(LLAMA, "llama", "", Status.PASS, "")
    recorded = [
        Run(started="", seconds={} if seconds is None else {"forward": seconds}, threads=2, peak_rss_bytes=memory)
        for seconds, memory in ((forward, peak), (0.2, 4 << 20))
    ]
    return CaseDiff(Side(result, None, recorded[0]), Side(result, None, recorded[1]))


def test_speed_is_compared_over_the_cases_that_both_recorded() -> None:
    cases = [ran(0.1, 2 << 20), ran(0.1, 2 << 20), ran(9.0, 1 << 20), ran(None, None)]
    assert costs(cases) == [Cost("forward, median", "s", 0.1, 0.2), Cost("peak memory", "MiB", 2.0, 4.0)]
    assert costs([ran(None, None)]) == []


@pytest.mark.parametrize(
    "arguments, code, text",
    [
        (("stored:0.2.2", "stored:0.2.2", "--case", "llama/hub"), 0, "NOTHING WORSE; 0 better, 44 tensors"),
        (("stored:0.1.10", "stored:0.2.2", "--case", "llama/rope-linear"), 0, "diverges → agrees"),
        (("stored:0.1.10", "stored:0.2.2", "--cases", "qwen3/window"), 1, "refused → diverges"),
        (("stored:0.2.2", "stored:0.2.2", "--case", "qwen3/rope-yarn"), 3, "INCONCLUSIVE: nothing was compared"),
        pytest.param(
            ("torch", "stored:0.2.2", "--case", "smollm2/hub"),
            0,
            "restricted to that part",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_the_command(tmp_path: Path, arguments: tuple[str, ...], code: int, text: str) -> None:
    done = command("diff", *arguments, "--out", str(tmp_path))
    assert done.returncode == code, done.stdout + done.stderr
    assert text in done.stdout
    assert (tmp_path / "diff.html").is_file()


def test_a_candidate_that_holds_no_trace_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "flat.json").write_text("{}")
    flat = f"stored:{tmp_path / 'flat.json'}"
    assert "is a flat JSON" in one_line(command("diff", flat, "stored:0.2.2", "--out", str(tmp_path)))


def test_a_stored_candidate_has_no_other_device_on_either_side(tmp_path: Path) -> None:
    for pair in (("stored:0.1.10", "torch"), ("torch", "stored:0.2.2")):
        stored = next(spec for spec in pair if spec != "torch")
        done = command("diff", *pair, "--device", "cuda:0", "--case", LLAMA, "--out", str(tmp_path))
        assert f"{stored} was emitted on a CPU; --device cuda:0 needs a build" in one_line(done)
        assert not (tmp_path / "diff.html").exists()
