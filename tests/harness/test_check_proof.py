"""Whether ``check`` names what is wrong, on copies of models of which only the config can be recognised."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from candle_mi_parity.candidate.sources import Source, StatelessSource, StoredSource
from candle_mi_parity.compare.check_result import CheckResult
from candle_mi_parity.compare.run_result import Verdict
from candle_mi_parity.compare.verdict import CaseResult, Outcome, Status
from candle_mi_parity.models.prepared_case import PreparedCase, prepare
from candle_mi_parity.run.check import CheckOptions, check
from candle_mi_parity.run.check_inputs import Prompt
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.spec.explanations import load_explanations
from candle_mi_parity.spec.hook_points import Mode
from candle_mi_parity.spec.paths import OUTPUTS, cache_root
from candle_mi_parity.trace.trace import Emitted
from candle_mi_parity.trace.truth import Truth
from tests.support.planting import CASES
from validation.catalogue import load_faults
from validation.source_faults import Checkout

RELEASE = "0.2.2"
DIVERGENCES = 60
"""Cases of the table in which the release is known to compute something else."""
FAULTS = {"source-rope-exponent", "source-query-norm", "source-gate-half"}
"""Faults in candle-mi's source that no change of a setting imitates."""


class Hers(StatelessSource):
    """The stored traces of a case of the table, under the user's own name for it."""

    def __init__(self, case: Case) -> None:
        self._case, self._stored = case, StoredSource(OUTPUTS / f"{RELEASE}.json")
        self.identity = self._stored.identity

    def trace(self, subject: PreparedCase, mode: Mode, truth: Truth, inputs: Path) -> Emitted:
        return self._stored.trace(replace(subject, case=self._case), mode, truth, inputs)


def hers(case: Case, out: Path, opened: Callable[[], Source] | None = None, search: float = 0.0) -> CheckResult:
    """A case of the table as a user has it: a copy of its model and its SAE, her own prompt and interventions.

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
    about_edits = {
        row.id for row in load_explanations().explanation if row.conditions and all(c.of_edit for c in row.conditions)
    }
    if result.verdict is not Verdict.FAIL:
        return f"{expected.id}: {result.verdict.value}, and a divergence of her model is a divergence"
    if any(said not in result.sentence for said in (f"({', '.join(known.ids)})", known.says, known.change)):
        return f"{expected.id}: expected {known.ids}, {known.change}: {result.sentence}"
    if unseen := set(known.ids) - {found.id for found in result.forecast} - about_edits:
        return f"{expected.id}: the config alone tells {', '.join(sorted(unseen))}, and it was not said"
    return ""


@pytest.mark.parametrize(
    "case_id",
    [
        "llama/v5",
        "gemma2/layer-types",
        "llama/sae-layer-norm",
        "llama/edit-steer-set-inner",
        "starcoder2/absent-norm-type",
    ],
)
def test_the_sentence_names_the_explanation(
    case_id: str, judged: Callable[[str, str], CaseResult], tmp_path: Path
) -> None:
    result = hers(CASES[case_id], tmp_path / "hers", lambda: Hers(CASES[case_id]))
    assert not fault(result, judged(RELEASE, case_id))


@pytest.mark.thorough
@pytest.mark.rust
def test_the_sentence_names_the_explanation_of_every_known_divergence(
    judged: Callable[[str, str], CaseResult], tmp_path: Path
) -> None:
    """Measured anew by the release itself, not taken from what is stored of it."""
    default = [case for case in CASES.values() if case.lane == "default"]
    expected = {case.id: judged(RELEASE, case.id) for case in default}
    known = [
        case
        for case in default
        if expected[case.id].status is Status.KNOWN and expected[case.id].outcome is Outcome.DIVERGES
    ]
    assert len(known) == DIVERGENCES
    results = {case.id: hers(case, tmp_path / str(index)) for index, case in enumerate(known)}
    faults = [said for id, result in results.items() if (said := fault(result, expected[id]))]
    print(f"{len(known) - len(faults)} of {len(known)} known divergences named")
    assert not faults, "\n".join(faults)


@pytest.mark.thorough
@pytest.mark.rust
def test_a_fault_in_candle_mis_source_is_found_at_its_tensor_and_not_explained(tmp_path: Path) -> None:
    checkout = Checkout(cache_root(), tmp_path)
    planted = [row for row in load_faults() if row.id in FAULTS]
    assert {row.id for row in planted} == FAULTS
    for row in planted:
        with checkout.candidate(row) as source:
            result = hers(CASES[row.case], tmp_path / f"{row.id}-hers", lambda: source, search=20.0)
        first = result.prompts[0].case.first_divergence
        assert first is not None and first.name == row.first, f"{row.id}: {result.sentence}"
        assert f"first at {row.first}" in result.sentence and result.prompts[0].case.explained is None
        assert "explains it" in result.sentence or "none of" in result.sentence, result.sentence


def test_a_refusal_is_told_in_candle_mis_words(tmp_path: Path) -> None:
    case = CASES["llama/rope-yarn"]
    result = hers(case, tmp_path, lambda: Hers(case))
    assert result.verdict is Verdict.FAIL
    assert "refuses this model: This kind of rope_scaling is not implemented" in result.sentence
    assert 'unsupported rope_scaling type "yarn"' in result.sentence


@pytest.mark.rust
def test_a_model_on_which_the_release_is_right(tmp_path: Path) -> None:
    result = hers(CASES["llama/hub"], tmp_path / "hers")
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
