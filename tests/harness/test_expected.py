"""What a candidate is held to: a chosen release, or exactly what a file expects; and the lines that name failures."""

from dataclasses import replace
from pathlib import Path

import pytest

from candle_mi_parity.compare.diff import Diff, diff_outcome
from candle_mi_parity.compare.run_result import RunResult, Section, Verdict
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.coverage.calls_judge import load_known_calls
from candle_mi_parity.judge.case import Judgement
from candle_mi_parity.judge.explain import hold_table
from candle_mi_parity.models.tokenizers import load_tokenizers
from candle_mi_parity.report import views_ci
from candle_mi_parity.report.causes import failures
from candle_mi_parity.run.sections import known_tokenizers
from candle_mi_parity.spec.expected import held_to, listed_as, load_expected
from candle_mi_parity.spec.explanations import load_explanations
from candle_mi_parity.trace.trace import CandleMi
from tests.support.command import command, one_line
from tests.support.results import case, refused, run_of

TABLE, CALLS = load_explanations(), load_known_calls().known
CHECKOUT = CandleMi(version="0.3.0-dev", source="path", checksum=None, revision=None, tree_digest="b" * 64)

OWN = """format = 1
expected = []
[[explanation]]
id = "CMI900"
name = "x"
says = "The window is one key too long."
kind = "wrong number"
when = ["tokens > 1"]
change = { config_add = { sliding_window = 1 } }
releases = ["9.9.9"]
"""


def expects(tmp_path: Path, *ids: str) -> Path:
    path = tmp_path / "expected.toml"
    path.write_text(f"format = 1\nexpected = {list(ids)!r}\n")
    return path


@pytest.mark.parametrize(
    ("ids", "verdict"),
    [(["CMI001"], "KNOWN"), ([], "FAIL"), (["CMI006"], "FAIL")],
)
def test_a_file_expects_its_divergences_and_no_other(tmp_path: Path, ids: list[str], verdict: str) -> None:
    arguments = ["--candidate", "stored:0.2.2", "--search", "0", "--out", str(tmp_path)]
    done = command("run", "llama/v5", "llama/hub", *arguments, "--known", str(expects(tmp_path, *ids)))
    assert done.stdout.splitlines()[-1].startswith(f"verdict: {verdict}:"), done.stdout + done.stderr


@pytest.mark.parametrize("id", ["CMI002", "CMI006"])
def test_an_expected_divergence_that_no_case_shows_fails_also_in_a_checkout(tmp_path: Path, id: str) -> None:
    table = held_to(TABLE, "", load_expected(expects(tmp_path, "CMI001", id), CALLS))
    needs_one = case("llama/v5", Status.KNOWN)
    result = RunResult("path:x", {}, {}, [needs_one], {}, baseline="0.2.2")
    hold_table([Judgement(needs_one, applicable=("CMI001",))], table, CHECKOUT, result, whole=True)
    assert [line.split()[0] for line in result.stale] == [id] and result.verdict is Verdict.FAIL


