"""A ledger entry excuses one divergence of one case of one release, and nothing else that goes wrong there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from candle_mi_parity.compare.ledger import Known, Ledger, Refusal, apply_ledger, load_ledger, proposed_entry
from candle_mi_parity.compare.verdict import CaseResult, RunResult, Status, TensorResult, Verdict
from candle_mi_parity.errors import LedgerError
from candle_mi_parity.trace.trace import CandleMi

DIGEST, CHECKSUM = "d" * 64, "c" * 64
SCORES, PATTERN = "blocks.0.attn.hook_scores", "blocks.0.attn.hook_pattern"
HOOKS = [f"blocks.{i}.{point}" for i in range(2) for point in ("attn.hook_scores", "hook_attn_out", "hook_mlp_out")]
RELEASE = CandleMi(version="0.2.2", source="registry", checksum=CHECKSUM, revision=None, tree_digest=None)
FROM_PATH = CandleMi(version="0.2.2", source="path", checksum=None, revision=None, tree_digest="b" * 64)
ENTRY = Known(
    case="llama/v5", digest=DIGEST, version="0.2.2", checksum=CHECKSUM, first=SCORES, ratio=1e6,
    forced=["blocks.*.attn.hook_scores", "blocks.*.hook_attn_out"], why="rope_theta is read at the top level only",
)  # fmt: skip
REFUSAL = Refusal(
    case="llama/v5", version="0.2.2", checksum=CHECKSUM, error="unsupported rope", why="this rope is not supported"
)
DIVERGES = [name for name in HOOKS if "mlp" not in name]


def tensor(name: str, ratio: float) -> TensorResult:
    failed = not ratio < 8
    return TensorResult(
        name, Status.FAIL if failed else Status.PASS, "values" if failed else "", position_ratio=ratio, compared=10
    )


def diverging(
    first: str = SCORES, ratio: float = 1e6, forced: list[str] = DIVERGES, digest: str = DIGEST, error: str = ""
) -> CaseResult:
    case = CaseResult("llama/v5", "llama", digest, Status.ERROR if error else Status.FAIL, "command", error=error)
    if not error:
        case.tensors = [tensor("blocks.0.attn.hook_q", 1.0), tensor(first, ratio)]
        case.forced = [tensor(name, 1e6 if name in forced else 1.0) for name in HOOKS]
        case.expected = 2
    return case


def applied(case: CaseResult, entry: Known | Refusal = ENTRY, candidate: CandleMi = RELEASE) -> CaseResult:
    known = [entry] if isinstance(entry, Known) else []
    refused = [entry] if isinstance(entry, Refusal) else []
    apply_ledger(case, candidate, Ledger(format=1, known=known, refused=refused))
    return case


def test_the_recorded_divergence_is_known() -> None:
    case = applied(diverging())
    assert case.status is Status.KNOWN and case.known == ENTRY.why


@pytest.mark.parametrize("ratio", [1e6, 2.5e6, 4e5])
def test_its_size_may_move_within_half_a_decade(ratio: float) -> None:
    assert applied(diverging(ratio=ratio)).status is Status.KNOWN


OTHERS: dict[str, tuple[CaseResult, str]] = {
    "another first tensor": (diverging(first=PATTERN), f"first divergence at {PATTERN}, recorded at {SCORES}"),
    "a grown ratio": (diverging(ratio=1e7), "ratio 1e+07"),
    "a shrunk ratio": (diverging(ratio=1e5), "ratio 1e+05"),
    "an endless ratio": (diverging(ratio=math.inf), "ratio inf"),
    "a NaN ratio": (diverging(ratio=math.nan), "ratio nan"),
    "one more forced tensor": (diverging(forced=[*DIVERGES, "blocks.1.hook_mlp_out"]), "as blocks.1.hook_mlp_out"),
    "one forced tensor less": (diverging(forced=DIVERGES[1:]), f"as {DIVERGES[0]}"),
    "nothing forced": (diverging(forced=[]), "4 tensors differ"),
    "another digest": (diverging(digest="e" * 64), "the case's digest is eeee"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_divergence_is_not_excused_and_says_why(name: str) -> None:
    case, said = OTHERS[name]
    apply_ledger(case, RELEASE, Ledger(format=1, known=[ENTRY]))
    assert case.status is Status.FAIL, f"{name} was excused"
    assert case.known.startswith("not the known divergence: ") and said in case.known


@pytest.mark.parametrize(
    "error",
    ["crash: emitter was ended by SIGSEGV", "timeout: no answer", "model: another thing", "nothing is stored"],
)
def test_an_error_is_never_a_known_divergence(error: str) -> None:
    assert applied(diverging(error=error)).status is Status.ERROR
    assert applied(diverging(error=error), REFUSAL).status is Status.ERROR


@pytest.mark.parametrize(
    "candidate",
    [
        RELEASE.model_copy(update={"version": "0.2.3"}),
        RELEASE.model_copy(update={"checksum": "a" * 64}),
        FROM_PATH.model_copy(update={"version": "0.2.3"}),
    ],
)
def test_another_candle_mi_is_not_excused(candidate: CandleMi) -> None:
    assert applied(diverging(), candidate=candidate).status is Status.FAIL


def test_a_build_from_source_is_excused_as_in_its_release_and_for_the_same_only() -> None:
    case = applied(diverging(), candidate=FROM_PATH)
    assert case.status is Status.KNOWN and case.known == f"as in 0.2.2: {ENTRY.why}"
    assert applied(diverging(ratio=1e9), candidate=FROM_PATH).status is Status.FAIL


def test_another_case_is_not_excused() -> None:
    case = diverging()
    case.id = "mistral/v5"
    assert applied(case).status is Status.FAIL


def test_a_recorded_refusal_is_known_and_no_other_is() -> None:
    assert applied(diverging(error="model: unsupported rope_type"), REFUSAL).known == f"refused: {REFUSAL.why}"
    for error in ("model: unsupported model", "panic: unsupported rope_type", "crash: model: unsupported rope_type"):
        assert applied(diverging(error=error), REFUSAL).status is Status.ERROR, error
    from_path = applied(diverging(error="model: unsupported rope_type"), REFUSAL, FROM_PATH)
    assert from_path.known == f"as in 0.2.2: refused: {REFUSAL.why}"
    other = RELEASE.model_copy(update={"checksum": "f" * 64})
    assert applied(diverging(error="model: unsupported rope_type"), REFUSAL, other).status is Status.ERROR


def passing() -> CaseResult:
    case = diverging(ratio=1.0)
    case.status = Status.PASS
    return case


def test_an_entry_that_no_longer_diverges_is_stale_and_fails_the_run() -> None:
    ledger = Ledger(format=1, known=[ENTRY], refused=[REFUSAL])
    stale = ledger.stale(passing(), RELEASE)
    assert len(stale) == 2 and "no longer diverges" in stale[0] and "no longer refused" in stale[1]
    assert RunResult("0.2.2", {}, {}, [passing()], {}, stale).verdict is Verdict.FAIL
    assert RunResult("0.2.2", {}, {}, [passing()], {}, []).verdict is Verdict.PASS


def test_only_what_ran_as_that_release_can_be_stale() -> None:
    ledger = Ledger(format=1, known=[ENTRY])
    assert not ledger.stale(applied(diverging()), RELEASE)
    assert not ledger.stale(diverging(error="crash: x"), RELEASE)
    assert not ledger.stale(passing(), FROM_PATH)
    assert not ledger.stale(passing(), RELEASE.model_copy(update={"version": "0.1.6"}))


def toml(entry: Known, **change: str) -> str:
    fields = {
        "case": f'"{entry.case}"', "digest": f'"{entry.digest}"', "version": '"0.2.2"', "checksum": f'"{CHECKSUM}"',
        "first": f'"{entry.first}"', "ratio": "1e6", "forced": "[]", "why": f'"{entry.why}"',
    } | change  # fmt: skip
    return "[[known]]\n" + "".join(f"{key} = {value}\n" for key, value in fields.items() if value)


FILES: dict[str, tuple[str, str]] = {
    "empty why": (toml(ENTRY, why='""'), "known.0.why"),
    "hardly a why": (toml(ENTRY, why='"known"'), "known.0.why"),
    "no why": (toml(ENTRY, why=""), "known.0.why: Field required"),
    "unknown key": (toml(ENTRY, tolerance="1.0"), "known.0.tolerance"),
    "no digest": (toml(ENTRY, digest='""'), "known.0.digest"),
    "ratio 0": (toml(ENTRY, ratio="0.0"), "known.0.ratio"),
    "ratio NaN": (toml(ENTRY, ratio="nan"), "known.0.ratio"),
    "twice": (toml(ENTRY) + toml(ENTRY, first='"logits"'), "two entries for llama/v5 at 0.2.2"),
    "another format": ("[[known]]\n", "known.0.case"),
    "no TOML": ("[[known", "Expected"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_one_line_that_names_the_place(tmp_path: Path, name: str) -> None:
    text, said = FILES[name]
    path = tmp_path / "known.toml"
    path.write_text("format = 1\n" + toml(ENTRY))
    assert load_ledger(path).known[0].first == SCORES
    path.write_text("format = 1\n" + text)
    with pytest.raises(LedgerError) as caught:
        load_ledger(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_proposed_entry_excuses_what_it_was_made_from_once_a_person_says_why(tmp_path: Path) -> None:
    path = tmp_path / "known.toml"
    proposed = "format = 1\n" + proposed_entry(diverging(), RELEASE)
    path.write_text(proposed)
    with pytest.raises(LedgerError, match="why"):
        load_ledger(path)
    path.write_text(proposed.replace('why = ""', 'why = "because it is so"'))
    case = diverging()
    apply_ledger(case, RELEASE, load_ledger(path))
    assert case.status is Status.KNOWN
    assert load_ledger(path).known[0].forced == ["blocks.*.attn.hook_scores", "blocks.*.hook_attn_out"]


def test_the_ledger_in_the_repository_is_well_formed() -> None:
    assert load_ledger().format == 1
