"""The sentence of ``check``: whether it names what is wrong, on copies of models and on made-up results."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from candle_mi_parity.candidate.sources import Source, StoredSource
from candle_mi_parity.candidate.watched import Seen
from candle_mi_parity.compare.check_result import CheckResult, PromptResult
from candle_mi_parity.compare.run_result import Verdict
from candle_mi_parity.compare.verdict import CaseResult, Explained, Failure, Outcome, Status
from candle_mi_parity.judge.notes import other_ids
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.report.check_page import foretold_lines, lines, page
from candle_mi_parity.run.check import CheckOptions, check
from candle_mi_parity.run.check_inputs import Prompt
from candle_mi_parity.run.check_measures import matters
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.spec.explanations import load_explanations
from candle_mi_parity.spec.forecast import Forecast
from candle_mi_parity.spec.paths import OUTPUTS, cache_root
from candle_mi_parity.trace.trace import InMemory
from tests.support.planting import CASES, Giving, real
from tests.support.results import case, refused
from validation.catalogue import load_faults
from validation.source_faults import Checkout

RELEASE = "0.2.2"
DIVERGENCES = 176
"""Cases of the table in which the release is known to compute something else."""
FAULTS = {"source-rope-exponent", "source-query-norm", "source-gate-half"}
"""Faults in candle-mi's source that no change of a setting imitates."""


def stored_traces(case: Case) -> Source:
    """The stored traces of a case of the table, for any case with the same model and prompt."""
    stored = StoredSource(OUTPUTS / f"{RELEASE}.json")
    return Giving(lambda subject, *asked: stored.trace(replace(subject, case=case), *asked), stored.identity)


def check_copy(case: Case, out: Path, opened: Callable[[], Source] | None = None, search: float = 0.0) -> CheckResult:
    """Check a copy of the model and SAE of a case, with its prompt and interventions.

    :param opened: the source of the traces; None for the release, built.
    """
    subject = prepare(case, cache_root())
    shutil.copytree(subject.quantized_dir or subject.model_dir, out / "mine")
    sae = None
    if subject.sae_file:
        sae = out / subject.sae_file.name  # the digest of a directory includes its name
        (shutil.copytree if subject.sae_file.is_dir() else shutil.copy)(subject.sae_file, sae)
    (tokens,) = subject.tokens
    options = CheckOptions(
        model=str(out / "mine"),
        prompts=(Prompt(id="p1", tokens=tokens),),
        sae=str(sae) if sae else None,
        hook=case.sae.hook if case.sae else None,
        edits=tuple(case.edits),
        dtype=case.dtype,
        loader=case.loader,
        candidate=RELEASE,
        out=out,
        search=search,
    )
    return check(options, opened=opened)


def fault(result: CheckResult, expected: CaseResult) -> str:
    """What is wrong with the answer about a known divergence; empty where nothing is."""
    known = expected.explained
    assert known is not None
    rows = load_explanations().explanation
    about_edits = {row.id for row in rows if row.conditions and all(c.of_edit for c in row.conditions)}
    if result.verdict is not Verdict.FAIL:
        return f"{expected.id}: {result.verdict.value}, expected FAIL"
    if any(text not in result.sentence for text in (f"({', '.join(known.ids)})", known.says, known.change)):
        return f"{expected.id}: expected {known.ids}, {known.change}: {result.sentence}"
    if missing := set(known.ids) - {found.id for found in result.forecast} - about_edits:
        return f"{expected.id}: the forecast from the config lacks {', '.join(sorted(missing))}"
    return ""


LISTED = ["llama/v5", "gemma2/layer-types", "llama/sae-layer-norm"]
LISTED += ["llama/edit-steer-set-inner", "starcoder2/absent-norm-type"]


@pytest.mark.parametrize("case_id", LISTED)
def test_the_sentence_names_the_explanation(
    case_id: str, judged: Callable[[str, str], CaseResult], tmp_path: Path
) -> None:
    result = check_copy(CASES[case_id], tmp_path / "copy", lambda: stored_traces(CASES[case_id]))
    assert not fault(result, judged(RELEASE, case_id))


@pytest.mark.thorough
@pytest.mark.rust
def test_the_sentence_names_the_explanation_of_every_known_divergence(
    judged: Callable[[str, str], CaseResult], tmp_path: Path
) -> None:
    """The release computes the traces again."""
    expected = {id: judged(RELEASE, id) for id, case in CASES.items() if case.lane == "default"}
    known = [
        CASES[id]
        for id, found in expected.items()
        if found.status is Status.KNOWN and found.outcome is Outcome.DIVERGES
    ]
    assert len(known) == DIVERGENCES
    results = {case.id: check_copy(case, tmp_path / str(index)) for index, case in enumerate(known)}
    faults = [text for id, result in results.items() if (text := fault(result, expected[id]))]
    print(f"{len(known) - len(faults)} of {len(known)} known divergences named")
    assert not faults, "\n".join(faults)


