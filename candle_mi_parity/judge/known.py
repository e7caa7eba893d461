"""Known divergences: a candidate is compared with the truth of the counterfactual that is listed for its release.

A case is KNOWN only when every tensor, scalar and decision passes that comparison with the ordinary gates.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.compare.compare import compare
from candle_mi_parity.compare.gate import UNITS, measure
from candle_mi_parity.compare.suspects import hook_point
from candle_mi_parity.compare.verdict import Explained, Status, TensorResult
from candle_mi_parity.errors import ExplanationError, ParityError
from candle_mi_parity.files.tensor_file import TensorFile
from candle_mi_parity.files.untrusted import read_json
from candle_mi_parity.models.checkpoint import read_config, weight_tensors
from candle_mi_parity.models.indexed import files_read, shards_beside
from candle_mi_parity.models.prepared_case import PreparedCase
from candle_mi_parity.models.quantized_facts import weight_facts
from candle_mi_parity.models.sae import load_sae
from candle_mi_parity.models.saelens import CONFIG, saelens_files, stored_values
from candle_mi_parity.oracle.oracle import Oracle
from candle_mi_parity.spec.conditions import Facts
from candle_mi_parity.spec.counterfactual import PLAIN, Counterfactual
from candle_mi_parity.spec.edits import Edit, Steer
from candle_mi_parity.spec.explanations import Explanation, Explanations, combined
from candle_mi_parity.spec.hook_points import format_of
from candle_mi_parity.trace.trace import CandleMi, Emitted
from candle_mi_parity.trace.truth import Truth

_FORMATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def facts_of(subject: PreparedCase) -> Facts:
    """The facts of a case that conditions refer to."""
    case, config = subject.case, read_config(subject.given)
    edits = [_edit_facts(edit) for edit in case.edits]
    files, names = files_read(subject.given, case.loader), list(weight_tensors(subject.model_dir))
    facts = facts_about(config, subject.sae_file, len(subject.tokens[0]), case.dtype, edits)
    return replace(
        facts,
        batch=len(subject.tokens),
        loader=case.loader,
        features=case.features,
        files=len(files),
        pickled=files[0].suffix == ".bin",
        shards_beside=bool(shards_beside(subject.given, case.loader)),
        prefixed=any(name.startswith("model.") for name in names),
        stored_head="lm_head.weight" in names,
        weights=weight_facts(subject.given),
    )


def _edit_facts(edit: Edit) -> dict[str, Any]:
    """An edit's row, its hook ``point`` in whatever block, and for steering whether it ``repeats`` an edge."""
    facts = edit.model_dump() | {"point": hook_point(edit.hook)}
    return facts | {"repeats": edit.spec.repeats} if isinstance(edit, Steer) else facts


def facts_about(
    config: dict[str, Any],
    sae_file: Path | None,
    tokens: int,
    dtype: str,
    edits: list[dict[str, Any]],
    stored: dict[str, Any] | None = None,
) -> Facts:
    """The same for a config, an SAE and edits without a case.

    :param stored: of a quantised checkpoint, :func:`weight_facts`.
    """
    sae, weights, threshold = {}, "", None
    if sae_file is not None and sae_file.is_dir():
        sae = read_json(sae_file / CONFIG, ExplanationError)
        file = TensorFile(saelens_files(sae_file)[1])
        names = file.keys()
        weights = _FORMATS.get(file.kind("W_enc")[0], "") if "W_enc" in names else ""
        threshold = float(stored_values(file, "threshold").min()) if "threshold" in names else None
    return Facts(config, tokens, dtype, sae, weights, threshold, edits, weights=stored or {})


@dataclass(frozen=True)
class Evidence:
    """What the explanation of a judged case is computed from.

    :ivar selection: the tensors that a trace stored in part has to contain; None for all.
    :ivar declared: tensors that may be too noisy to judge.
    :ivar release: the release to whose explanations the candidate is held; empty for those of any.
    """

    oracle: Oracle
    trace: Emitted
    selection: set[str] | None
    declared: set[str]
    release: str = ""

    @property
    def subject(self) -> PreparedCase:
        return self.oracle.subject

    def under(self, change: Counterfactual) -> tuple[Truth, list[TensorResult]]:
        """The truth of a counterfactual, and every tensor of the candidate compared with it.

        :raises ParityError: the counterfactual has no truth.
        """
        truth = self.oracle.under(change).truth()
        return truth, compare(truth, self.trace, decoder_of(self.subject, change), self.selection)

    @cached_property
    def facts(self) -> Facts:
        return facts_of(self.subject)


def decoder_of(subject: PreparedCase, change: Counterfactual = PLAIN) -> np.ndarray | None:
    """``W_dec`` [d_sae, d_in] of the case's SAE, from which excused flips are propagated; None without an SAE."""
    return load_sae(subject.sae_file, change).decoder if subject.sae_file is not None else None


