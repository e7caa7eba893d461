"""A model of a family that :mod:`candle_mi_parity.spec.families` does not have, judged as the census judges one:
every hook point where the module names tell where they are, else the logits alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from candle_mi_parity.candidate.process import EmitterError
from candle_mi_parity.candidate.watched import Seen
from candle_mi_parity.compare.compare import compare, first_diagnosis
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.coverage.census_truth import truth_of
from candle_mi_parity.errors import CaseTableError, ModelError, OracleError, ParityError
from candle_mi_parity.files.escape import one_line
from candle_mi_parity.judge.case import failure_of
from candle_mi_parity.models.checkpoint import local_path, model_digest, read_config
from candle_mi_parity.models.prepared_case import PreparedCase, text_ids
from candle_mi_parity.models.resolve import model_directory
from candle_mi_parity.spec.cases import Case
from candle_mi_parity.spec.families import transformers_type
from candle_mi_parity.trace.trace import Emitted
from candle_mi_parity.trace.truth import Truth

Give = Callable[[PreparedCase, Truth], Emitted]
"""The candidate's tensors of a subject, whose captures are those of the truth."""


def unmapped_subject(case: Case, cache: Path) -> PreparedCase:
    """The subject of a case whose family has no hook map.

    :raises ParityError: no such model, a type that transformers does not have, or no tokenizer.
    """
    directory = model_directory(case.model, cache)
    _require_class(config := read_config(directory), directory)
    tokens = list(case.tokens) if isinstance(case.tokens, list) else text_ids(directory, str(case.text))
    vocabulary = config.get("vocab_size")
    if not tokens:
        raise CaseTableError(f"{case.id}: no token; nothing would be compared")
    if isinstance(vocabulary, int) and (outside := [token for token in tokens if not 0 <= token < vocabulary]):
        raise CaseTableError(f"{case.id}: token {outside[0]} is outside the vocabulary of {vocabulary}")
    digest = model_digest(directory)
    content = json.dumps({"model": digest, "tokens": [tokens]}, sort_keys=True)
    return PreparedCase(
        case=case,
        model_dir=local_path(str(directory), CaseTableError),
        model_type=str(config.get("model_type")),
        tokens=[tokens],
        captures=[],
        sae_file=None,
        model_digest=digest,
        sae_digest=None,
        digest=hashlib.sha256(content.encode()).hexdigest(),
    )


def _require_class(config: dict[str, object], directory: Path) -> None:
    """:raises ModelError: transformers has no code of its own for the model's type, or none with a language head."""
    import transformers

    kind = str(config.get("model_type"))
    has = f"{directory}/config.json: transformers {transformers.__version__} has no"
    none = "so that there is no truth to compare with"
    if transformers_type(kind) not in transformers.CONFIG_MAPPING:
        remote = "; the code that its auto_map names is not run" if config.get("auto_map") else ""
        raise ModelError(f"{has} model type {one_line(repr(kind))}, {none}{remote}")
    if transformers.CONFIG_MAPPING[transformers_type(kind)] not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{has} language model (AutoModelForCausalLM) of model type {one_line(repr(kind))}, {none}")


def judge_unmapped(subject: PreparedCase, cache: Path, give: Give) -> tuple[CaseResult, Seen | None, str]:
    """A case, both its sides, and what else there is to say of it.

    Where the logits agree and a hook does not, it was looked for at the wrong place: the logits alone count then.
    """
    result = CaseResult(subject.case.id, "check", subject.digest, Status.ERROR, "")
    try:
        truth = truth_of(subject, cache, generated=False)
        names = [name for name in truth.tensors if name != "logits"]
        subject = replace(subject, captures=names)
        emitted = give(subject, truth)
    except EmitterError as error:
        result.error, result.failure = str(error).replace(str(subject.model_dir), "the model"), failure_of(error)
        result.status = Status.FAIL if result.failure.refused else Status.ERROR
        return result, None, ""
    except OracleError as error:
        raise OracleError(f"{subject.model_dir}: there is no truth for a {subject.model_type}: {error}") from error
    except ParityError:
        raise
    except Exception as error:  # whatever the class's own code raises at what it is given
        result.error = f"PyTorch cannot run this model in float64: {type(error).__name__}: {one_line(str(error))}"
        return result, None, ""
    result.tensors = compare(truth, emitted, None, emitted.asked)
    failed = [tensor.name for tensor in result.tensors if tensor.status is Status.FAIL]
    logits = {tensor.name for tensor in result.tensors if tensor.name.startswith("logits")}
    note = "" if names else "its module names do not tell where the hook points are: the logits alone are judged"
    if failed and not logits & set(failed):
        note = f"{failed[0]} is elsewhere than it was looked for: the logits alone are judged"
        result.tensors = [tensor for tensor in result.tensors if tensor.name in logits]
        failed = []
    result.expected = len(result.tensors)
    noisy = any(tensor.status is Status.UNMEASURED for tensor in result.tensors)
    result.unexplained = "no explanation is sought for a family whose hooks are not mapped" if failed else ""
    result.status = Status.FAIL if failed else Status.UNMEASURED if noisy else Status.PASS
    result.diagnosis = first_diagnosis(truth, emitted, result.tensors)
    return result, Seen(subject, truth, emitted), note
