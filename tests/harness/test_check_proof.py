"""Whether ``check`` names what is wrong, on copies of the models of the table."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from candle_mi_parity.candidate.sources import Source, StoredSource
from candle_mi_parity.compare.check_result import CheckResult
from candle_mi_parity.compare.run_result import Verdict
from candle_mi_parity.compare.verdict import CaseResult, Outcome, Status
from candle_mi_parity.models.prepared_case import prepare
from candle_mi_parity.run.check import CheckOptions, check
from candle_mi_parity.run.check_inputs import Prompt
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.spec.explanations import load_explanations
from candle_mi_parity.spec.paths import OUTPUTS, cache_root
from tests.support.planting import CASES, Giving
from validation.catalogue import load_faults
from validation.source_faults import Checkout

RELEASE = "0.2.2"
DIVERGENCES = 60
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
    shutil.copytree(subject.model_dir, out / "mine")
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
    checkout = Checkout(cache_root(), tmp_path)
    planted = [row for row in load_faults() if row.id in FAULTS]
    assert {row.id for row in planted} == FAULTS
    for row in planted:
        with checkout.candidate(row) as source:
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