@dataclass(frozen=True)
class NotExplained:
    """Why a counterfactual does not explain a candidate, in one line.

    :ivar first: the first tensor that differs from the counterfactual too; empty if that is not the reason.
    """

    why: str
    first: str = ""


def explained(evidence: Evidence, change: Counterfactual, rows: list[Explanation]) -> Explained | NotExplained:
    """The explanation by a counterfactual, or why it does not explain the candidate.

    :param rows: the explanations that ``change`` combines; empty for one that was found by search.
    """
    try:
        truth, results = evidence.under(change)
    except ParityError as error:
        return NotExplained(f"{change.describe()} has no truth: {error}")
    if wrong := [result for result in results if result.status is Status.FAIL]:
        first = wrong[0]
        many = f"{len(wrong)} of {len(results)} tensors differ"
        return NotExplained(
            f"with {change.describe()}, {many}, first {first.name} ({first.ratio:.3g} of 8)", first.name
        )
    noisy = {result.name for result in results if result.status is Status.UNMEASURED}
    if opened := sorted(noisy - evidence.declared):
        return NotExplained(f"with {change.describe()}, {', '.join(opened[:3])} cannot be judged")
    if not differ(evidence.oracle.truth(), truth, evidence.trace.dtype):
        return NotExplained(f"{change.describe()} changes no tensor by more than rounding does: it explains nothing")
    return Explained(
        ids=[row.id for row in rows],
        says=" ".join(row.says for row in rows) or change.describe(),
        change=change.describe(),
        ratios={result.name: result.ratio for result in results if result.name not in noisy},
        remedy=" ".join(dict.fromkeys(row.remedy for row in rows if row.remedy)),
        key=change.key(),
    )


LESS_PRECISE = 4.0
"""A counterfactual whose rounding noise is larger by this factor in some tensor computes less precisely."""


def differ(one: Truth, other: Truth, dtype: str) -> bool:
    """Whether two truths of a case differ by more than rounding in any tensor or mask, or in the size of rounding."""
    for name, expected in one.tensors.items():
        counter = other.tensors.get(name)
        if counter is None or counter.shape != expected.shape:
            return True
        value, mask, also = expected.value, expected.allowed, counter.allowed
        if (
            mask is not None
            and also is not None
            and (np.broadcast_to(mask, value.shape) != np.broadcast_to(also, value.shape)).any()
        ):
            return True
        if np.linalg.norm(counter.noise) > LESS_PRECISE * np.linalg.norm(expected.noise):
            return True
        both = None if mask is None else np.broadcast_to(mask, value.shape)
        unit = UNITS[format_of(name, dtype)]
        if not measure(counter.value - value, value, expected.noise, both, unit=unit).passes():
            return True
    return False


def known_divergence(
    evidence: Evidence, table: Explanations, identity: CandleMi, smallest: bool = True
) -> Explained | NotExplained:
    """The explanation of a divergence by the rows of the candidate's release, or why they do not explain it.

    All rows of a release must hold. Any other candidate may have fixed some of them, so any subset is accepted.

    :param smallest: whether rows that are not needed are left out, which takes a truth for each subset.
    """
    rows = [row for row in table.applicable(evidence.facts, evidence.release) if row.change is not None]
    why = NotExplained("")
    for size in [len(rows)] if table.lists(identity.source, identity.version) else range(len(rows), 0, -1):
        for part in map(list, combinations(rows, size)):
            if not part:
                continue
            found = explained(evidence, combined(part), part)
            if isinstance(found, Explained):
                return (_smallest(evidence, part) if smallest else None) or found
            if not why.why:
                why = replace(found, why=f"not {', '.join(row.id for row in part)}: {found.why}")
    return why


def _smallest(evidence: Evidence, rows: list[Explanation]) -> Explained | None:
    """The explanation by fewer rows than a combination that holds.

    :raises ExplanationError: two different subsets of one size explain the case.
    """
    for size in range(1, len(rows)):
        parts = [list(part) for part in combinations(rows, size)]
        found = [each for part in parts if isinstance(each := explained(evidence, combined(part), part), Explained)]
        if len(found) > 1:
            both = " and ".join(", ".join(each.ids) for each in found)
            raise ExplanationError(f"{both} overlap: either alone explains {evidence.subject.case.id}")
        if found:
            return found[0]
    return None


def known_refusal(
    error: EmitterError, subject: PreparedCase, table: Explanations, release: str
) -> tuple[Explained | None, str]:
    """The explanation of a refusal, by its stage and whole message."""
    for row in table.applicable(facts_of(subject), release):
        if row.refuses is None:
            continue
        if error.kind in row.refuses.stages and re.fullmatch(row.refuses.message, error.message):
            return Explained([row.id], row.says, remedy=row.remedy), ""
    return None, "this refusal is not known"
