"""What a check says beside the verdict: what the difference does to her, and what her prompts could not show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from candle_mi_parity.candidate.watched import Seen
from candle_mi_parity.compare.check_result import PromptResult
from candle_mi_parity.coverage.fields import load_fields
from candle_mi_parity.errors import ParityError
from candle_mi_parity.judge.known import facts_of
from candle_mi_parity.models.prepared_case import Subject, tokenizer
from candle_mi_parity.oracle.fields_read import cached_fields_built
from candle_mi_parity.run.check_measures import Decode, lens_rows, matters
from candle_mi_parity.spec.counterfactual import places
from candle_mi_parity.spec.explanations import Explanations
from candle_mi_parity.spec.forecast import Forecast

if TYPE_CHECKING:
    from candle_mi_parity.run.check import _Check

_LENGTHS = ("sliding_window", "original_max_position_embeddings")


def decoder(check: _Check) -> Decode:
    """Token id → its text; ``#id`` where the model has no tokenizer."""
    if not check.has_tokenizer:
        return lambda token: f"#{token}"
    known = tokenizer(check.directory)
    return lambda token: str(known.decode([token]))


def measured(check: _Check, prompt: PromptResult, seen: Seen | None) -> None:
    """Add to a prompt what its difference does, where both sides gave numbers."""
    if seen is None:
        return
    last = f"blocks.{check.config.get('num_hidden_layers', 1) - 1}.hook_resid_post"
    hooks = [check.sae.hook] if check.sae else []
    prompt.matters = matters(seen, list(dict.fromkeys([*hooks, *(e.hook for e in check.options.edits), last])))
    prompt.lens = lens_rows(seen, decoder(check))


def finish(check: _Check, subjects: list[Subject]) -> None:
    """Add to the result what could not be shown, what is not known, and what identifies the check."""
    check.result.not_exercised = not_exercised(check.result.forecast, check.table, subjects)
    try:
        check.result.unknown = unknown_keys(check, subjects[0])
    except ParityError as error:
        check.result.notes.append(f"which keys transformers reads is not known: {error}")
    check.result.cite = check.identify(subjects)


def not_exercised(foretold: list[Forecast], table: Explanations, subjects: list[Subject]) -> list[str]:
    """What is known of the candidate on this model, and that no prompt shows; and the lengths that none reaches."""
    facts = [facts_of(subject) for subject in subjects]
    rows = {row.id: row for row in table.explanation}
    longest = max(one.tokens for one in facts)
    lines, told = [], set()
    for found in foretold:
        told |= set(found.keys)
        if found.needs and not any(rows[found.id].applies(one) for one in facts):
            short = f"prompts are at most {longest} tokens. " if "longer than" in found.needs else ""
            lines.append(f"{found.about}: {short}It takes {found.needs} to see: {found.says} ({found.id})")
    for key in _LENGTHS:
        value = facts[0].config.get(key)
        if type(value) is int and value >= longest and key not in told:
            lines.append(
                f"{key} {value}: prompts are at most {longest} tokens; nothing is known against a longer one."
            )
    return lines


def unknown_keys(check: _Check, subject: Subject) -> list[str]:
    """Keys that the config sets and transformers reads, and that no row of the config-field ledger covers."""
    ledger = load_fields()
    read = cached_fields_built(check.directory, subject.model_type, check.options.cache)
    there = [field for field in sorted(read) if places(check.config, field)]
    return [field for field in there if ledger.row(subject.model_type, field) is None]