@pytest.mark.thorough
@pytest.mark.rust
def test_a_fault_in_candle_mi_s_source_is_located_and_not_explained(tmp_path: Path) -> None:
    checkout = Checkout(cache_root())
    planted = [row for row in load_faults() if row.id in FAULTS]
    assert {row.id for row in planted} == FAULTS
    for row in planted:
        with checkout.candidate(row.id, row.source, tmp_path) as source:
            result = check_copy(CASES[row.case], tmp_path / f"{row.id}-copy", lambda: source, search=20.0)
        first = result.prompts[0].case.first_divergence
        assert first is not None and first.name == row.first, f"{row.id}: {result.sentence}"
        assert f"first at {row.first}" in result.sentence and result.prompts[0].case.explained is None
        assert "explains it" in result.sentence or "none of" in result.sentence, result.sentence


def test_a_refusal_is_given_in_candle_mi_s_words(tmp_path: Path) -> None:
    case = CASES["llama/rope-yarn"]
    result = check_copy(case, tmp_path, lambda: stored_traces(case))
    assert result.verdict is Verdict.FAIL
    assert "refuses this model: This kind of rope_scaling is not implemented" in result.sentence
    assert 'unsupported rope_scaling type "yarn"' in result.sentence


@pytest.mark.rust
def test_a_model_on_which_the_release_is_right(tmp_path: Path) -> None:
    result = check_copy(CASES["llama/hub"], tmp_path / "copy")
    assert result.agrees
    assert result.sentence.startswith(
        "candle-mi 0.2.2 computes PyTorch's numbers on this model: 44 tensors, 1 prompt"
    )
    assert result.not_exercised == [
        "max_position_embeddings 512: the longest prompt has 24 tokens, and it takes a prompt longer than 512 tokens "
        "to see this: A prompt longer than max_position_embeddings is refused: the rotary table ends there. (CMI029)"
    ]
    found = result.prompts[0].matters
    assert found is not None and found.top1 == found.positions == 24 and found.kl_max < 1e-9 and found.kl_mean


# --- the sentence and the lines, on results that are made up --------------------------------------


def result_of(*cases: CaseResult) -> CheckResult:
    result = CheckResult("mine", "candle-mi 0.2.2", "0.2.2", keys=26)
    result.prompts = [PromptResult(f"p{i}", "text", [1, 2], one) for i, one in enumerate(cases, 1)]
    return result


def test_other_token_ids_are_told_with_both_beginnings() -> None:
    subject = replace(prepare(CASES["llama/hub"], cache_root()), tokens=[list(range(40))])
    failure = other_ids(subject, [0, 1, *range(3, 1500)])
    assert failure is not None
    result = result_of(case("check/p1", Status.FAIL))
    result.prompts[0].case.tensors = [failure]
    assert result.sentence == (
        "candle-mi 0.2.2 does not compute PyTorch's numbers on this model: candle-mi's tokenizer gives other ids "
        "from place 2 on: got [0, 1, 3, 4, 5, 6, 7, 8, …], transformers gives [0, 1, 2, 3, 4, 5, 6, 7, …]. "
        "Nothing was fed to the model."
    )
    longer = other_ids(subject, [*range(40), 0])
    assert longer is not None and "from place 40 on" in longer.detail
    padded = other_ids(replace(subject, tokens=[[0, 1, 0, 0]]), [0, 1])
    assert padded is not None and "from place 2 on" in padded.detail


@pytest.mark.parametrize("reason", ["all 44 tensors are one number everywhere: nothing was exercised", "no feature"])
def test_a_case_that_exercises_nothing_computes_nothing(reason: str) -> None:
    idle = case("check/p1", Status.UNMEASURED)
    idle.error = reason
    result = result_of(idle)
    assert result.sentence == f"Not measured: {reason}." and result.verdict is Verdict.INCONCLUSIVE
    assert result_of(case("check/p0"), idle).sentence == f"Not measured: in 1 of 2 prompts, {reason}."
    idle.error = "1 of 2 tensors are too noisy in bfloat16 to judge"
    assert "as far as can be judged" in result.sentence


def test_notes_on_prompts_are_shown_once() -> None:
    result = result_of(case("check/p1"), case("check/p2"))
    for prompt in result.prompts:
        prompt.case.notes = ["the prompt holds the padding id 0"]
    assert "  Note: p1, p2: the prompt holds the padding id 0" in list(lines(result))
    assert "p1, p2: the prompt holds the padding id 0" in page(result)


def test_a_part_of_the_hooks_is_told_of_in_the_first_sentence() -> None:
    result = result_of(case("check/p1"))
    assert "on this model: 2 tensors, 1 prompt" in result.sentence
    result.in_part = True
    assert "computes PyTorch's numbers on the 2 tensors that were looked at: 1 prompt" in result.sentence
    result.prompts[0].case = case("check/p1", Status.FAIL)
    assert "does not compute PyTorch's numbers on the 3 tensors that were looked at: first" in result.sentence
    result.dumped = ["hook_embed"]
    assert "on the 1 tensor of your dump that was looked at" in result.sentence


