"""What a run asks beside the cases: other forwards, direct calls, tokenizers, the generic config reader."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from candle_mi_parity.candidate.sources import LiveSource, Source, StoredSource
from candle_mi_parity.candidate.tokens import stored_tokens
from candle_mi_parity.compare.run_result import FORWARDS, RunResult, Section
from candle_mi_parity.compare.verdict import CaseResult, Status
from candle_mi_parity.coverage.auto_config import judge_class, other_transformers, recorded
from candle_mi_parity.coverage.calls_judge import (
    Expectations,
    JudgedCalls,
    KnownCalls,
    expectations,
    judge_source,
    load_known_calls,
    report_outdated,
)
from candle_mi_parity.coverage.forwards import judge_forwards
from candle_mi_parity.coverage.tokens_judge import judge_tokenizer, judge_tokens, reference
from candle_mi_parity.errors import HubError, ModelError, ParityError
from candle_mi_parity.judge.case import Progress
from candle_mi_parity.models.resolve import model_directory
from candle_mi_parity.models.tokenizers import (
    KnownTokenizer,
    TokenizerTable,
    load_tokenizers,
    tokenizer_directory,
)
from candle_mi_parity.run.at_once import at_once
from candle_mi_parity.run.options import RunOptions
from candle_mi_parity.spec.cases import Case, load_cases
from candle_mi_parity.spec.expected import ExpectedDivergences, listed_as
from candle_mi_parity.spec.explanations import Explanations
from candle_mi_parity.spec.paths import command

NOT_BUILT = "only a candle-mi that is built can be asked"


def judge_sections(
    source: Source,
    cases: list[Case],
    options: RunOptions,
    known: Explanations,
    expected: ExpectedDivergences | None,
    result: RunResult,
    progress: Progress,
) -> None:
    """Ask and judge every part of the run but the traces, and fill the sections of the result.

    Other forwards are made by one emitter while another answers the rest, as each is one process that computes.

    :param cases: those of which traces were just made.
    """
    parts, out = options.parts, options.out / "traces"

    def forwards_of(asked: list[Case]) -> Section:
        return judge_forwards(source, asked, options.candidate, out / "forwards", whole=not options.cases)

    if "traces" in parts and not options.cases:
        progress.note("other forwards")
    own = source.fresh() if isinstance(source, LiveSource) else nullcontext(source)
    with at_once(1, forwards_of, [cases] if "traces" in parts else []) as forwards, own as other:
        if "calls" in parts:
            progress.note("direct calls")
            held_to = expected_calls(options.cache, known.chosen, expected, progress.note)
            judged = judge_source(other, options.candidate, held_to, options.cache, out / "calls.json")
            take_calls(judged, held_to, other, result)
            if options.keep and judged.lost is None:
                options.keep.whole_file("calls", out / "calls.json")
        release = result.baseline
        if "tokens" in parts:
            progress.note("tokenizers")
            result.sections["tokens"] = judge_tokenizers(
                other, release, options.candidate, options.cache, out / "tokens", expected
            )
            result.known |= {row.id: row for row in load_tokenizers().known}
        if "auto-config" in parts:
            progress.note("generic configs")
            result.sections["auto-config"] = judge_classes(
                other, release, options.candidate, options.cache, out / "auto-config"
            )
        for each in forwards:
            result.sections = {FORWARDS: each.result(), **result.sections}
    for part in set(options.only) & set(result.sections):
        result.sections[part] = replace(result.sections[part], asked_for=True)


def expected_calls(
    cache: Path, release: str, expected: ExpectedDivergences | None, note: Callable[[str], None]
) -> Expectations:
    """What direct calls are compared with, of the chosen release or of a file of expected divergences."""
    known = load_known_calls()
    if expected is not None:
        known = KnownCalls(known=listed_as(known.known, release, set(expected.expected)))
    return replace(expectations(cache, known, note), chosen=release, exactly=expected is not None)


def take_calls(judged: JudgedCalls, held_to: Expectations, source: Source, result: RunResult) -> None:
    """Put judged direct calls into a result."""
    result.sections["calls"] = judged.direct
    result.known |= held_to.rows
    if judged.lost is None and source.identity is not None:
        report_outdated(judged, held_to, source.identity, result)


def judge_tokenizers(
    source: Source, release: str, spec: str, cache: Path, out: Path, expected: ExpectedDivergences | None = None
) -> Section:
    """The tokenizer of SmolLM2, and for a build those of ``fixtures/tokenizers.toml``.

    :param release: whose known causes are expected.
    :param expected: the causes that are expected instead.
    """
    again = command("run", "--only", "tokens", "--candidate", spec)
    smollm2 = model_directory(next(case.model for case in load_cases() if case.id == "smollm2/hub"), cache)
    section = Section("tokenizer")
    if isinstance(source, StoredSource):
        stored = CaseResult("tokens/smollm2", "tokens", "", Status.ERROR, again)
        try:
            judge_tokens(stored, stored_tokens(source.stored.index), reference(smollm2, cache, written=False))
        except ParityError as error:
            stored.error = str(error)
        section.results.append(stored)
        return section
    if not isinstance(source, LiveSource):
        return replace(section, skipped=NOT_BUILT)
    table = load_tokenizers()
    known = known_tokenizers(table, release, expected)
    section.results.append(judge_tokenizer("smollm2", smollm2, source, None, cache, out / "smollm2.json", again))
    unreachable = ""
    for row in table.tokenizer:
        try:
            directory = tokenizer_directory(row, cache, unreachable)
        except HubError as error:  # one download that fails or hangs is enough
            section.left_out[row.name] = unreachable = str(error)
            continue
        except ModelError as error:
            section.results.append(
                CaseResult(f"tokens/{row.name}", "tokens", "", Status.ERROR, again, error=str(error))
            )
            continue
        path = out / f"{row.name}.json"
        section.results.append(judge_tokenizer(row.name, directory, source, known.get(row.name), cache, path, again))
    return section


def known_tokenizers(
    table: TokenizerTable, release: str, expected: ExpectedDivergences | None
) -> dict[str, KnownTokenizer]:
    """Name of a tokenizer → the cause that is expected of it."""
    rows = [row for row in table.known if (row.id in expected.expected if expected else release in row.releases)]
    return {name: row for row in rows for name in row.tokenizers}


def judge_classes(source: Source, release: str, spec: str, cache: Path, out: Path) -> Section:
    """The classes that the release's generic config reader loads."""
    section = Section("generic config")
    if not isinstance(source, LiveSource) or source.device != "cpu":
        return replace(section, skipped=NOT_BUILT if not isinstance(source, LiveSource) else "asked on the CPU alone")
    if not release:
        return replace(section, skipped="there is no earlier release whose census says which classes load")
    if other := other_transformers(release):
        return replace(section, skipped=other)
    again = command("run", "--only", "auto-config", "--candidate", spec)
    section.results.extend(judge_class(record, source, cache, out, again) for record in recorded(release))
    return section