def test_a_row_of_the_file_is_an_explanation_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "expected.toml"
    path.write_text(OWN)
    table = held_to(TABLE, "0.1.6", load_expected(path, CALLS))
    assert [row.id for row in table.explanation if "0.1.6" in row.releases] == ["CMI900"]
    assert table.baseline("0.3.0-dev") == "0.1.6"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('format = 1\nexpected = ["CMI01"]\n', "CMI01; like it: CMI"),
        ("format = 1\n", "expected: "),
        ('format = 1\nexpected = []\ncolour = "red"\n', "colour: "),
        ("", "format: "),
        (OWN.replace("CMI900", "CMI001"), "wrong.toml: beside this suite's rows: Value error, id given"),
        (OWN.replace("tokens > 1", "tokens"), "wrong.toml: 'tokens' is not a condition"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    arguments = ["run", "llama/hub", "--candidate", "stored:0.2.2", "--out", str(tmp_path)]
    assert told in one_line(command(*arguments, "--known", str(path)))
    assert "No such file" in one_line(command(*arguments, "--known", str(tmp_path / "absent")))
    assert "there are 0.1.6, 0.1.10" in one_line(command(*arguments, "--baseline", "0.9"))


def test_a_call_is_expected_by_the_id_of_its_cause() -> None:
    listed = {row.id: row.releases for row in listed_as(CALLS, "0.2.2", {"CMI103"})}
    assert "0.2.2" in listed["CMI103"] and not any("0.2.2" in listed.get(id, []) for id in ("CMI101", "CMI102"))


def test_a_tokenizer_is_expected_by_the_id_of_its_cause(tmp_path: Path) -> None:
    table = load_tokenizers()
    both = [load_expected(expects(tmp_path, *ids), table.known) for ids in (["CMI201"], [])]
    assert [list(known_tokenizers(table, "0.2.2", one)) for one in (*both, None)] == [
        ["llama2"],
        [],
        ["llama2", "words_truncated", "words_padded"],
    ]


def judged(known: int, gone: int, moved: int) -> list[Judgement]:
    """Cases to which an explanation applies: still known, now right, now wrong in another way."""
    statuses = [Status.KNOWN] * known + [Status.PASS] * gone + [Status.FAIL] * moved
    cases = [case(f"llama/{place}", status) for place, status in enumerate(statuses)]
    return [Judgement(one, applicable=("CMI001",)) for one in cases]


@pytest.mark.parametrize(
    ("identity", "told"),
    [
        (CHECKOUT, "Nothing new since 0.2.2; 3 of 3 known divergences as in 0.2.2."),
        (CHECKOUT.model_copy(update={"source": "registry"}), "3 of 3 known divergences as in"),
        (CHECKOUT.model_copy(update={"version": "0.2.2", "source": "registry"}), "Nothing new since 0.2.2."),
    ],
)
def test_another_candidate_than_the_baseline_says_how_much_is_as_before(identity: CandleMi, told: str) -> None:
    judgements = judged(3, 0, 0)
    result = replace(run_of(*(one.result for one in judgements)), baseline="0.2.2")
    hold_table(judgements, TABLE, identity, result, whole=False)
    assert told in result.is_new()
    judgements = judged(2, 1, 1)
    hold_table(judgements, TABLE, CHECKOUT, result, whole=True)
    assert result.known_before == "2 of 3 known divergences as in 0.2.2", "one that agrees may have agreed before"
    judgements = [*judged(0, 2, 0), Judgement(refused("a/b"), applicable=("CMI030",))]
    hold_table(judgements, TABLE, CHECKOUT, result, whole=True)
    assert result.known_before == "1 of 3 known divergences as in 0.2.2", "no case needs CMI001 any more"
    assert list(result.gone) == ["CMI001"]
    result.gone = {}
    hold_table(judgements, TABLE, CHECKOUT, result, whole=False)
    assert result.known_before == "1 of 1 known divergences as in 0.2.2", "the case that needs it may not have run"
    assert not result.gone


# --- verdicts and their last lines ----------------------------------------------------------------


def test_what_can_only_be_known_or_refused_is_known_and_never_a_pass() -> None:
    assert run_of(refused("llama/rope-yarn")).verdict is Verdict.KNOWN
    assert run_of(refused("llama/rope-yarn"), case("llama/v5", Status.KNOWN)).verdict is Verdict.KNOWN
    assert run_of().verdict is Verdict.INCONCLUSIVE


def test_a_run_without_cases_says_what_it_judged_and_what_not() -> None:
    section = Section("tokenizer", [case("tokens/a")], left_out={"b": "no npm", "c": "no npm"})
    result = replace(run_of(), sections={"tokens": section})
    assert result.line().startswith("PASS: no case; 1 of 1 tokenizers agree; 2 tokenizers not asked. Nothing new.")
    assert views_ci.junit(result).count('<skipped message="no npm"') == 2
    assert "| no npm | 2 | `tokens/b`, `tokens/c` |" in views_ci.summary(result)


def test_what_could_not_be_judged_does_not_differ() -> None:
    section = Section("tokenizer", [case("tokens/a"), case("tokens/b", Status.ERROR)])
    result = replace(run_of(case("a/b")), sections={"tokens": section})
    assert result.verdict is Verdict.ERROR
    assert result.is_new() == "New: 1 tokenizer could not be judged."
    assert result.is_right().startswith(
        "As far as measured: 1 of 1 cases agree, 1 of 2 tokenizers agree, 1 tokenizer "
    )


def beyond(name: str) -> CaseResult:
    return replace(case(name, Status.FAIL), beyond_known="blocks.1.mlp.hook_post")


def test_the_failures_are_named_by_the_tensor_at_which_they_start() -> None:
    scores = [case(f"llama/{place}", Status.FAIL) for place in range(166)]
    lines = failures(run_of(*scores, case("llama/x", Status.FAIL, "logits"), beyond("llama/v5"), case("a/b")))
    assert lines == [
        "FAIL: 166 first at blocks.0.attn.hook_scores (llama/0, llama/1, llama/2 and 163 more); "
        "llama/x first at logits; llama/v5 first at blocks.1.mlp.hook_post, beside what is known"
    ]
    assert failures(run_of(case("a/b"), case("llama/v5", Status.KNOWN))) == []
    late = replace(case("a/b", Status.FAIL), notes=["as a/c: only after other cases in one process: it passes alone"])
    assert failures(run_of(late)) == ["FAIL: a/b first at blocks.0.attn.hook_scores, only after other cases"]
    lost = [replace(case(f"a/{place}", Status.ERROR), error=f"lost at /x/{place}a7f") for place in (1, 2)]
    assert failures(run_of(*lost)) == ["ERROR: 2 lost at /x/1a7f (a/1, a/2)"], "grouped, with a path that exists"
    (error,) = failures(run_of(case("a/b", Status.ERROR)))
    assert error == "ERROR: a/b crash: emitter was ended by SIGKILL"


def test_a_message_names_what_is_new_and_the_edits_before_it() -> None:
    message = replace(beyond("llama/v5"), edited=["zero at blocks.0.hook_mlp_out"]).message()
    assert "new, beside what is known: first at blocks.1.mlp.hook_post" in message
    assert "edited before it: zero at blocks.0.hook_mlp_out" in message
    assert "look at: activation" in message, "the suspect is that of the new tensor"


@pytest.mark.parametrize(
    ("asked_for", "section", "verdict"),
    [
        (True, Section("tokenizer", [case("tokens/x")], left_out={"y": "no npm"}), Verdict.INCONCLUSIVE),
        (True, Section("tokenizer", skipped="only a candle-mi that is built can be asked"), Verdict.INCONCLUSIVE),
        (True, Section("tokenizer", [case("tokens/x")]), Verdict.PASS),
        (False, Section("tokenizer", [case("tokens/x")], left_out={"y": "no npm"}), Verdict.PASS),
    ],
)
def test_a_part_that_was_named_must_be_whole(asked_for: bool, section: Section, verdict: Verdict) -> None:
    result = run_of(case("llama/hub"))
    result.sections["tokens"] = replace(section, asked_for=asked_for)
    assert result.verdict is verdict
    assert not section.left_out or "not asked: y: no npm" in section.line()


@pytest.mark.parametrize(
    ("before", "after", "worse"),
    [
        (Status.PASS, Status.PASS, ""),
        (Status.PASS, Status.FAIL, "agrees → diverges"),
        (Status.KNOWN, Status.KNOWN, ""),
        (Status.KNOWN, Status.FAIL, "now it is not explained"),
    ],
)
def test_a_diff_compares_what_was_made_of_the_parts_beside_the_cases(
    before: Status, after: Status, worse: str
) -> None:
    found = diff_outcome(case("tokens/x", before), case("tokens/x", after))
    assert bool(found.worse) is bool(worse) and worse in "".join(found.worse)
    verdict = Diff("a", "b", {}, {}, {}, [found]).verdict
    assert verdict is (Verdict.FAIL if worse else Verdict.PASS)


def test_a_candidate_older_than_every_known_release_says_that_nothing_was_expected() -> None:
    result = replace(run_of(case("llama/hub", Status.FAIL)), identity={"version": "0.1.0"})
    assert "older than every known release" in result.is_new()
    assert "older" not in replace(result, baseline="0.1.6").is_new()