def known(ids: list[str], change: str, says: str, remedy: str = "") -> CaseResult:
    result = case(f"check/{change}", Status.FAIL)
    result.explained = Explained(ids, says, change, {"hook_embed": 0.0, "logits": 1.2}, remedy)
    return result


def test_causes_that_prompts_share_are_stated_once() -> None:
    theta = known(["CMI001"], "theta", "Theta is not read.", "Write it.")
    both = known(["CMI001", "CMI006"], "theta, window", "Theta is not read. One key too many.", "Write it.")
    eps = known(["CMI001", "CMI009"], "theta, eps", "Theta is not read. Epsilon is fixed.", "Write it. Set it.")
    other = known(["CMI011"], "gelu", "Another GELU.")
    head = "candle-mi 0.2.2 does not compute PyTorch's numbers on this model: "
    for cases in ([theta, both], [both, theta]):
        result = result_of(*cases)
        result.forecast = [
            Forecast("CMI001", "Theta is not read.", "Write it.", False, {"rope_theta": 1e5}),
            Forecast("CMI006", "One key too many.", "", False, {"sliding_window": 8}),
            Forecast("CMI009", "Epsilon is fixed.", "Set it.", False, {"eps": 1}),
        ]
        assert result.sentence == (
            f"{head}Theta is not read. One key too many. This model: rope_theta 100000.0; sliding_window 8. Equal "
            "to PyTorch with theta, window in all 2 tensors, worst 1.2 of 8 (CMI001, CMI006). Remedy: Write it. No "
            "remedy is known for sliding_window 8 (CMI006)."
        )
    result.prompts = result_of(theta, both, eps, other).prompts
    assert result.sentence == (
        f"{head}Theta is not read. One key too many. Epsilon is fixed. This model: rope_theta 100000.0; "
        "sliding_window 8; eps 1. Equal to PyTorch with theta, window or, on other prompts, with theta, eps in all 2 "
        "tensors, worst 1.2 of 8 (CMI001, CMI006, CMI009). Remedy: Write it. Set it. No remedy is known for "
        "sliding_window 8 (CMI006). Also: Another GELU. Equal to PyTorch with gelu in all 2 tensors, "
        "worst 1.2 of 8 (CMI011)."
    )
    bare = result_of(theta, both, eps)
    assert (
        bare.sentence.count("Also: ") == 0 and "theta, window or, on other prompts, with theta, eps" in bare.sentence
    )


def test_a_refused_sae_is_not_a_refused_model() -> None:
    result = result_of(refused("check/p1"))
    result.prompts[0].case.status = Status.FAIL
    assert "refuses this model: " in result.sentence
    result.prompts[0].case.failure = Failure.SAE
    assert "refuses this SAE: " in result.sentence


def test_keys_of_the_sae_are_not_counted_as_the_model_s() -> None:
    result = result_of()
    result.forecast = [Forecast("CMI020", "b_dec is not taken.", "", False, {"d_sae": 160}, ["apply_b_dec_to_input"])]
    result.sae_keys = {"CMI020": ["apply_b_dec_to_input", "d_sae"]}
    assert next(foretold_lines(result)) == "Known of 0.2.2 on a model like this, by 2 keys of the SAE:"
    result.forecast.append(Forecast("CMI001", "Theta is not read.", "", False, {"rope_theta": 1e5}))
    assert next(foretold_lines(result)).endswith(" this, by 1 of its 26 keys and 2 keys of the SAE:")


def test_what_is_known_of_a_model_without_a_key_counts_no_keys() -> None:
    result = result_of()
    result.forecast = [Forecast("CMI005", "Tables are rounded.", "", False, needs="a prompt longer than 128 tokens")]
    assert [*foretold_lines(result)] == [
        "Known of 0.2.2 on a model like this, with some inputs:",
        "  CMI005, with a prompt longer than 128 tokens",
    ]
    result.forecast.append(Forecast("CMI232", "Keys are divided.", "", False))
    assert [*foretold_lines(result)] == [
        "Known of 0.2.2 on a model like this:",
        "  CMI232: Keys are divided.",
        "  CMI005, with a prompt longer than 128 tokens",
    ]


def test_what_cannot_be_judged_is_not_the_worst() -> None:
    noisy = case("check/p1", Status.UNMEASURED)
    noisy.tensors[1] = replace(noisy.tensors[1], position_ratio=math.inf)
    noisy.error = "1 of 2 tensors are too noisy in bfloat16 to judge"
    assert "1 prompt, worst 0 of 8; 1 of 2 tensors are too noisy in this format, or" in result_of(noisy).sentence


def test_a_divergence_of_nothing_is_not_below_zero() -> None:
    there = real("llama/hub")
    value = there.truth.tensors["logits"].value
    got = value + 1e-15 * np.random.default_rng(6).standard_normal(value.shape)  # unclamped, the mean is below 0
    emitted = InMemory({"logits": (got, None)}, "float32", {}, [], {"logits"})
    found = matters(Seen(there.subject, there.truth, emitted), [])
    assert found.kl_mean is not None and 0 <= found.kl_mean < 1e-12
